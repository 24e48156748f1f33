"""The seam: what a Llama with a draft shows is what a plain one shows, and the app's own exceptions are its own."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from ds4_mtp_plugin import MtpDraft, engine, host
from ds4_mtp_plugin.host import contract, wraps
from tests.fixtures.planted import BY_CONTEXT, Planted
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]
PROMPT = [300, 301, 302]


class Deadline(Exception):
    """What the signal handler of a job queue raises."""


@pytest.fixture
def both(llama: Make, plant: Plant) -> tuple[Llama, Llama]:
    """A plain Llama, and one that drafts: a text that a wrong evaluation changes, with many rejected drafts."""
    files = plant(**BY_CONTEXT)
    return llama(files.trunk), llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))


def into_a_verify(llm: Llama) -> tuple[Iterator[int], list[int]]:
    """A generation that stands between two tokens of which the second is evaluated already."""
    generation = llm.generate(PROMPT, temp=0.0)
    tokens = [next(generation) for _ in range(3)]
    session = wraps.session_of(llm)
    assert session is not None
    while session._verify is None or session._verify.expected is None:
        tokens.append(next(generation))
    return generation, tokens


# -- the host itself --


def test_the_host_has_what_the_contract_says(both: tuple[Llama, Llama]) -> None:
    llm = both[1]
    for protocol, real in (
        (contract.Llama, llm),
        (contract.Context, llm._ctx),
        (contract.Model, llm._model),
        (contract.ContextParams, llm.context_params),
        (contract.ModelParams, llm.model_params),
        (contract.State, llm.save_state()),
    ):
        names = {*typing.get_type_hints(protocol), *vars(protocol)} - set(vars(typing.Protocol)) - set(vars(object))
        names = {name for name in names if not name.startswith(("__", "_abc", "_is_", "_non"))}
        assert names
        assert [name for name in sorted(names) if not hasattr(real, name)] == []


def test_the_table_is_undone_and_applied_again() -> None:
    code = """
import llama_cpp
from llama_cpp import _internals
import ds4_mtp_plugin
from ds4_mtp_plugin.host import wraps
before = [vars(w.owner).get(w.name) for w in wraps._TABLE]
assert all(hasattr(f, '__wrapped__') for f in before)
wraps.undo(); wraps.undo()
after = [vars(w.owner).get(w.name) for w in wraps._TABLE]
assert [f.__wrapped__ for f, w in zip(before, wraps._TABLE) if w.name != '__reduce_ex__'] == [
    f for f, w in zip(after, wraps._TABLE) if w.name != '__reduce_ex__']
