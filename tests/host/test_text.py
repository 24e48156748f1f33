"""A Llama with a draft gives the text of one without, whatever is accepted and wherever it is interrupted."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama, LogitsProcessorList, StoppingCriteriaList

from ds4_mtp_plugin import MtpDraft
from tests.fixtures.planted import BY_CONTEXT, Planted
from tests.fixtures.row_engine import RowEngine
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]


@pytest.mark.parametrize("acceptance", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_greedy_text_is_plain_over_2000_tokens(llama: Make, plant: Plant, k: int, acceptance: float) -> None:
    """From the first token on, across the marks at 128, 256 and 512, where layers and windows change their state."""
    files = plant(acceptance=acceptance)
    prompt = files.cycle[:1].tolist()
    plain = generate(llama(files.trunk, n_ctx=2304), prompt, 2000)
    draft = MtpDraft(files.mtp, num_pred_tokens=k)
    assert generate(llama(files.trunk, n_ctx=2304, draft_model=draft), prompt, 2000) == plain
    assert plain == files.follow(prompt[0], 2000)
    stats = draft.stats
    assert stats.depth == k and stats.iters > 0
    achieved = files.acceptance[0]
    assert stats.accepted_per_position[0] / stats.proposed_per_position[0] == pytest.approx(achieved, abs=0.05)
    if achieved in (0.0, 1.0):  # all but what the end of the text cut off
        assert stats.proposed * achieved - stats.accepted <= k


@pytest.mark.parametrize(
    "sampling",
    [{"temp": 0.0}, {"temp": 0.8}, {"temp": 1.0, "repeat_penalty": 1.3}, {"temp": 1.0, "mirostat_mode": 2}],
    ids=["greedy", "0.8", "penalties", "mirostat"],
)
def test_text_that_depends_on_every_row_is_plain(llama: Make, plant: Plant, sampling: dict[str, Any]) -> None:
    """Here the context decides a good part of the tokens: a row left over or lost changes them within a few dozen."""
    files = plant(**BY_CONTEXT)
    prompt = np.random.default_rng(3).integers(260, 500, 200).tolist()
    plain = generate(llama(files.trunk, seed=7), prompt, 300, **sampling)
    draft = MtpDraft(files.mtp, num_pred_tokens=3)
    assert generate(llama(files.trunk, seed=7, draft_model=draft), prompt, 300, **sampling) == plain
    assert 0 < draft.stats.accepted < draft.stats.proposed


def test_processors_and_criteria_see_what_they_see_plainly(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    prompt = [300, 301, 302, 303, 304]

    def seen(llm: Llama) -> list[Any]:
        calls: list[Any] = []

        def processor(input_ids: Any, scores: Any) -> Any:
            calls.append(("processor", list(input_ids), scores.tolist()))
            return scores

        def criterion(input_ids: Any, logits: Any) -> bool:
            calls.append(("criterion", list(input_ids), logits.tolist()))
            return len(input_ids) > 60

        for token in llm.generate(
            prompt,
            temp=0.0,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]),
        ):
            calls.append(("token", token, llm.n_tokens, llm._input_ids.tolist()))
        return calls

    # With logits_all, because without the host shows a criterion an array that nobody has written to.
    drafted = llama(files.trunk, logits_all=True, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    assert seen(drafted) == seen(llama(files.trunk, logits_all=True))
    assert drafted.draft_model.stats.accepted > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [5, 6, 7, 8, 200])
def test_criteria_of_a_completion_see_verified_tokens_only(
    llama: Make, plant: Plant, stream: bool, max_tokens: int
) -> None:
    """The host asks once more behind its loop, where the rows of drafts that nobody asked for are still in memory."""
    files = plant(acceptance=1.0)
    prompt = files.cycle[:5].tolist()

    def run(llm: Llama) -> tuple[list[Any], Any]:
        calls: list[Any] = []

        def criterion(input_ids: Any, logits: Any) -> bool:
            calls.append((input_ids.tolist(), logits.tolist()))
            return False

        stop = llm.detokenize(files.follow(prompt[-1], 30)[27:29]).decode()
        answer = llm.create_completion(
            prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            stop=[stop],
            stream=stream,
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
        return calls, [chunk["choices"] for chunk in answer] if stream else answer["choices"]

    draft = MtpDraft(files.mtp, num_pred_tokens=4)
    drafted = run(llama(files.trunk, logits_all=True, draft_model=draft))
    assert drafted == run(llama(files.trunk, logits_all=True))
    assert len(drafted[0]) == min(max_tokens, 29) + 1
    assert draft.stats.accepted > 0


def test_logits_all_fills_the_same_scores(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    prompt = files.cycle[:5].tolist()
    both = [
        llama(files.trunk, logits_all=True, **options)
        for options in ({}, {"draft_model": MtpDraft(files.mtp, num_pred_tokens=3)})
    ]
    for llm in both:
        generate(llm, prompt, 100)
    plain, drafted = (llm._scores for llm in both)
    assert plain.shape == drafted.shape
    np.testing.assert_array_equal(drafted, plain)


def test_without_logits_all_no_score_is_kept(llama: Make, plant: Plant) -> None:
    files = plant()
    llm = llama(files.trunk, n_batch=64, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    assert llm._logits_all is False
    generate(llm, files.cycle[:200].tolist(), 20)
    assert llm.scores.shape[0] == 64  # the host's own size, n_batch rows, not a row for every position


@pytest.mark.parametrize("acceptance", [1.0, 0.0])
def test_a_token_writes_no_line_to_the_log(
    llama: Make, plant: Plant, capfd: pytest.CaptureFixture[str], acceptance: float
) -> None:
    """A verbose Llama, the host's default, prints what the engine debugs with; any other takes time to drop it."""
    files = plant(acceptance=acceptance)
    llm = llama(files.trunk, verbose=True, draft_model=MtpDraft(files.mtp))
    tokens = llm.generate(files.cycle[:64].tolist(), temp=0.0)
    next(tokens)
    next(tokens)
    capfd.readouterr()
    for _ in range(40):
        next(tokens)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 6])
