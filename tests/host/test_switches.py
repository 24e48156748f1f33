"""ds4's switches and gates, and the work that is not done where nothing comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, engine, settings
from tests.fixtures.planted import BY_CONTEXT, Planted
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    def turn(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        settings.current.cache_clear()

    yield turn
    settings.current.cache_clear()


def decodes_of(monkeypatch: pytest.MonkeyPatch) -> list[engine.Context]:
    """Contexts of the binding's decodes from now on, in order."""
    contexts: list[engine.Context] = []
    decode = engine.Context.decode

    def noted(self: engine.Context, batch: engine.Batch) -> None:
        contexts.append(self)
        decode(self, batch)

    monkeypatch.setattr(engine.Context, "decode", noted)
    return contexts


def test_the_disable_switch_leaves_a_plain_llama(
    llama: Make, plant: Plant, switch: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(**BY_CONTEXT)
    switch("DS4_MTP_SPEC_DISABLE", "1")
    contexts = decodes_of(monkeypatch)
    draft = MtpDraft(files.mtp, num_pred_tokens=2)
    llm = llama(files.trunk, draft_model=draft)
    assert generate(llm, [300, 301], 60) == generate(llama(files.trunk), [300, 301], 60)
    assert contexts == [] and draft._spec is None  # no head is even loaded
    assert llm.context_params.n_rs_seq == 0  # nor can the target roll back
    assert llm.draft_model is draft


def test_the_report_switch_prints_ds4s_line(
    llama: Make, plant: Plant, switch: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files = plant()
    switch("DS4_MTP_ACCEPT_REPORT", "1")
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    generate(llm, [300], 30)
    llm.close()
    assert "mtp accept: iters=10 proposed=20 accepted=" in capsys.readouterr().err


def test_the_log_switch_prints_a_line_for_every_rejected_draft(
    llama: Make, plant: Plant, switch: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files = plant(acceptance=0.5)
    switch("DS4_MTP_SPEC_LOG", "1")
    draft = MtpDraft(files.mtp, num_pred_tokens=2)
    prompt = files.cycle[:3].tolist()
    text = generate(llama(files.trunk, draft_model=draft), prompt, 60)
    lines = [line for line in capsys.readouterr().err.splitlines() if "mtp miss" in line]
    stats = draft.stats
    full = stats.accepted_per_position[-1]
    assert len(lines) in (stats.iters - full, stats.iters - full - 1)  # the last verify may have been cut off
    fields = dict(field.split("=") for field in lines[0].split()[3:])
    assert int(fields["sampled"]) == (prompt + text)[int(fields["position"])]


@pytest.mark.parametrize("gate", [{"p_min": 1.0}, {"margin": 1e9}])
def test_a_gate_that_nothing_passes_leaves_what_is_drafted_from_the_text(
    llama: Make, plant: Plant, gate: dict[str, float]
) -> None:
    files = plant(**BY_CONTEXT)
    draft = MtpDraft(files.mtp, **gate)  # type: ignore[arg-type]
    assert generate(llama(files.trunk, draft_model=draft), [300], 60) == generate(llama(files.trunk), [300], 60)
    assert draft.stats.proposed == draft.stats.ngram_proposed


def test_the_margin_gate_lets_the_sure_drafts_pass(
    llama: Make, plant: Plant, switch: Callable[[str, str], None]
) -> None:
    files = plant(**BY_CONTEXT)
    plain = generate(llama(files.trunk), [300], 200)

    def proposed(margin: float | None = None) -> int:
        draft = MtpDraft(files.mtp, num_pred_tokens=3, margin=margin)
        assert generate(llama(files.trunk, draft_model=draft), [300], 200) == plain
        return draft.stats.proposed

    counts = [proposed(margin) for margin in (None, 0.5, 3.0)]
    assert counts[0] > counts[1] > counts[2] > 0
    switch("DS4_MTP_MIN_MARGIN", "3.0")  # the environment has the last word
    assert proposed(0.0) == counts[2]
    switch("DS4_MTP_MIN_MARGIN", "0")
    assert proposed(3.0) == counts[0]


def test_gates_have_a_range(plant: Plant) -> None:
    for bad in ({"p_min": 1.5}, {"p_min": -0.1}, {"margin": -1.0}, {"margin": float("nan")}):
        with pytest.raises(ValueError, match="MtpDraft: (p_min|margin) is"):
            MtpDraft(plant().mtp, **bad)  # type: ignore[arg-type]


def test_a_draft_ends_with_the_text(llama: Make, plant: Plant) -> None:
    """Behind an end-of-text token nothing is drafted, and nothing follows it in the text."""
    files = plant(acceptance=1.0, eos_after=40)
    draft = MtpDraft(files.mtp, num_pred_tokens=8)
    llm = llama(files.trunk, draft_model=draft)
    plain = llama(files.trunk)
    answers = [
        each.create_completion(files.cycle[:3].tolist(), max_tokens=500, temperature=0.0) for each in (plain, llm)
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[1]["choices"][0]["finish_reason"] == "stop"
    assert draft.stats.accepted == draft.stats.proposed  # the last draft was the end, not something behind it


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 7])
def test_nothing_is_drafted_beyond_what_is_wanted(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    files = plant(acceptance=1.0)
    draft = MtpDraft(files.mtp, num_pred_tokens=3)
    llm = llama(files.trunk, draft_model=draft)
    answer = llm.create_completion(files.cycle[:3].tolist(), max_tokens=max_tokens, temperature=0.0)
    assert answer["usage"]["completion_tokens"] == max_tokens
    stats = draft.stats
    assert stats.iters + stats.accepted + stats.plain == max_tokens - 1  # every row evaluated was asked for
    assert stats.accepted == stats.proposed
    generate(llm, [300], 30)  # an uncounted generation behind it is not held to that number
    assert draft.stats.iters > 6


def test_text_that_is_not_drafted_for_costs_no_head_decode(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, an app's own loop of eval and sample, a state saved and loaded: the head does nothing."""
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    contexts = decodes_of(monkeypatch)
    llm.eval(np.random.default_rng(0).integers(260, 500, 300).tolist())
    for _ in range(20):
        llm.eval([llm.sample(temp=0.8)])
    llm.load_state(llm.save_state())
    llm.reset()
    assert contexts == []


def test_the_report_of_a_generation_adds_up(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=0.7)
    draft = MtpDraft(files.mtp, num_pred_tokens=2)
    generate(llama(files.trunk, draft_model=draft), files.cycle[:3].tolist(), 101)
    stats = draft.stats
    # Each token behind the first came of a row: of one evaluated for itself, or of an accepted draft. The last token
    # may be a draft, whose own row nobody asked for.
    assert stats.plain + stats.iters + stats.accepted in (100, 101)
    assert stats.proposed == sum(stats.proposed_per_position)
    assert stats.draft_decodes == stats.proposed
