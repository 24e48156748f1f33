"""A depth that is chosen by what is measured, in a Llama: the text is plain's, whatever is chosen."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, NgramDraft, engine
from ds4_mtp_plugin.engine import Best
from ds4_mtp_plugin.host import session as session_module
from ds4_mtp_plugin.host.wraps import session_of
from ds4_mtp_plugin.speculation import N_KEEP, AdaptiveDepth, FixedDepth, NominalDepth
from tests.fixtures import GPU_LAYERS
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import BY_CONTEXT, Planted
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]

pytestmark = pytest.mark.skipif(GPU_LAYERS != 0, reason="a depth that the clock chooses is for exact text")


class Scripted(AdaptiveDepth):
    """Chooses what it is told to, in turn; "probe" for a draft that is not verified, (n, end, k) for n drafts that end
    behind the one numbered `end`, and of which k are verified."""

    def __init__(self, script: list[Any]) -> None:
        super().__init__(4)
        self._script, self.outcomes, self.times = script, [], []
        self._turn = 0

    def choose(self, room: int) -> int:
        said = self._script[self._turn % len(self._script)]
        self._turn += 1
        self.probing = said == "probe"
        said, self._end, self._k = said if isinstance(said, tuple) else (said, None, None)
        self.leads: list[float] = []
        return 0 if self.probing else min(said, room)

    def more(self, best: Best) -> bool:
        self.leads.append(best.margin)
        return len(self.leads) != self._end

    def worth(self, n: int) -> int:
        return 0 if self.probing else n if self._k is None else min(n, self._k)

    def outcome(self, position: int, right: bool) -> None:
        self.outcomes.append((position, right))

    def drafted(self, n: int, seconds: float) -> None:
        self.times.append(("drafted", n))

    def decoded(self, n_rows: int, seconds: float) -> None:
        self.times.append(("decoded", n_rows))


class Resting(Scripted):
    """As many tokens pass behind each plain decode as `rests` says."""

    rests = 0

    @property
    def rest(self) -> int:
        return self.rests

    def rested(self, n: int, each: float) -> None:
        self.times.append(("rested", n))


def script(llm: Llama, *said: Any, rest: int = 0) -> Scripted:
    session = session_of(llm)
    assert session is not None
    session._depth = depth = Resting(list(said))
    depth.rests = rest
    return depth


@pytest.mark.parametrize("said", [2, "probe"])
def test_a_cycle_takes_what_it_takes_the_app_less_what_the_drafter_takes(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    files = plant(acceptance=0.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, ngram=False))
    session, decoded, drafted = session_of(llm), [], []
    assert session is not None
    depth = script(llm, said)
    monkeypatch.setattr(depth, "decoded", lambda n_rows, seconds: decoded.append(seconds))
    monkeypatch.setattr(depth, "drafted", lambda n, seconds: drafted.append(seconds))

    def slowly(function: Callable[..., Any], by: float) -> Callable[..., Any]:
        def slow(*args: Any) -> Any:
            time.sleep(by)
            return function(*args)

        return slow

    spec = session._spec
    monkeypatch.setattr(spec, "accept", slowly(spec.accept, 0.05))
    monkeypatch.setattr(spec.drafter, "draft", slowly(spec.drafter.draft, 0.3))
    generate(llm, files.cycle[:30].tolist(), 8)
    assert min(drafted) >= 0.3
    assert statistics.median(decoded) < 0.3
    if said != "probe":
        assert min(decoded[1:]) >= 0.05  # the first has no verify behind it to close


@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 1.0}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_the_text_is_plain(llama: Make, plant: Plant, acceptance: float, sampling: dict[str, Any]) -> None:
    files = plant(**BY_CONTEXT, acceptance=acceptance)
    texts = []
    for draft in (None, MtpDraft(files.mtp), MtpDraft(files.mtp, num_pred_tokens=4, adaptive=True)):
        llm = llama(files.trunk, draft_model=draft, seed=3)
        if draft is not None and draft.num_pred_tokens == 4:
            script(llm, 3, 0, "probe", 1, 4, (4, 2, 2), "probe", 0, (3, None, 1), (2, 2, 0), 2)
        texts.append(generate(llm, files.cycle[:30].tolist(), 200, **sampling))
        if draft is not None:
            assert sum(draft.stats.cycles_per_depth) > 0
    assert texts[0] == texts[1] == texts[2]


def test_every_decode_is_timed_and_every_draft_answered_for(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=1.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=4, adaptive=True))
    depth = script(llm, 0, "probe", 2, 1)
    generate(llm, files.cycle[:30].tolist(), 15, temp=0.0)
    # A token with nothing, a token with a draft that is only compared, three tokens of a verify, two of another.
    cycle = [
        ("decoded", 1),
        ("drafted", 1),
        ("decoded", 1),
        ("drafted", 2),
        ("decoded", 3),
        ("drafted", 1),
        ("decoded", 2),
    ]
    assert depth.times == (cycle * 3)[: len(depth.times)] and len(depth.times) >= len(cycle)
    answers = [(0, True), (0, True), (1, True), (0, True)]
    assert depth.outcomes == (answers * 4)[: len(depth.outcomes)] and len(depth.outcomes) >= len(answers)


def test_behind_a_rest_drafts_are_as_right_as_ever(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=1.0)
    plain = generate(llama(files.trunk), files.cycle[:30].tolist(), 40, temp=0.0)
    draft = MtpDraft(files.mtp, num_pred_tokens=4, adaptive=True, ngram=False)
    llm = llama(files.trunk, draft_model=draft)
    depth = script(llm, 0, 2, rest=3)
    assert generate(llm, files.cycle[:30].tolist(), 40, temp=0.0) == plain
    looked = [each for each in depth.times if each[0] != "drafted"]
    assert looked[:6] == [("decoded", 1), ("rested", 3), ("decoded", 3)] * 2
    right = [(0, True), (1, True)]
    assert depth.outcomes == (right * 8)[: len(depth.outcomes)] and len(depth.outcomes) > 8
    assert draft.stats.plain >= 4 * (draft.stats.iters - 1)


@pytest.mark.parametrize(("acceptance", "rested"), [(1.0, []), (0.0, [("rested", 3)])])
def test_a_draft_that_was_right_ends_a_rest(llama: Make, plant: Plant, acceptance: float, rested: Any) -> None:
    files = plant(acceptance=acceptance)
    depth = script(llm := llama(files.trunk, draft_model=MtpDraft(files.mtp, ngram=False)), "probe", 2, rest=3)
    generate(llm, files.cycle[:30].tolist(), 40, temp=0.0)
    looked = [each for each in depth.times if each[0] != "drafted"]
    assert looked[:3] == [("decoded", 1), *rested, ("decoded", 3), ("decoded", 1)][:3]


def test_a_rest_ends_with_what_ends_the_text_as_it_is(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=1.0)
    prompt = files.cycle[:30].tolist()

    def cut(llm: Llama) -> None:
        llm.n_tokens -= 2
        llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1)

    other = llama(files.trunk)
    other.eval([*range(10), *range(10), *range(20)])
    state = other.save_state()

    def reload(llm: Llama) -> None:
        llm.load_state(state)
        for token in (0, 1):
            llm.eval([token])
        if (session := session_of(llm)) is not None:  # of the text that was loaded
            assert list(session._spec.ready(0, llm.n_tokens, 2, 3).tokens) == [3, 4, 5]

    def again(llm: Llama) -> None:
        llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
        llm.eval(files.cycle[500:540].tolist())

    def some(llm: Llama) -> None:
        llm.eval([3])

    def several(llm: Llama) -> None:
        llm.eval([3, 4])

    def without(llm: Llama) -> None:
        llm.draft_model, draft = None, llm.draft_model
        some(llm)
        llm.draft_model = draft

    for change in (cut, reload, again, some, several, without):
        texts, rights = [], []
        for draft in (None, MtpDraft(files.mtp, num_pred_tokens=4, adaptive=True)):
            llm = llama(files.trunk, draft_model=draft)
            depth = None if draft is None else script(llm, 0, 2, rest=4)
            text = generate(llm, prompt, 3, temp=0.0)  # amid a rest
            plain = 0 if draft is None else draft.stats.plain
            change(llm)
            if depth is not None and draft is not None:
                assert draft.stats.plain == plain  # what the app evaluates is no token of a generation
                assert depth.outcomes == [] and depth.times[0] == ("decoded", 1)
            text += generate(llm, [*llm.input_ids[: llm.n_tokens].tolist(), text[-1]], 60, temp=0.0)
            texts.append(text)
            rights = [] if depth is None else [right for _, right in depth.outcomes]
        assert texts[0] == texts[1] and draft is not None and draft.stats.failures == 0, change
        assert len(rights) > 8 and rights.count(False) <= 2, change


def test_a_draft_of_no_tokens_rests(llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    files, looks = plant(acceptance=1.0), []
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=0))
    session = session_of(llm)
    assert session is not None
    speculate = session._speculate
    monkeypatch.setattr(session, "_speculate", lambda *args: looks.append(args) or speculate(*args))
    generate(llm, files.cycle[:30].tolist(), 80, temp=0.0)
    assert 0 < len(looks) < 25


def test_a_text_that_is_cut_amid_a_rest(llama: Make, tmp_path: Path) -> None:
    family = plant_family(tmp_path, "glm4moe")  # whose memory removes any row
    depth = script(llm := llama(family.trunk, draft_model=MtpDraft(ngram=False)), 0, 2, rest=4)
    tokens = llm.generate(family.prompt(30), temp=0.0)
    for _ in range(4):
        next(tokens)
    llm.n_tokens -= 2
    llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1)
    for _ in range(20):
        next(tokens)
    looked = [each for each in depth.times if each[0] != "drafted"]
    assert looked[:3] == [("decoded", 1), ("rested", 2), ("decoded", 1)]
    assert looked[3:7] == [("rested", 4), ("decoded", 1), ("rested", 4), ("decoded", 3)]


def test_a_rest_is_no_longer_than_rows_can_be_kept(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=1.0)
    depth = script(llm := llama(files.trunk, draft_model=MtpDraft(files.mtp)), 0, rest=50)
    generate(llm, files.cycle[:30].tolist(), 30, temp=0.0)
    assert depth.times[:2] == [("decoded", 1), ("rested", N_KEEP - 1)]


def test_a_decode_that_fails_amid_a_rest_is_the_apps(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(acceptance=1.0)
    prompt = files.cycle[:30].tolist()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=4, adaptive=True))
    expected = generate(llm, prompt, 60, temp=0.0)
    script(llm, 0, 2, rest=4)
    text = generate(llm, prompt, 3, temp=0.0)  # amid a rest
    decode = llm._ctx.decode

    def failing(*args: Any) -> None:
        decode(*args)
        raise RuntimeError("of the app")

    monkeypatch.setattr(llm._ctx, "decode", failing)
    with pytest.raises(RuntimeError, match="of the app"):
        llm.eval(text[2:])
    monkeypatch.undo()
    llm.eval(text[2:])  # what the failed one left in memory would be in the way
    text.append(llm.sample(temp=0.0))
    assert text == expected[:4]
    assert generate(llm, [*prompt, *text], 56, temp=0.0) == expected[4:]


def test_a_draft_ends_where_the_next_is_not_worth_it_and_only_what_is_worth_it_is_verified(
    llama: Make, plant: Plant
) -> None:
    files = plant(acceptance=1.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=4, adaptive=True))
    depth = script(llm, (4, 3, 2), (4, 1, 0))
    generate(llm, files.cycle[:30].tolist(), 9, temp=0.0)
    # Three are made and two verified; then one is made, which is not verified, yet answered for.
    cycle = [("drafted", 3), ("decoded", 3), ("drafted", 1), ("decoded", 1)]
    assert depth.times[:8] == cycle * 2
    assert depth.outcomes[:6] == [(0, True), (1, True), (0, True)] * 2
    assert len(depth.leads) in (1, 3) and all(0 < lead < 1000 for lead in depth.leads)


def test_a_wrong_draft_is_answered_for_where_it_was_only_compared_too(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=0.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp))
    depth = script(llm, "probe", 2)
    generate(llm, files.cycle[:30].tolist(), 9, temp=0.0)
    assert set(depth.outcomes) == {(0, False)} and len(depth.outcomes) == 8


def test_a_comparison_that_a_generation_did_not_live_to_see_is_forgotten(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=1.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp))
    depth = script(llm, "probe")
    seen, sample = 0, llm.sample

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise KeyboardInterrupt  # before the token comes that the draft is to be compared with
        return sample(*args, **kwargs)

    llm.sample = interrupted
    with pytest.raises(KeyboardInterrupt):
        generate(llm, files.cycle[:30].tolist(), 10, temp=0.0)
    llm.sample = sample
    answered = len(depth.outcomes)
    assert seen == 4 and len(depth.times) > answered
    depth._script = [0]
    generate(llm, files.cycle[100:140].tolist(), 5, temp=0.0)
    assert len(depth.outcomes) == answered


def test_what_is_asked_for_is_what_is_done(llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    files = plant(acceptance=1.0)

    def chosen(**options: Any) -> int | None:
        """The greatest depth that is chosen, None for a fixed one."""
        session = session_of(llama(files.trunk, draft_model=MtpDraft(files.mtp, **options)))
        assert session is not None
        return None if isinstance(session._depth, FixedDepth) else session._depth.n_max

    assert chosen() == chosen(adaptive=True) == 3
    assert chosen(num_pred_tokens=5) is None
    assert chosen(num_pred_tokens=5, adaptive=True) == 5
    assert chosen(adaptive=False) is None
    assert MtpDraft(files.mtp, adaptive=False).num_pred_tokens == 3
    with pytest.raises(TypeError, match="adaptive"):
        MtpDraft(files.mtp, adaptive=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("acceptance", [1.0, 0.0])
def test_where_text_is_not_exact_no_clock_decides_and_a_rerun_does_the_same(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, acceptance: float
) -> None:
    """What is accepted decides: drafts that are right are made, those that never are, are not."""
    clock = time.perf_counter
    files, runs = plant(acceptance=acceptance), []
    monkeypatch.setattr("platform.machine", lambda: "ppc64le")
    for speed in (1.0, -1.0):
        monkeypatch.setattr("time.perf_counter", lambda speed=speed: speed * clock())
        llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, ngram=False))
        session = session_of(llm)
        assert session is not None and isinstance(session._depth, NominalDepth)
        text = generate(llm, files.cycle[:30].tolist(), 120, temp=0.0)
        stats = llm.draft_model.stats
        runs.append((text, stats.plain, stats.proposed_per_position, stats.accepted_per_position))
    assert runs[0] == runs[1]
    if acceptance:
        assert stats.iters <= 40 and stats.accepted >= 80
    else:
        assert stats.iters <= 15 and stats.plain >= 100


def test_a_decode_that_is_not_done_when_it_returns_is_waited_for(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what is measured is the work, also where nobody asks for hidden rows."""
    waited, inner = 0.02, engine.Context.wait
    monkeypatch.setattr(engine.Context, "wait", lambda context: (time.sleep(waited), inner(context)))
    files = plant(acceptance=1.0)
    llm = llama(files.trunk, draft_model=NgramDraft(adaptive=True), n_ctx=1024)
    session = session_of(llm)
    assert session is not None
    generate(llm, [*files.cycle.tolist(), *files.cycle[:40].tolist()], 60, temp=0.0)
    decodes, _ = session._depth.times()
    assert len(decodes) > 1 and min(decodes.values()) >= waited


def test_a_head_that_is_never_right_is_named_once(llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_MISFIT", 20)
    files = plant(acceptance=0.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=1, adaptive=False))
    with pytest.warns(RuntimeWarning, match=r"\.gguf.*: 20 first drafts in a row were wrong, so it gains nothing"):
        generate(llm, files.cycle[:30].tolist(), 30, temp=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(llm, files.cycle[:30].tolist(), 60, temp=0.0)


def test_a_failure_while_only_comparing_goes_on_plainly(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(acceptance=1.0)
    expected = generate(llama(files.trunk), files.cycle[:30].tolist(), 20, temp=0.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp))
    script(llm, "probe")
    session = session_of(llm)
    assert session is not None

    def draft(*args: Any) -> list[int]:
        raise engine.EngineError("injected")

    monkeypatch.setattr(session._spec.drafter, "draft", draft)
    with pytest.warns(RuntimeWarning, match="drafting failed: injected"):
        assert generate(llm, files.cycle[:30].tolist(), 20, temp=0.0) == expected