def test_what_was_not_asked_for_leaves_no_trace(llama: Make, plant: Plant, stop_at: int) -> None:
    """A consumer stops in the middle of accepted drafts; an extended prompt then goes on as if it had not."""
    files = plant(**BY_CONTEXT)
    prompt = np.random.default_rng(4).integers(260, 500, 100).tolist()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    first = generate(llm, prompt, stop_at)
    assert llm.n_tokens == 100 + stop_at - 1  # the last token is sampled, not evaluated, as in a plain run
    assert llm._ds4_mtp._spec.target.seq_pos_max(0) == llm.n_tokens - 1
    longer = prompt + first + [400, 401]
    assert generate(llm, longer, 120) == generate(llama(files.trunk), longer, 120)


def test_an_abandoned_generation_is_settled_by_the_next_call(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    prompt = np.random.default_rng(5).integers(260, 500, 100).tolist()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    abandoned = llm.generate(prompt, temp=0.0)
    first = [next(abandoned) for _ in range(3)]
    second = generate(llm, prompt + first, 60)
    assert second == generate(llama(files.trunk), prompt + first, 60)
    abandoned.close()
    assert generate(llm, prompt + first + second, 20) == generate(llama(files.trunk), prompt + first + second, 20)


def test_an_app_may_evaluate_and_sample_between_tokens(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    prompt = np.random.default_rng(6).integers(260, 500, 50).tolist()

    def run(llm: Llama) -> list[int]:
        tokens = []
        generation = llm.generate(prompt, temp=0.0)
        for _ in range(7):
            tokens.append(next(generation))
        tokens.append(llm.sample(temp=0.0))  # the row that gave the last token, sampled again
        llm.eval([tokens[-1], 400])
        tokens.append(llm.sample(temp=0.0))
        generation.close()
        return tokens

    assert run(llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))) == run(llama(files.trunk))


