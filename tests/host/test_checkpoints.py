"""A prompt that begins like the one before goes on from a checkpoint, with the result that it has from its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, NgramDraft
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from tests import LONG
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, Planted
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]
TEXT = np.random.default_rng(5).integers(260, 500, 1400).tolist()

pytestmark = pytest.mark.skipif(GPU_LAYERS != 0, reason="they are for models on the CPU")


@pytest.fixture
def both(llama: Make, plant: Plant) -> tuple[Llama, Llama]:
    files = plant(**BY_CONTEXT)
    options: dict[str, Any] = {"n_batch": 256, "n_ctx": 2048}
    return (
        llama(files.trunk, **options),
        llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3), **options),
    )


def resumed(llm: Llama) -> int:
    return int(llm.draft_model.stats.resumed)


def edited(at: int, end: int = 1300) -> list[int]:
    return [*TEXT[:at], 259, *TEXT[at + 1 : end]]


def logits(llm: Llama) -> Any:
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()


@pytest.mark.parametrize(
    ("prompt", "saved"),
    [
        (edited(1250), 1024),
        (edited(1024), 1024),
        (edited(1023), 768),
        (edited(300), 256),
        (edited(255), 0),
        (TEXT[:700], 512),
        (TEXT[:769], 768),
        (TEXT[:768], 512),
        (TEXT[:20], 0),
    ],
    ids=["end", "boundary", "before it", "early", "first batch", "cut", "one more", "none more", "short"],
)
@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 0.8}], ids=["greedy", "seeded"])
def test_an_edited_prompt_gives_the_plain_text(
    both: tuple[Llama, Llama], prompt: list[int], saved: int, sampling: dict[str, float]
) -> None:
    texts = []
    for llm in both:
        llm.set_seed(7)
        generate(llm, TEXT[:1300], 20, **sampling)
        texts.append(generate(llm, prompt, 60, **sampling))
        texts[-1] += logits(llm).tolist()  # of the last token, in bits
    assert texts[0] == texts[1]
    assert resumed(both[1]) == saved


def test_prompts_in_turn_go_back_and_forth(both: tuple[Llama, Llama]) -> None:
    """An agent's: each continues, changes or shortens the one before, and what was void is not used."""
    prompts = [TEXT[:1100], edited(600), TEXT[:1100], edited(600, 900), edited(300), TEXT[:1300], TEXT[:1300]]
    texts = [[generate(llm, prompt, 12) for prompt in prompts] for llm in both]
    assert texts[0] == texts[1]
    assert resumed(both[1]) == 512 + 512 + 512 + 256 + 256 + 1280
    assert both[1].draft_model.stats.evaluated == sum(len(prompt) for prompt in prompts) - resumed(both[1])


@pytest.mark.parametrize("num_pred_tokens", [0, None])
@pytest.mark.parametrize("kind", ["head", "text"])
def test_they_are_there_with_any_draft_and_with_none(
    llama: Make, plant: Plant, kind: str, num_pred_tokens: int | None
) -> None:
    files = plant(**BY_CONTEXT)
    draft: MtpDraft | NgramDraft = NgramDraft(num_pred_tokens=num_pred_tokens)
    if kind == "head":
        draft = MtpDraft(files.mtp, num_pred_tokens=num_pred_tokens)
    texts = []
    for llm in (
        llama(files.trunk, n_batch=256, n_ctx=2048),
        llama(files.trunk, n_batch=256, n_ctx=2048, draft_model=draft),
    ):
        texts.append([generate(llm, prompt, 12) for prompt in (TEXT[:1100], edited(600), edited(300))])
    assert texts[0] == texts[1]
    assert draft.stats.resumed == 512 + 256
    assert num_pred_tokens is None or draft.stats.proposed == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_ubatch": 128},
        {"n_batch": 512},
        {"n_batch": 512, "n_ubatch": 64},
        {"flash_attn": True},
        {"swa_full": False},
    ],
    ids=["256", "256 in 128", "512", "512 in 64", "flash", "window"],
)
def test_histories_of_edits(llama: Make, plant: Plant, options: dict[str, Any]) -> None:
    """As an agent's or an editor's prompts follow each other: all logits behind them are those of a text read anew."""
    files = plant(**BY_CONTEXT)
    options = {"n_batch": 256, "n_ctx": 2048, **options}
    draft = NgramDraft(num_pred_tokens=4)
    plain, drafted = llama(files.trunk, **options), llama(files.trunk, draft_model=draft, **options)
    rng = np.random.default_rng(len(str(options)))
    texts = [TEXT[: rng.integers(600, 1300)]]
    for _ in range(LONG and 200 or 8):
        text = list(texts[rng.integers(max(0, len(texts) - 3), len(texts))])
        at = int(len(text) * rng.random() ** 0.3)  # mostly near the end
        what = rng.integers(4)
        if what == 0:
            text[at - 1] = int(rng.integers(260, 500))
        elif what == 1:
            del text[at : at + int(rng.integers(1, 300))]
        elif what == 2:
            text[at:at] = rng.integers(260, 500, rng.integers(1, 300)).tolist()
        text = text[:1500] if len(text) > 300 else TEXT[:1200]
        texts.append(text)
        n = int(rng.integers(1, 6))
        found = []
        for llm in (plain, drafted):
            found.append([generate(llm, text, n), logits(llm).tolist()])
        assert found[0] == found[1], (len(text), draft.stats.resumed)
    assert draft.stats.resumed > 256 if options.get("swa_full", True) else draft.stats.resumed == 0


