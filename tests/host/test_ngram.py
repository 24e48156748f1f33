"""Drafts from the text itself, in a whole Llama: on any model, and before a head."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, NgramDraft
from tests.fixtures import GPU_LAYERS
from tests.fixtures.other_gguf import write_other
from tests.fixtures.planted import BY_CONTEXT, Planted
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]

#: Tokens that repeat themselves, as those do of a text that is edited.
PROMPT = [*range(5, 60), *range(20, 50)]
SEEDED = {"temp": 0.3, "top_k": 3}


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a small model of another architecture."""
    folder = tmp_path_factory.mktemp("other")
    made: dict[str, Path] = {}

    def path(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = write_other(folder / f"{architecture}.gguf", architecture)
        return made[architecture]

    return path


@pytest.mark.parametrize("options", [{}, {"type_k": 8, "n_batch": 96}, {"swa_full": False}], ids=["", "q8_0", "window"])
@pytest.mark.parametrize("sampling", [{}, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_text_is_plain_on_any_model(
    llama: Make, other: Callable[[str], Path], architecture: str, sampling: dict[str, Any], options: dict[str, Any]
) -> None:
    texts = []
    for draft in (None, NgramDraft(num_pred_tokens=16), NgramDraft()):
        llm = llama(other(architecture), draft_model=draft, seed=3, **options)
        texts.append(generate(llm, PROMPT, 400, **sampling))
        if draft is not None and draft.num_pred_tokens == 16 and not draft.adaptive:
            stats = draft.stats
            assert stats.ngram_iters == stats.iters > 5
            assert stats.ngram_proposed == stats.proposed > stats.accepted == stats.ngram_accepted > 0
            # In a ring of a window's size rows come to lie in other cells than without a draft.
            ring = architecture == "gemma3" and "swa_full" in options
            assert stats.exact == (GPU_LAYERS == 0 and not ring) and stats.draft_decodes == 0
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.skipif(GPU_LAYERS != 0, reason="bits are the CPU's")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_row_has_the_bits_of_plain_decoding(llama: Make, other: Callable[[str], Path], architecture: str) -> None:
    rows = []
    for draft in (None, NgramDraft(num_pred_tokens=16)):
        llm = llama(other(architecture), draft_model=draft, logits_all=True)
        generate(llm, PROMPT, 500)
        rows.append(llm.scores[: len(PROMPT) + 499].copy())
        assert draft is None or draft.stats.accepted > 50
    assert np.array_equal(*rows)


@pytest.mark.parametrize("n_kept", [1, 40, 84, 85])
def test_a_prompt_is_kept_as_far_as_plain_keeps_it(llama: Make, other: Callable[[str], Path], n_kept: int) -> None:
    """Memory that takes back any row: the host keeps what a new prompt has in common with the old one."""
    texts, evaluated = [], []
    for draft in (None, NgramDraft(num_pred_tokens=16)):
        llm = llama(other("llama"), draft_model=draft)
        told: list[int] = []
        plain = llm._ctx.decode
        llm._ctx.decode = lambda batch, plain=plain, told=told: (told.append(batch.n_tokens()), plain(batch))[1]
        text = generate(llm, PROMPT, 50)
        told.clear()
        text += generate(llm, [*PROMPT[:n_kept], *range(100, 140)], 100)
        evaluated.append(told[0])
        texts.append(text)
    assert texts[0] == texts[1]
    assert evaluated[0] == evaluated[1] == 40


def test_a_state_brings_its_text(llama: Make, other: Callable[[str], Path]) -> None:
    llm = llama(other("gemma3"), draft_model=NgramDraft(num_pred_tokens=16))
    before = generate(llm, PROMPT, 200)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    draft = NgramDraft(num_pred_tokens=16)
    again = llama(other("gemma3"), draft_model=draft)
    again.load_state(state)
    follows = generate(again, [*PROMPT, *before], 30)
    assert draft.stats.accepted > 15, "the first cycles draft from what was loaded"
    assert follows == generate(llm, [*PROMPT, *before], 30)


@pytest.mark.skipif(GPU_LAYERS != 0, reason="checkpoints are for models on the CPU")
@pytest.mark.parametrize("architecture", ["mamba", "jamba"])
def test_memory_that_cannot_take_rows_back_has_checkpoints(
    llama: Make, other: Callable[[str], Path], architecture: str
) -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(5, 320, 1200).tolist()
    draft = NgramDraft()
    plain = llama(other(architecture), n_batch=256, n_ctx=2048)
    with pytest.warns(RuntimeWarning, match=r"NgramDraft: no speculation: .* cannot take back .* checkpoints"):
        llm = llama(other(architecture), n_batch=256, n_ctx=2048, draft_model=draft)
    texts: list[list[Any]] = [[], []]
    prompts = [text[:1100], [*text[:1000], 7, *text[1001:]], [*text[:600], 8, *text[601:900]], text[:1200], text[:300]]
    for prompt in (*prompts, *prompts):
        for each, found in zip((plain, llm), texts):
            found.append(generate(each, prompt, 12))
            row = each._ctx.get_logits_ith(-1)
            found.append(np.ctypeslib.as_array(row, shape=(each.n_vocab(),)).tolist())
    assert texts[0] == texts[1]
    assert draft.stats.resumed >= 768 + 512
    assert draft.stats.iters == 0 and draft.stats.exact


def test_without_checkpoints_too_the_text_is_plain(llama: Make, other: Callable[[str], Path]) -> None:
    with pytest.warns(RuntimeWarning, match="cannot take back"):
        llm = llama(other("jamba"), n_batch=100, draft_model=NgramDraft())
    assert generate(llm, PROMPT, 50) == generate(llama(other("jamba"), n_batch=100), PROMPT, 50)


@pytest.mark.skipif(GPU_LAYERS != 0, reason="other words there")
def test_exact_where_it_can_be(llama: Make, other: Callable[[str], Path], plant: Plant) -> None:
    for architecture in ("llama", "gemma3"):
        llama(other(architecture), draft_model=NgramDraft(exact=True))
        with pytest.raises(ValueError, match=r"NgramDraft: exact=True .* cannot be promised here: .*flash_attn"):
            llama(other(architecture), draft_model=NgramDraft(exact=True), flash_attn=True)
        draft = NgramDraft()
        llama(other(architecture), draft_model=draft, flash_attn=True)
        assert not draft.stats.exact
    llama(plant().trunk, draft_model=NgramDraft(exact=True), flash_attn=True)  # its attention has sinks


@pytest.mark.parametrize("sampling", [{}, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_the_text_is_plain_with_both(llama: Make, plant: Plant, acceptance: float, sampling: dict[str, Any]) -> None:
    files = plant(**BY_CONTEXT, acceptance=acceptance)
    prompt = files.cycle[:40].tolist() * 2
    texts = [generate(llama(files.trunk, seed=3), prompt, 300, **sampling)]
    for options in ({"num_pred_tokens": 2, "ngram": True}, {}, {"num_pred_tokens": 0, "ngram": True}):
        draft = MtpDraft(files.mtp, **options)
        llm = llama(files.trunk, draft_model=draft, seed=3)
        texts.append(generate(llm, prompt, 300, **sampling))
        if options:
            assert draft.stats.ngram_accepted > 0
    assert texts == [texts[0]] * 4


def test_the_head_drafts_where_the_text_is_new(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=1.0)
    draft = MtpDraft(files.mtp, num_pred_tokens=2, ngram=True)
    llm = llama(files.trunk, draft_model=draft)
    cycle = files.cycle.tolist()
    generate(llm, cycle[:30], len(cycle) - 40)
    assert draft.stats.ngram_iters == 0 and draft.stats.proposed_per_position[0] > 10
    generate(llm, cycle[:30], 2 * len(cycle))
    stats = draft.stats
    assert stats.ngram_accepted > len(cycle) / 2
    assert stats.accepted == stats.ngram_accepted + sum(stats.accepted_per_position)
    assert f"ngram={stats.ngram_accepted}/{stats.ngram_proposed}" in str(stats)


def test_options() -> None:
    assert repr(NgramDraft()) == "NgramDraft()"
    assert repr(NgramDraft(num_pred_tokens=5, report=True)) == "NgramDraft(num_pred_tokens=5, report=True)"
    assert NgramDraft().adaptive and not NgramDraft(num_pred_tokens=5).adaptive
    with pytest.raises(ValueError, match="NgramDraft: num_pred_tokens is -1, expected 0 or more"):
        NgramDraft(num_pred_tokens=-1)
    with pytest.raises(TypeError, match="NgramDraft: report is 1, expected True or False"):
        NgramDraft(report=1)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="NgramDraft.exact is fixed"):
        NgramDraft().exact = True


def test_zero_drafts_nothing(llama: Make, other: Callable[[str], Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = llama(other("llama"), draft_model=NgramDraft(num_pred_tokens=0))
        generate(llm, PROMPT, 50)
    assert llm.draft_model.stats.iters == 0


def test_pickled(llama: Make, other: Callable[[str], Path]) -> None:
    llm = llama(other("llama"), draft_model=NgramDraft(num_pred_tokens=7))
    text = generate(llm, PROMPT, 100)
    again = pickle.loads(pickle.dumps(llm))
    try:
        assert generate(again, PROMPT, 100) == text
        assert again.draft_model.stats.iters == llm.draft_model.stats.iters > 0
    finally:
        again.close()