def test_a_consumer_may_send_tokens(llama: Make, plant: Plant) -> None:
    """The host evaluates what is sent behind the token that it yielded, and compares it with what it samples next."""
    files = plant(**BY_CONTEXT)
    text = generate(llama(files.trunk), [300, 301, 302], 60)

    def run(llm: Llama, at: int) -> tuple[list[int], str, int]:
        generation = llm.generate([300, 301, 302], temp=0.0)
        tokens, error = [next(generation)], ""
        try:
            while len(tokens) < 40:
                if len(tokens) == at:
                    tokens.append(generation.send([400]))  # which the text does not go on with
                elif len(tokens) % 3 == 0:
                    tokens.append(generation.send([text[len(tokens)]]))
                else:
                    tokens.append(next(generation))
        except RuntimeError as err:
            error = str(err)
        generation.close()
        return tokens, error, llm.n_tokens

    for at in (99, 5, 6, 8, 9):
        draft = MtpDraft(files.mtp, num_pred_tokens=3)
        drafted = run(llama(files.trunk, logits_all=True, draft_model=draft), at)
        assert drafted == run(llama(files.trunk, logits_all=True), at)
        assert draft.stats.iters > 0
        assert (drafted[0] == text[:40]) == (at == 99)


@pytest.mark.parametrize("who", ["criterion", "consumer"])
@pytest.mark.parametrize("at", range(2, 9))
def test_who_raises_leaves_a_whole_llama(llama: Make, plant: Plant, who: str, at: int) -> None:
    files = plant(**BY_CONTEXT)

    def run(llm: Llama) -> tuple[list[int], int, int, list[int]]:
        tokens, n = [300, 301, 302], 0

        def criterion(input_ids: Any, logits: Any) -> bool:
            nonlocal n
            n += 1
            if who == "criterion" and n == at:
                raise LookupError
            return False

        with pytest.raises(LookupError):
            generation = llm.generate(tokens[:], temp=0.0, stopping_criteria=StoppingCriteriaList([criterion]))
            for token in generation:
                tokens.append(token)
                if who == "consumer" and n == at:
                    generation.throw(LookupError)
        pos_max = llama_cpp.llama_memory_seq_pos_max(llm._ctx.memory, 0)
        return tokens, llm.n_tokens, pos_max, generate(llm, [*tokens, 400], 40)

    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    assert run(llm) == run(llama(files.trunk))


def test_an_app_may_use_the_context_between_tokens(llama: Make, plant: Plant) -> None:
    """It finds the memory, and gets the rows of logits, of a run without drafts."""
    files = plant(**BY_CONTEXT)

    def run(llm: Llama, then: str, n: int) -> list[Any]:
        seen: list[Any] = []
        generation = llm.generate([300, 301, 302], temp=0.0)
        for _ in range(n):
            seen.append(next(generation))
            seen.append(np.ctypeslib.as_array(llm._ctx.get_logits(), (512,)).tolist())
        if then == "clear":
            llm._ctx.kv_cache_clear()
            return [*seen, *(next(generation) for _ in range(9))]
        if then == "remove":
            seen.append(llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1))
            seen.append(llama_cpp.llama_memory_seq_pos_max(llm._ctx.memory, 0))
            return seen
        if then == "rewind":
            llm.n_tokens -= 1
            with pytest.raises(RuntimeError) as caught:
                for _ in range(3):
                    seen.append(next(generation))
            return [*seen, str(caught.value)]
        batch = llama_cpp._internals.LlamaBatch(n_tokens=2, embd=0, n_seq_max=1)
        batch.set_batch([310, 311], llm.n_tokens, False)
        llm._ctx.decode(batch)
        llm.input_ids[llm.n_tokens : llm.n_tokens + 2] = [310, 311]
        llm.n_tokens += 2
        seen.append(llm.sample(temp=0.0))
        generation.close()
        return [*seen, *generate(llm, [*llm._input_ids.tolist(), seen[-1]], 9)]

    for then in ("clear", "remove", "rewind", "decode"):
        for n in range(3, 9):
            draft = MtpDraft(files.mtp, num_pred_tokens=3)
            assert run(llama(files.trunk, draft_model=draft), then, n) == run(llama(files.trunk), then, n)
            assert draft.stats.iters > 0