def test_without_a_promise_a_prompts_end_is_gone_back_to(llama: Make, plant: Plant) -> None:
    """A chat whose last answer is dropped, or said otherwise: nothing of the prompt before it is read again."""
    files = plant(**BY_CONTEXT)
    plain = llama(files.trunk, n_batch=256, n_ctx=2048)
    draft = MtpDraft(files.mtp, exact=False)
    llm = llama(files.trunk, n_batch=256, n_ctx=2048, draft_model=draft)
    found = []
    for each in (plain, llm):
        generate(each, TEXT[:1100], 30)
        assert draft.stats.exact
        found.append([generate(each, [*TEXT[:1100], 300, *TEXT[1200:1220]], 20), logits(each)])
    assert draft.stats.resumed == 1100
    assert not draft.stats.exact
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=0.05)
    generate(llm, TEXT[:1100], 5)  # as far as the text is the one that was evaluated so
    assert draft.stats.resumed == 1100 + 1024


def test_a_chat_whose_reasoning_is_dropped(llama: Make) -> None:
    """Each turn's prompt leaves out what the model thought before its last answer."""
    rules = "Answer in one line. " * 60
    texts, draft = [], MtpDraft(HEAD)
    for options in ({}, {"draft_model": draft}):
        llm = llama(BASE, n_batch=256, n_ctx=2048, **options)
        messages: list[Any] = [{"role": "system", "content": rules}]
        texts.append([])
        for turn in range(4):
            messages.append({"role": "user", "content": f"Question {turn}: what does this function return?"})
            answer = llm.create_chat_completion(messages, max_tokens=40, temperature=0.0)
            texts[-1].append(answer["choices"][0]["message"]["content"])
            messages.append({"role": "assistant", "content": texts[-1][-1][-20:]})
    assert texts[0] == texts[1]
    assert draft.stats.resumed >= 3 * 256


def test_who_looks_behind_a_reset_finds_memory_cleared(both: tuple[Llama, Llama]) -> None:
    sizes = []
    for llm in both:
        llm.eval(TEXT[:600])
        llm.reset()
        sizes.append(llm._ctx.get_state_size())
        llm.reset()
        llm.eval(edited(550, 600))
        sizes.append(llm.save_state().llama_state_size)
    assert sizes[:2] == sizes[2:]
    assert resumed(both[1]) == 0


def clear(llm: Llama) -> None:
    llm._ctx.kv_cache_clear()


def clear_natively(llm: Llama) -> None:
    llama_cpp.llama_memory_clear(llm._ctx.memory, True)


def remove(llm: Llama) -> None:
    llm._ctx.kv_cache_seq_rm(-1, 0, -1)


def load(llm: Llama) -> None:
    other = TEXT[700:]
    llm.reset()
    llm.eval(other)
    state = llm.save_state()
    llm.reset()
    llm.eval(TEXT[:1300])
    llm.load_state(state)


def decode(llm: Llama) -> None:
    """Of a picture, say: another text in memory than the Llama's."""
    batch = llama_cpp._internals.LlamaBatch(n_tokens=4, embd=0, n_seq_max=1)
    batch.set_batch([310, 311, 312, 313], llm.n_tokens, False)
    assert llama_cpp.llama_decode(llm.ctx, batch.batch) == 0


@pytest.mark.parametrize("disturb", [clear, clear_natively, remove, load, decode])
@pytest.mark.parametrize("after_reset", [False, True], ids=["before the reset", "behind it"])
def test_what_memory_no_longer_holds_is_not_gone_back_to(
    both: tuple[Llama, Llama], disturb: Callable[[Llama], None], after_reset: bool
) -> None:
    plain, llm = both
    llm.eval(TEXT[:1300])
    if after_reset:
        end = llm.n_tokens
        llm.reset()
        if disturb is decode:
            llm.n_tokens = end
    disturb(llm)
    llm.reset()
    plain.eval(edited(1250))
    llm.eval(edited(1250))
    np.testing.assert_array_equal(logits(llm), logits(plain))
    assert resumed(llm) == 0


def test_a_checkpoint_that_cannot_be_loaded_costs_time_alone(
    both: tuple[Llama, Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, llm = both
    llm.eval(TEXT[:1300])
    target = llm._ds4_mtp._spec.target
    load = target.load_partial
    monkeypatch.setattr(target, "load_partial", lambda seq_id, data, n: load(seq_id, data[: len(data) // 2], n))
    assert generate(llm, edited(1250), 40) == generate(plain, edited(1250), 40)
    assert resumed(llm) == 0
    monkeypatch.undo()
    assert generate(llm, edited(1200), 40) == generate(plain, edited(1200), 40)
    assert resumed(llm) == 1024


@pytest.mark.parametrize(
    ("draft", "options"),
    [({"checkpoints_mb": 0}, {}), ({}, {"logits_all": True}), ({}, {"n_batch": 100})],
    ids=["turned off", "logits_all", "another batch"],
)
def test_where_there_are_none(llama: Make, plant: Plant, draft: dict[str, int], options: dict[str, Any]) -> None:
    files = plant(**BY_CONTEXT)
    options = {"n_batch": 256, "n_ctx": 2048, **options}
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2, **draft), **options)
    plain = llama(files.trunk, **options)
    for prompt in (TEXT[:1300], edited(1250)):
        assert generate(llm, prompt, 20) == generate(plain, prompt, 20)
    assert resumed(llm) == 0