assert '__reduce_ex__' not in vars(llama_cpp.Llama) and 'draft_model' not in vars(llama_cpp.Llama)
wraps.apply(); wraps.apply()
assert not any(hasattr(vars(w.owner)[w.name].__wrapped__, '__wrapped__') for w in wraps._TABLE)
"""
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(Path(host.library_path()).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# -- exceptions of the app --


@pytest.mark.parametrize("kind", [Deadline, RuntimeError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["decode", "hidden_rows", "process", "draft", "seq_rm"])
def test_an_exception_from_outside_reaches_the_app(
    both: tuple[Llama, Llama], monkeypatch: pytest.MonkeyPatch, where: str, kind: Any
) -> None:
    plain, llm = both
    spec = llm._ds4_mtp._spec
    owner = {"process": spec.drafter, "draft": spec.drafter}.get(where, spec.target)
    original, calls = getattr(owner, where), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == 5:
            raise kind("the app's")
        return result

    monkeypatch.setattr(owner, where, interrupted)
    tokens: list[int] = []
    with pytest.raises(kind, match="the app's"):
        for token in llm.generate(PROMPT, temp=0.0):
            tokens.append(token)
    monkeypatch.undo()
    assert llm.draft_model.stats.failures == 0
    text = PROMPT + tokens
    assert generate(llm, text, 60) == generate(plain, text, 60)


def test_a_deadline_by_signal_reaches_the_app(both: tuple[Llama, Llama]) -> None:
    """The pattern of RQ's and Celery's time limits."""
    plain, llm = both

    def handler(*_: object) -> None:
        raise Deadline

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for i in range(30):
            tokens: list[int] = []
            signal.setitimer(signal.ITIMER_REAL, 0.02 + 0.0007 * i, 10)  # again: see the next test
            with pytest.raises(Deadline):
                while True:
                    llm.reset()
                    for token in llm.generate(PROMPT, temp=0.0):
                        tokens.append(token)
                        if len(tokens) == 100:
                            tokens.clear()
                            break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert llm.draft_model.stats.failures == 0
    assert generate(llm, PROMPT, 60) == generate(plain, PROMPT, 60)


def test_a_deadline_from_another_thread_reaches_the_app(both: tuple[Llama, Llama]) -> None:
    plain, llm = both
    raised = 0

    def raising(thread: int, arrived: threading.Event) -> None:
        time.sleep(0.03)
        while True:  # Python drops an exception that arrives while a generator is collected
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Deadline))
            if arrived.wait(10):
                return

    for _ in range(20):
        arrived = threading.Event()
        other = threading.Thread(target=raising, args=(threading.get_ident(), arrived))
        other.start()
        try:
            while True:
                generate(llm, PROMPT, 50)
        except Deadline:
            raised += 1
        arrived.set()
        other.join()
    assert raised == 20
    assert llm.draft_model.stats.failures == 0
    assert generate(llm, PROMPT, 60) == generate(plain, PROMPT, 60)


@pytest.mark.parametrize("at", range(8))
def test_an_abort_that_the_app_asked_for_is_no_failure(both: tuple[Llama, Llama], at: int) -> None:
    """A one-shot callback: the decode that it ends raises as in a plain run, and the text goes on from there.

    (A plain Llama goes on wrongly: it does not notice that the engine has lost its memory.)
    """
    plain = generate(both[0], PROMPT, 60)
    for llm in both:
        llm.reset()
        armed = False

        def once(_: object) -> bool:
            nonlocal armed
            was, armed = armed, False  # noqa: B023
            return was

        callback = llama_cpp.llama_cpp.ggml_abort_callback(once)
        llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
        generation, tokens = llm.generate(PROMPT, temp=0.0), []
        for _ in range(at):
            tokens.append(next(generation))
        armed = True
        with pytest.raises(RuntimeError, match="^llama_decode returned 2$"):
            while True:
                tokens.append(next(generation))
        llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.llama_cpp.ggml_abort_callback(0), None)
        assert tokens == plain[: len(tokens)]
    assert generate(both[1], PROMPT, 60) == plain
    assert both[1].draft_model.stats.failures == 0


def test_a_llama_and_a_generation_are_collected_together(plant: Plant, recwarn: pytest.WarningsRecorder) -> None:
    files = plant(**BY_CONTEXT)
    ignored: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, ignored.append
    try:
        for n in range(1, 8):
            llm: Any = Llama(
                str(files.trunk), n_ctx=256, verbose=False, draft_model=MtpDraft(files.mtp, num_pred_tokens=2)
            )
            generation = llm.generate(PROMPT, temp=0.0)
            for _ in range(n):
                next(generation)
            cycle: list[Any] = [llm, generation]
            llm.app = cycle
            cycle.append(cycle)
            del llm, generation, cycle
            gc.collect()
    finally:
        sys.unraisablehook = before
    assert ignored == []


# -- what the Llama shows between and inside tokens --


def test_a_generation_that_is_collected_amid_a_rollback_changes_nothing(
    both: tuple[Llama, Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, drafting = both
    expected = generate(plain, PROMPT, 40, temp=0.0)
    generation, tokens = into_a_verify(drafting)
    cycle: list[Any] = [generation]
    cycle.append(cycle)
    session = wraps.session_of(drafting)
    assert session is not None
    settled, evaluated_again = [], []

    def accept(verify: Any, accept: Callable[..., None] = session._spec.accept) -> None:
        gc.collect()  # closes the generation, whose end settles too
        settled.append(verify)
        accept(verify)

    monkeypatch.setattr(session._spec, "accept", accept)
    monkeypatch.setattr(session, "_reevaluate", evaluated_again.append)
    del generation, cycle
    drafting.eval(tokens[-1:])
    assert len(settled) == 1 and session._last is None and not evaluated_again
    monkeypatch.undo()
    drafting.reset()
    assert generate(drafting, PROMPT, 40, temp=0.0) == expected


def test_the_draft_is_there_while_a_token_is_made(both: tuple[Llama, Llama]) -> None:
    llm = both[1]
    draft, seen = llm.draft_model, []

    def criterion(ids: Any, logits: Any) -> bool:
        seen.append((llm.draft_model, llm.draft_model.stats.iters, llm.__getstate__()["draft_model"] is not None))
        return False

    generate(llm, PROMPT, 20, stopping_criteria=StoppingCriteriaList([criterion]))
    assert len(seen) == 20 and all(found is draft and copied for found, _, copied in seen)
    assert seen[-1][1] > 0


def test_the_rows_that_the_context_gives_are_the_last_tokens(both: tuple[Llama, Llama]) -> None:
    def seen(llm: Llama) -> list[Any]:
        found: list[Any] = []
        for i, _ in enumerate(llm.generate(PROMPT, temp=0.0)):
            rows = [llm._ctx.get_logits_ith(-1), llm._ctx.get_logits()]
            if i:
                rows.append(llm._ctx.get_logits_ith(0))  # a plain decode's only row
            found.append([np.ctypeslib.as_array(row, (llm._n_vocab,)).tobytes() for row in rows])
            sampler = llama_cpp._internals.LlamaSampler()
            sampler.add_greedy()
            found.append([sampler.sample(llm._ctx, -1), sampler.sample(llm._ctx)])
            found.append([bool(llm._ctx.get_logits_ith(j)) for j in ((1, 2, -2) if i else ())])
            found.append(llm.sample(40, 0.95, 0.05, 1.0, 0.0, idx=llm.n_tokens - 1))
            if i == 40:
                return found
        return found

    plain, drafted = (seen(llm) for llm in both)
    assert drafted == plain
    assert both[1].draft_model.stats.accepted > 5


def test_a_prompt_whose_last_token_a_verify_evaluated_is_cached(both: tuple[Llama, Llama]) -> None:
    """As after the host's own eval: the same prompt again is sampled from at once."""
    found = []
    for llm in both:
        prompt = [*PROMPT, *generate(llm, PROMPT, 12)]
        first = generate(llm, prompt, 1)
        assert llm._requires_eval is False
        found.append((first, llm.n_tokens, generate(llm, prompt, 12)))
    assert found[0] == found[1]
    assert both[1].draft_model.stats.iters > 0