def test_generations_that_take_turns_end_as_they_do_plainly(llama: Make, plant: Plant) -> None:
    """They spoil each other's text, as in the host; the memory holds what the Llama says all the same."""
    files = plant(acceptance=1.0)

    def run(llm: Llama, n: int) -> tuple[list[int], int, int]:
        first = llm.generate([310, 311, 312], temp=0.0)
        tokens = [next(first)]
        second = llm.generate([300, 301], temp=0.0)
        tokens.append(next(second))
        second.close()
        tokens += [next(first) for _ in range(n)]
        first.close()
        return tokens, llm.n_tokens, llama_cpp.llama_memory_seq_pos_max(llm._ctx.memory, 0)

    for n in range(1, 9):
        draft = MtpDraft(files.mtp, num_pred_tokens=3)
        assert run(llama(files.trunk, draft_model=draft), n) == run(llama(files.trunk), n)
    assert draft.stats.accepted > 0


def test_states_go_from_a_llama_with_a_draft_to_one_without_and_back(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    prompt = np.random.default_rng(8).integers(260, 500, 130).tolist()
    both = [llama(files.trunk), llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))]
    texts = []
    for source in both:
        tokens = prompt + generate(source, prompt, 7)
        state = source.save_state()
        for target in both:
            generate(target, [320, 321], 5)
            target.load_state(state)
            texts.append(target.sample(temp=0.0))  # of the last row that was decoded here, a state holds none
            texts.append([tokens, *generate(target, [*tokens, 400], 40)])
    assert texts[1] == texts[3] == texts[5] == texts[7]
    assert texts[0] == texts[2] == texts[4] == texts[6]
    assert both[1].draft_model.stats.accepted > 0


