"""What `exact` promises, where it is refused, and that it holds through failures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama, LogitsProcessorList

from ds4_mtp_plugin import MtpDraft, engine, settings
from ds4_mtp_plugin.draft import MAX_PRED_TOKENS
from ds4_mtp_plugin.host import opening
from ds4_mtp_plugin.host.session import SINGLE_ROWS
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, Planted

pytestmark = pytest.mark.skipif(GPU_LAYERS != 0, reason="no GPU promises it")

Make = Callable[..., Llama]
Plant = Callable[..., Planted]

PROMPT = np.random.default_rng(3).integers(260, 500, 45).tolist()


@pytest.mark.parametrize("exact", [None, False, True])
def test_on_the_cpu_it_is_promised(llama: Make, plant: Plant, exact: bool | None) -> None:
    files = plant(acceptance=1.0)
    llm = llama(files.trunk, n_gpu_layers=0, draft_model=MtpDraft(files.mtp, num_pred_tokens=2, exact=exact))
    assert llm.draft_model.stats.exact


def a_gpu(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """As if there were one that computes as many rows as if each were alone."""
    monkeypatch.setattr(engine.Library, "gpu_rows", property(lambda library: rows))


def test_on_a_gpu_that_was_tested_it_is_promised_as_far_as_it_holds(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(acceptance=1.0)
    a_gpu(monkeypatch, rows=5)
    options: dict[str, Any] = {"n_gpu_layers": -1}
    for exact in (None, True):
        llm = llama(files.trunk, **options, draft_model=MtpDraft(files.mtp, num_pred_tokens=4, exact=exact))
        assert llm.draft_model.stats.exact
    draft = MtpDraft(files.mtp, num_pred_tokens=0, ngram=True)
    llm = llama(files.trunk, **options, draft_model=draft)
    assert draft.stats.exact and llm._ds4_mtp._spec.n_draft == 4  # what is promised and admitted is kept
    assert not llama(files.trunk, **options, draft_model=MtpDraft(files.mtp, num_pred_tokens=5)).draft_model.stats.exact
    with pytest.raises(ValueError, match="5 rows are computed as if each were alone: num_pred_tokens=4 at most"):
        llama(files.trunk, **options, draft_model=MtpDraft(files.mtp, num_pred_tokens=5, exact=True))
    options |= {"type_k": 8, "type_v": 8, "flash_attn": True}
    with pytest.raises(ValueError, match="holds for a cache of F16 alone"):
        llama(files.trunk, **options, draft_model=MtpDraft(files.mtp, num_pred_tokens=2, exact=True))
    assert not llama(files.trunk, **options, draft_model=MtpDraft(files.mtp, num_pred_tokens=2)).draft_model.stats.exact


def test_on_a_gpu_no_verify_lies_on_both_sides_of_a_mark(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(acceptance=1.0)
    a_gpu(monkeypatch, rows=5)
    llm = llama(files.trunk, n_gpu_layers=-1, draft_model=MtpDraft(files.mtp, num_pred_tokens=4, exact=True))
    spec, verified = llm._ds4_mtp._spec, []
    monkeypatch.setattr(
        spec,
        "verify",
        lambda seq_id, n_past, token, drafts, verify=spec.verify, **options: (
            verified.append(range(n_past, n_past + 1 + len(drafts))) or verify(seq_id, n_past, token, drafts, **options)
        ),
    )
    tokens = llm.generate(files.cycle[:252].tolist(), temp=0.0)
    for _ in range(20):
        next(tokens)
    assert {len(rows) for rows in verified} >= {4, 5}
    assert all(rows[0] // 256 == rows[-1] // 256 for rows in verified)


@pytest.mark.parametrize("by", ["option", "switch"])
def test_on_a_gpu_it_is_refused(llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """The engine at hand may have no GPU: what it says of itself is all that this needs."""
    files = plant(acceptance=1.0)
    a_gpu(monkeypatch, rows=0)
    if by == "switch":
        monkeypatch.setattr(opening, "settings", lambda: settings.Settings(strict=True))
    draft = MtpDraft(files.mtp, num_pred_tokens=2, exact=True if by == "option" else None)
    with pytest.raises(ValueError, match=r"exact=True .* cannot be promised here: .*n_gpu_layers=-1"):
        llama(files.trunk, n_gpu_layers=-1, draft_model=draft)
    assert llama(files.trunk, n_gpu_layers=0, draft_model=draft).draft_model.stats.exact


def test_a_verify_that_may_go_to_a_gpu_is_refused(llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    files = plant(acceptance=1.0)
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "2")
    assert llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2, exact=True)).draft_model.stats.exact
    a_gpu(monkeypatch, rows=5)
    with pytest.raises(ValueError, match="cannot be promised here: GGML_OP_OFFLOAD_MIN_BATCH is set"):
        llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2, exact=True))


def test_a_gpu_without_the_promise_is_no_error_and_said(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(acceptance=1.0)
    a_gpu(monkeypatch, rows=0)
    llm = llama(files.trunk, n_gpu_layers=2, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    assert not llm.draft_model.stats.exact and llm.draft_model.stats.depth == 2


def test_a_cpu_that_nobody_looked_at_is_refused(llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    files = plant(acceptance=1.0)
    monkeypatch.setattr("platform.machine", lambda: "ppc64le")
    with pytest.raises(ValueError, match="cannot be promised here: it was tested on no CPU of this kind .ppc64le."):
        llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2, exact=True))


def test_the_widest_verify_is_as_wide_as_the_engine_computes_alone() -> None:
    header = Path(__file__).parents[2] / "patches" / "ggml" / "src" / "ggml-cpu" / "ds4-mtp-rows.h"
    found = re.search(r"#define DS4_MTP_SINGLE_ROWS (\d+)", header.read_text())
    assert found and int(found[1]) == MAX_PRED_TOKENS + 1 == SINGLE_ROWS


def rows(llm: Llama, n: int, fail: Callable[[int], None] = lambda i: None) -> tuple[list[int], Any]:
    """n greedy tokens and the row of logits that each was sampled from."""
    seen: list[Any] = []

    def processor(input_ids: Any, scores: Any) -> Any:
        seen.append(scores.copy())
        return scores

    tokens: list[int] = []
    for token in llm.generate(PROMPT, temp=0.0, logits_processor=LogitsProcessorList([processor])):
        tokens.append(token)
        fail(len(tokens))
        if len(tokens) == n:
            break
    return tokens, np.stack(seen[:n])


@pytest.mark.parametrize(
    "options",
    [{"flash_attn": True}, *({"flash_attn": True, "type_k": kind, "type_v": kind} for kind in (0, 2, 8, 30))],
    ids=["F16", "F32", "Q4_0", "Q8_0", "BF16"],
)
def test_it_holds_for_any_cache(llama: Make, plant: Plant, options: dict[str, Any]) -> None:
    """Across the marks at 128, 256 and 512; past the last the engine would split the cache for a single row."""
    files = plant(**BY_CONTEXT, quant="Q8_0")
    plain_tokens, plain = rows(llama(files.trunk, n_threads=2, **options), 520)
    draft = MtpDraft(files.mtp, num_pred_tokens=5, exact=True)
    tokens, logits = rows(llama(files.trunk, n_threads=2, n_threads_batch=2, draft_model=draft, **options), 520)
    assert tokens == plain_tokens
    assert np.flatnonzero((logits != plain).any(1)).tolist() == []
    assert 0 < draft.stats.accepted < draft.stats.proposed


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("n_batch", [20, 64])
@pytest.mark.parametrize("at", [1, 30])
def test_a_failure_does_not_cost_it(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, quant: str, n_batch: int, at: int
) -> None:
    """What is evaluated again is evaluated in the batches that it was in: the prompt's, and single rows."""
    files = plant(**BY_CONTEXT, quant=quant)
    plain_tokens, plain = rows(llama(files.trunk, n_batch=n_batch), 80)
    llm = llama(files.trunk, n_batch=n_batch, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    target = llm._ds4_mtp._spec.target

    def refuse(batch: Any) -> None:
        monkeypatch.undo()
        raise engine.DecodeError("injected", -3)

    def fail(n: int) -> None:
        if n == at:
            monkeypatch.setattr(target, "decode", refuse)

    with pytest.warns(RuntimeWarning, match="decoding plainly: verifying failed"):
        tokens, logits = rows(llm, 80, fail)
    assert tokens == plain_tokens
    assert np.flatnonzero((logits != plain).any(1)).tolist() == []
    assert llm.draft_model.stats.failures == 1


@pytest.mark.parametrize("saved_by", ["a draft", "a plain Llama"])
def test_a_loaded_state_is_evaluated_again_as_it_was(llama: Make, plant: Plant, saved_by: str) -> None:
    """Where memory is lost behind load_state, and another text was there before it."""
    files = plant(**BY_CONTEXT, quant="F16")
    text = np.random.default_rng(4).integers(260, 500, 200).tolist()

    def make(draft: bool = True) -> Llama:
        return llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2) if draft else None)

    source = make(saved_by == "a draft")
    source.eval(text[:70])
    if saved_by == "a draft":
        for token in text[70:75]:
            source.eval([token])
    state = source.save_state()
    seen = []
    for lose in (False, True):
        llm = make()
        llm.eval(text[80:])
        llm.load_state(state)
        if lose:
            llm._ds4_mtp._ledger.sure = False
            llm._ds4_mtp.settle()
        assert llm._input_ids.tolist() == text[: state.n_tokens]
        llm.eval([300])
        seen.append(np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy())
    assert np.array_equal(*seen)