def test_every_argument_of_sample_may_be_given_by_position(both: tuple[Llama, Llama]) -> None:
    found = []
    for llm in both:
        generation = llm.generate(PROMPT, temp=0.0)
        tokens = [next(generation) for _ in range(5)]
        # All sixteen, the index last.
        arguments = (40, 0.95, 0.05, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0, 0.1, 5.0, True, None, None, llm.n_tokens - 1)
        found.append((tokens, llm.sample(*arguments), [next(generation) for _ in range(10)]))
    assert found[0] == found[1]


def test_a_row_that_is_not_there_is_an_error_and_not_the_end(both: tuple[Llama, Llama]) -> None:
    llm = both[1]
    generation, tokens = into_a_verify(llm)
    for idx in (1, 2, -2, 7):
        with pytest.raises(IndexError, match=f"there is no row {idx}"):
            llm._sampler.sample(llm._ctx, idx)
    assert [*tokens, next(generation)] == generate(both[0], PROMPT, len(tokens) + 1)


def test_methods_of_the_context_see_no_unverified_row(both: tuple[Llama, Llama]) -> None:
    plain, llm = both
    generation, tokens = into_a_verify(llm)
    same = [*generate(plain, PROMPT, len(tokens))]
    assert same == tokens
    target = llm._ds4_mtp._spec.target
    assert target.seq_pos_max(0) > llm.n_tokens - 1
    assert llm._ctx.get_state_size() > 0
    assert target.seq_pos_max(0) == llm.n_tokens - 1 == plain.n_tokens - 1
    for call in (
        lambda: llm._ctx.kv_cache_seq_cp(0, 0, 0, -1),
        lambda: llm._ctx.kv_cache_seq_keep(0),
        lambda: llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1),
    ):
        generation.close()
        generation, tokens = into_a_verify(llm)
        assert target.seq_pos_max(0) > llm.n_tokens - 1
        call()
        assert target.seq_pos_max(0) == llm.n_tokens - 1
    on = [next(generation) for _ in range(30)]
    assert tokens + on == generate(plain, PROMPT, len(tokens) + 30)