def test_a_state_saved_between_tokens_is_the_verified_one(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    prompt = np.random.default_rng(8).integers(260, 500, 50).tolist()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    generation = llm.generate(prompt, temp=0.0)
    session, tokens = llm._ds4_mtp, [next(generation) for _ in range(6)]
    while session._verify is None or session._verify.expected is None:
        tokens.append(next(generation))  # into the middle of a verify's rows
    state = llm.save_state()
    n_tokens = 50 + len(tokens) - 1
    assert state.n_tokens == n_tokens
    on = [next(generation) for _ in range(60)]  # saving does not disturb it
    generation.close()
    generate(llm, [300, 301], 5)
    llm.load_state(state)
    assert session._spec.target.seq_pos_max(0) == n_tokens - 1  # not a row more than the Llama's own
    assert generate(llm, prompt + tokens, 60) == on
    assert on == generate(llama(files.trunk), prompt + tokens, 60)


def test_the_end_of_the_context_is_the_plain_one(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=1.0)
    prompt = files.cycle[:3].tolist()

    def run(llm: Llama) -> tuple[list[int], type[BaseException] | None, str]:
        tokens = []
        try:
            for token in llm.generate(prompt, temp=0.0):
                tokens.append(token)
        except Exception as err:
            return tokens, type(err), str(err)
        return tokens, None, ""

    for n_batch in (512, 8, 5, 4, 3):  # down to micro-batches that just hold a verify
        options = {"n_ctx": 256, "n_batch": n_batch}
        draft = MtpDraft(files.mtp, num_pred_tokens=3)
        drafted = run(llama(files.trunk, draft_model=draft, **options))
        assert drafted == run(llama(files.trunk, **options))
        assert len(drafted[0]) > 250 and drafted[1] is not None
        assert draft.stats.accepted > 100


@pytest.mark.parametrize(("n_batch", "n_ubatch", "depth"), [(1, 1, 0), (8, 2, 1), (8, 3, 2), (8, 8, 3), (64, 4, 3)])
def test_a_small_batch_lowers_the_depth(llama: Make, plant: Plant, n_batch: int, n_ubatch: int, depth: int) -> None:
    files = plant(acceptance=0.8)
    prompt = files.cycle[:150].tolist()
    draft = MtpDraft(files.mtp, num_pred_tokens=3)
    llm = llama(files.trunk, n_batch=n_batch, n_ubatch=n_ubatch, draft_model=draft)
    assert generate(llm, prompt, 60) == files.follow(prompt[-1], 60)
    assert draft.stats.depth == depth
    assert (draft.stats.accepted > 0) == (depth > 0)


@pytest.mark.parametrize("n_batch", [64, 8, 3])
def test_hidden_rows_are_kept_however_a_prompt_is_cut(llama: Make, plant: Plant, n_batch: int) -> None:
    """They die at the next decode, and most of a window may be older than the last one."""
    files = plant(**BY_CONTEXT)
    prompt = np.random.default_rng(7).integers(260, 500, 301).tolist()
    llm = llama(files.trunk, n_batch=n_batch, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    llm.eval(prompt[:200])
    llm.eval(prompt[200:])
    rows = llm._ds4_mtp._spec.drafter._sequences[0]
    assert (rows.lo, rows.hi) == (301 - 128, 301)
    # Cut alike, for a prompt cut otherwise may round otherwise; every row is copied before the next decode.
    with RowEngine(files.trunk, n_batch=n_batch, n_ubatch=n_batch) as engine:
        hidden = np.concatenate([engine.decode(prompt[:200])[1], engine.decode(prompt[200:], 200)[1]])
    kept = np.arange(301 - 128, 301)
    ring = kept % 128
    assert rows.tokens[ring].tolist() == [prompt[p] for p in kept]
    assert np.array_equal(rows.hidden[ring], hidden[kept])


def test_a_completion_streams_the_same_chunks(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=0.8, eos_after=90)

    def chunks(llm: Llama) -> list[Any]:
        stream = llm.create_completion(files.cycle[:4].tolist(), max_tokens=300, temperature=0.0, stream=True)
        return [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in stream]

    drafted = chunks(llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3)))
    assert drafted == chunks(llama(files.trunk))
    assert drafted[-1][1] == "stop"


def test_a_pickled_llama_drafts_again(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=0.8)
    prompt = files.cycle[:4].tolist()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    generate(llm, prompt, 30)
    copy = pickle.loads(pickle.dumps(llm))
    try:
        assert copy._logits_all is False
        assert copy.draft_model.stats.iters == 0
        assert generate(copy, prompt, 50) == files.follow(prompt[-1], 50)
        assert copy.draft_model.stats.accepted > 0
    finally:
        copy.close()


def test_a_llama_without_a_draft_is_the_hosts_own(llama: Make, plant: Plant) -> None:
    files = plant()
    llm = llama(files.trunk)
    assert "_ds4_mtp" not in llm.__dict__
    assert llm.context_params.n_rs_seq == 0


@pytest.mark.parametrize("by", ["reset", "load_state"])
def test_hidden_rows_of_another_text_are_forgotten(llama: Make, plant: Plant, by: str) -> None:
    """Behind a reset or a loaded state nothing is drafted from what was there before."""
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    llm.eval([320, 321, 322, 323])
    state = llm.save_state()
    generation = llm.generate([300, 301, 302, 303], temp=0.0)
    session, tokens = llm._ds4_mtp, [next(generation) for _ in range(3)]
    while session._verify is None or session._verify.expected is None:
        tokens.append(next(generation))
    if by == "reset":
        llm.reset()
    else:
        llm.load_state(state)
    assert session._verify is None or not session._verify.open
    spec = session._spec
    assert spec.target.seq_pos_max(0) == llm.n_tokens - 1
    assert spec.draft(0, llm.n_tokens, 300, 2) == spec.draft(0, 4, 300, 2) == []
