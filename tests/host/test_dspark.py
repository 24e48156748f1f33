"""A DSpark head in a Llama: the text is plain's, a draft what the committed rows make it, whatever was between."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, cli, engine
from ds4_mtp_plugin.gguf import DSPARK, check_head, check_pair, read_model
from ds4_mtp_plugin.host import opening
from ds4_mtp_plugin.host.session import SINGLE_ROWS
from ds4_mtp_plugin.host.wraps import session_of
from ds4_mtp_plugin.speculation import DsparkDrafter, FixedDepth
from tests.fixtures import GPU_LAYERS
from tests.fixtures.dspark_gguf import N_BLOCK, write_dspark
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import BY_CONTEXT, SMALL, TINY, Planted
from tests.text import check_plain, generate, text_and_logits

Make = Callable[..., Llama]
Plant = Callable[..., Planted]


@pytest.fixture
def files(plant: Plant) -> Planted:
    return plant(**BY_CONTEXT)


@pytest.fixture
def head(files: Planted, tmp_path: Path) -> Path:
    return write_dspark(tmp_path / "dspark.gguf", files, TINY, noise=0.1)


@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 1.0}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("options", [{"num_pred_tokens": 1}, {"num_pred_tokens": 4}, {}], ids=["1", "4", "automatic"])
@pytest.mark.parametrize("n_prompt", [30, 700])
def test_text_and_logits_are_plain(
    llama: Make, files: Planted, head: Path, options: dict[str, Any], sampling: dict[str, Any], n_prompt: int
) -> None:
    found = []
    for draft in (None, MtpDraft(head, **options)):
        llm = llama(files.trunk, draft_model=draft, seed=5)
        prompt = np.resize(files.cycle, n_prompt).tolist()
        found.append(text_and_logits(llm, prompt, 150, **sampling))
    assert draft is not None and draft.stats.failures == 0
    assert draft.adaptive or draft.stats.accepted > 0  # on a busy machine drafts may not pay
    assert draft.stats.exact or GPU_LAYERS != 0
    check_plain(*found, exact=draft.stats.exact)


def test_a_block_is_drafted_in_one_decode(llama: Make, files: Planted, head: Path) -> None:
    draft = MtpDraft(head, adaptive=False)
    assert draft.num_pred_tokens == N_BLOCK and repr(MtpDraft(head)) == f"MtpDraft({str(head)!r})"
    llm = llama(files.trunk, draft_model=draft)
    rows, injected = llm._ds4_mtp._spec.drafter._rows, []
    setting = rows.set
    rows.set = lambda tokens, *args: (injected.append(len(tokens)), setting(tokens, *args))[1]
    generate(llm, files.cycle[:30].tolist(), 200)
    stats = draft.stats
    assert injected[0] == 30 and max(injected[1:]) <= N_BLOCK + 1
    # One to inject the rows of the cycle before, one for the block.
    assert stats.draft_decodes == 2 * stats.iters
    assert 0.35 < stats.rate_per_position[0] < 1 and 0 < stats.rate_per_position[4] < stats.rate_per_position[1]


def test_a_draft_is_what_the_committed_rows_make_it(llama: Make, files: Planted, tmp_path: Path) -> None:
    """Behind drafts that were taken and drafts that were not, and rows that went out of the window."""
    head = write_dspark(tmp_path / "noisy.gguf", files, TINY, noise=0.3)
    drafted: dict[int, list[int]] = {}

    def watched(llm: Llama) -> Llama:
        spec = llm._ds4_mtp._spec  # type: ignore[attr-defined]
        inner = spec.draft

        def draft(seq_id: int, n_past: int, *args: Any) -> list[int]:
            drafts: list[int] = inner(seq_id, n_past, *args)
            drafted[n_past] = drafts
            return drafts

        spec.draft = draft
        return llm

    prompt = files.cycle[:30].tolist()
    llm = watched(llama(files.trunk, draft_model=MtpDraft(head, adaptive=False, checkpoints_mb=0)))
    assert isinstance(llm._ds4_mtp._spec.drafter, DsparkDrafter)  # type: ignore[attr-defined]
    text = [*prompt, *generate(llm, prompt, 400)]
    of_run, same, as_moved = dict(drafted), 0, 0
    positions = sorted(of_run)[5::12]
    for n_past in positions:
        fresh = watched(llama(files.trunk, draft_model=MtpDraft(head, adaptive=False, checkpoints_mb=0)))
        drafted.clear()
        fresh.eval(prompt)
        for i in range(len(prompt), n_past, SINGLE_ROWS):  # as in the run: in larger batches rows round otherwise
            fresh.eval(text[i : min(i + SINGLE_ROWS, n_past)])
        generate(fresh, text[:n_past], 2)
        same += drafted[n_past] == of_run[n_past]
        # What a few other rows, well within the window, make of it.
        drafted.clear()
        generate(fresh, [*text[: n_past - 6], *text[5:10], *text[n_past - 1 : n_past]], 2)
        as_moved += drafted.get(n_past) == of_run[n_past]
    assert len(positions) > 12
    assert same >= len(positions) - 1  # the head, too, is shown many rows at once
    assert as_moved < 2 * len(positions) / 3


@pytest.mark.skipif(GPU_LAYERS != 0, reason="the figures are of CPUs")
@pytest.mark.parametrize(("noise", "accepted"), [(0.02, 213), (0.1, 189), (0.2, 79), (0.3, 45)])
def test_as_many_drafts_are_right_as_llama_cpps_server_finds(
    llama: Make, files: Planted, tmp_path: Path, noise: float, accepted: int
) -> None:
    """``llama-server --spec-type draft-dspark --spec-draft-n-max 5`` on these files and this prompt, 300 tokens."""
    draft = MtpDraft(write_dspark(tmp_path / "h.gguf", files, TINY, noise=noise), adaptive=False)
    generate(llama(files.trunk, draft_model=draft), files.cycle[:40].tolist(), 300)
    assert abs(draft.stats.accepted - accepted) <= 3  # some CPUs decide a near tie otherwise


def test_a_head_that_fell_far_behind_is_given_few_rows(
    llama: Make, files: Planted, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = llama(files.trunk, draft_model=MtpDraft(head, ngram=False))
    session = session_of(llm)
    assert session is not None
    context, rows = session._spec.drafter._context, []  # type: ignore[attr-defined]
    decode = context.decode

    def noted(batch: engine.Batch) -> None:
        rows.append(int(batch.struct.n_tokens))
        decode(batch)

    monkeypatch.setattr(context, "decode", noted)
    turns = iter([2, *[0] * 5, 2, *[0] * 40, 2, *[0] * 200])
    depth = FixedDepth(2)
    monkeypatch.setattr(depth, "choose", lambda room: min(room, next(turns)))
    monkeypatch.setattr(depth, "take", lambda rates: 0)
    session.choose_by(depth)
    generate(llm, files.cycle[:30].tolist(), 100)
    injected = [n for n in rows if n != N_BLOCK]
    assert len(rows) == 6 and injected[0] == 30
    assert 5 < injected[1] < 9  # the verified ones among them
    assert injected[2] == 15


def test_confidence_ends_a_draft(llama: Make, files: Planted, head: Path) -> None:
    lengths = []
    for p_min in (0.0, 0.2, 0.9):
        draft = MtpDraft(head, num_pred_tokens=5, p_min=p_min)
        llm = llama(files.trunk, draft_model=draft)
        generate(llm, files.cycle[:30].tolist(), 100)
        lengths.append(draft.stats.proposed / max(1, draft.stats.iters + draft.stats.plain))
    assert lengths[0] > lengths[1] > lengths[2]


def test_a_head_that_fails_to_open_leaves_nothing_on(
    llama: Make, files: Planted, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise engine.EngineError("of the test")

    monkeypatch.setattr(opening, "DsparkDrafter", fail)
    with pytest.warns(RuntimeWarning, match="of the test"):
        llm = llama(files.trunk, draft_model=MtpDraft(head))
    generate(llm, files.cycle[:30].tolist(), 3)
    target = engine.Context(opening.library(), llm._ctx.ctx, owned=False)
    target._layers = (1,)
    with pytest.raises(engine.NoSuchRow):
        target.hidden_rows(0, 1)


def test_memory_does_not_grow(llama: Make, files: Planted, head: Path) -> None:
    llm = llama(files.trunk, draft_model=MtpDraft(head, adaptive=False), n_ctx=512)
    peaks = []
    for _ in range(8):
        generate(llm, files.cycle[:30].tolist(), 400)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert llm.draft_model.stats.iters > 800
    assert peaks[-1] - peaks[1] < 8  # megabytes


def test_states_and_the_next_prompt(llama: Make, files: Planted, head: Path) -> None:
    prompt = files.cycle[:80].tolist()
    plain, ours = (llama(files.trunk, draft_model=draft) for draft in (None, MtpDraft(head, num_pred_tokens=3)))
    texts = []
    for llm in (plain, ours):
        first = generate(llm, prompt, 30)
        state = llm.save_state()
        on = generate(llm, [*prompt, *first], 30)
        llm.load_state(state)
        texts.append((first, on, generate(llm, [*prompt, *first], 30), generate(llm, prompt[10:], 30)))
    assert texts[0] == texts[1]
    assert ours.draft_model.stats.failures == 0


def test_the_file_says_what_it_is(
    files: Planted, head: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, plant: Plant
) -> None:
    found = check_head(head)
    assert found.kind == DSPARK and found.n_block == N_BLOCK == read_model(head).n_block
    check_pair(files.trunk, head)
    assert cli.main(["doctor", str(files.trunk), str(head)]) == cli.EXIT_OK
    assert f"{head} belongs to {files.trunk}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"width 128, expected 256.*vocabulary 512, expected 2048"):
        check_pair(plant(config=SMALL).trunk, head)
    with pytest.raises(ValueError, match="a model of architecture 'glm4moe', expected 'deepseek4'"):
        check_pair(plant_family(tmp_path, "glm4moe").trunk, head)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"block_size": 0}, "block_size is 0; expected 1 to 64"),
        ({"block_size": 1000}, "block_size is 1000; expected 1 to 64"),
        ({"sample_from_anchor": False}, "sample_from_anchor is false"),
        ({"hyper_connection.count": 2}, "2 hyper-connection streams; expected 4"),
        ({"attention.sliding_window": 0}, "sliding window of 0 rows; expected 5, its block, to 4096"),
        ({"target_layers": [1, 2]}, r"target_layers is .1, 2., and fc reads 384 values"),
        ({"block_count": 4}, "lacks blk.3.attn_kv.weight"),
        ({"block_count": 100}, "block_count is 100; expected 64 at most"),
        ({"embedding_length_out": 512}, "embedding_length_out is 512; expected 128"),
        ({"attention.head_count_kv": 2}, "head_count_kv is 2; expected 1"),
        ({"block_count": 0}, "block_count is 0; expected 1 or more"),
        ({"attention.output_group_count": 0}, "output_group_count is 0; expected 1 or more"),
        ({"attention.output_group_count": 3}, "output_group_count is 3 with attention.head_count 4"),
        ({"expert_used_count": 9}, "expert_used_count is 9 with expert_count 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_that_the_engine_would_abort_on_is_refused(
    files: Planted, tmp_path: Path, keys: dict[str, Any], match: str
) -> None:
    head = write_dspark(tmp_path / "bad.gguf", files, TINY, **keys)
    with pytest.raises(ValueError, match=match):
        MtpDraft(head)


def test_layers_that_the_model_has_not_are_refused(llama: Make, files: Planted, tmp_path: Path) -> None:
    head = write_dspark(tmp_path / "bad.gguf", files, TINY, target_layers=[1, 2, 9])
    with pytest.raises(ValueError, match=r"target_layers .1, 2, 9., expected 0 to 4"):
        llama(files.trunk, draft_model=MtpDraft(head))