def test_two_generations_of_one_llama_count_their_own_tokens(both: tuple[Llama, Llama]) -> None:
    """Interleaved, as nobody should: what comes is what comes without a draft."""

    def run(llm: Llama) -> list[str]:
        first = llm.create_completion([300, 301], max_tokens=30, temperature=0.0, stream=True)
        found = [next(first)["choices"][0]["text"] for _ in range(3)]
        second = llm.create_completion([310, 311], max_tokens=3, temperature=0.0, stream=True)
        found += [chunk["choices"][0]["text"] for chunk in second]
        return found + [chunk["choices"][0]["text"] for chunk in first]

    plain, drafted = (run(llm) for llm in both)
    assert drafted == plain


def test_an_older_generation_that_is_dropped_leaves_the_running_one_alone(both: tuple[Llama, Llama]) -> None:
    """Perhaps by another thread, amid a decode of the running one."""
    llm = both[1]
    older = llm.generate(PROMPT, temp=0.0)
    next(older)
    running, _ = into_a_verify(llm)
    session = wraps.session_of(llm)
    assert session is not None and session._verify is not None and session._verify.open
    older.close()
    assert session._verify.open and session._last is not None
    running.close()


# -- drafts that nobody could use --


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 8])
def test_nothing_is_drafted_beyond_the_tokens_wanted(llama: Make, plant: Plant, max_tokens: int) -> None:
    files = plant(acceptance=1.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    llm.create_completion(files.cycle[:4].tolist(), max_tokens=max_tokens, temperature=0.0)
    stats = llm.draft_model.stats
    # The first token comes from the prompt, the last one is not evaluated.
    assert stats.iters + stats.plain + stats.proposed == max(0, max_tokens - 1)


def test_nothing_is_drafted_behind_the_end_of_a_text(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=1.0, eos_after=20)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=8))
    text = generate(llm, files.cycle[:1].tolist(), 200)
    assert llm.token_eos() in text
    seen: list[list[int]] = []
    spec = llm._ds4_mtp._spec
    draft = spec.drafter.draft

    def noted(*args: Any) -> list[int]:
        seen.append(draft(*args))
        return seen[-1]

    spec.drafter.draft = noted
    llm.reset()
    generate(llm, files.cycle[:1].tolist(), 30)
    eos = llm.token_eos()
    ends = [drafts for drafts in seen if eos in drafts]
    assert ends and all(drafts.index(eos) == len(drafts) - 1 for drafts in ends)


def test_behind_a_loaded_state_no_stale_row_is_used(llama: Make, plant: Plant) -> None:
    """The state is as long as the text before it, so by position alone the head could go on from that one's rows."""
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    llm.eval([320, 321, 322, 323])
    state = llm.save_state()
    llm.reset()
    llm.eval([300, 301, 302, 303])
    llm.load_state(state)
    assert llm._ds4_mtp._spec.draft(0, 4, 330, 3) == []


def test_rows_that_the_llama_does_not_count_are_the_hosts_affair(both: tuple[Llama, Llama]) -> None:
    """An app decodes behind the Llama's back: the next token is refused, as in a plain run, not repaired."""
    found = []
    for llm in both:
        generation = llm.generate(PROMPT, temp=0.0)
        next(generation), next(generation)
        if (session := wraps.session_of(llm)) is not None:
            session.settle()
        batch = llama_cpp._internals.LlamaBatch(n_tokens=4, embd=0, n_seq_max=1)
        batch.set_batch([310, 311], llm.n_tokens, False)
        assert llama_cpp.llama_decode(llm.ctx, batch.batch) == 0
        with pytest.raises(RuntimeError) as err:
            next(generation)
        found.append(str(err.value))
    assert found[0] == found[1] == "llama_decode returned -1"


# -- wrong arguments, swapped drafts --


def test_wrong_arguments_raise_where_and_as_they_do_plainly(both: tuple[Llama, Llama]) -> None:
    calls: list[Callable[[Llama], object]] = [
        lambda llm: llm.generate(PROMPT, bad_kw=1),
        lambda llm: llm.generate(),
        lambda llm: llm._create_completion(PROMPT, bad_kw=1),
        lambda llm: llm.eval(["x"]),
        lambda llm: llm.eval([1.5]),
        lambda llm: next(llm.generate(["x"])),
        lambda llm: next(llm.generate([300.5])),
        lambda llm: llm.eval(),
        lambda llm: llm.sample(bad_kw=1),
        lambda llm: llm.eval([2**40]),
        lambda llm: llm.eval([-5]),
        lambda llm: llm.eval([10**6]),
    ]
    for llm in both:
        llm.eval(PROMPT)
    for call in calls:
        raised = []
        for llm in both:
            with pytest.raises(Exception) as err:
                call(llm)
            raised.append((err.type, str(err.value)))
        assert raised[0] == raised[1]
    assert generate(both[1], PROMPT, 20) == generate(both[0], PROMPT, 20)


def test_a_draft_that_would_do_nothing_is_refused(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    plain = llama(files.trunk)
    with pytest.raises(ValueError, match=r"pass it to the constructor, Llama\(\.\.\., draft_model=MtpDraft"):
        plain.draft_model = MtpDraft(files.mtp, num_pred_tokens=2)
    assert plain.draft_model is None
    plain.draft_model = lookup = LlamaPromptLookupDecoding()  # the host's own affair
    assert plain.draft_model is lookup
    draft = MtpDraft(files.mtp, num_pred_tokens=2)
    llm = llama(files.trunk, draft_model=draft)
    for other in (MtpDraft(files.mtp, num_pred_tokens=2), LlamaPromptLookupDecoding(), "x.gguf"):
        with pytest.raises(ValueError, match="was made for its own draft"):
            llm.draft_model = other
    assert llm.draft_model is draft
    with pytest.raises(TypeError, match=r"expected a draft: draft_model=MtpDraft\('x.gguf'\)"):
        llama(files.trunk, draft_model="x.gguf")


# -- the environment --


def test_the_import_leaves_the_environment_as_it_was() -> None:
    code = (
        "import os; before = dict(os.environ)\n"
        "from ds4_mtp_plugin import MtpDraft\n"
        "assert dict(os.environ) == before, set(os.environ) ^ set(before)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "MTMD_"))}
    for extra in ({}, {"LLAMA_CPP_LIB_PATH": str(Path(host.library_path()).parent)}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **extra}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_a_pickle_finds_the_library_where_nothing_of_us_is_imported(plant: Plant, tmp_path: Path) -> None:
    """As a child that multiprocessing starts anew: the host alone would not find its library there."""
    files = plant()
    llm = Llama(str(files.trunk), n_ctx=256, verbose=False, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    (tmp_path / "llama.pickle").write_bytes(pickle.dumps(llm))
    llm.close()
    code = (
        "import pickle, sys\n"
        "assert 'llama_cpp' not in sys.modules\n"
        f"llm = pickle.load(open({str(tmp_path / 'llama.pickle')!r}, 'rb'))\n"
        "print(len(llm([300], max_tokens=5)['choices'][0]['text']) >= 0, llm.draft_model.stats.depth)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "MTMD_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "2"], done.stderr


def test_a_drafters_failure_is_an_engine_error() -> None:
    assert issubclass(engine.NoSuchRow, (engine.EngineError, IndexError))
    assert not issubclass(engine.DecodeAborted, engine.EngineError)
