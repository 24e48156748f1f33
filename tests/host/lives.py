"""What threads, many Llamas and Ctrl-C do to Llamas with drafts: ``python -m tests.host.lives CASE N TRUNK MTP``.

Each case runs in a process of its own, because what it guards against ends it, and prints a line of JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import ds4_mtp_plugin  # noqa: F401

# isort: split
from llama_cpp import Llama
from llama_cpp._logger import set_verbose

from ds4_mtp_plugin import MtpDraft
from ds4_mtp_plugin.host.wraps import session_of
from ds4_mtp_plugin.speculation import FixedDepth
from tests.fixtures import GPU_LAYERS
from tests.text import generate

N_TOKENS = 40


class Pair:
    """The two files, and what a plain Llama says of a prompt."""

    def __init__(self, trunk: str, mtp: str) -> None:
        self.trunk, self.mtp = trunk, mtp
        self._plain = self.llama(None)

    def llama(self, depth: int | None = 3, **options: Any) -> Any:
        """One that drafts, or with a depth of None a plain one."""
        draft = None if depth is None else MtpDraft(self.mtp, num_pred_tokens=depth)
        defaults = {"n_ctx": 512, "n_batch": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 1}
        defaults["n_gpu_layers"] = GPU_LAYERS
        return Llama(self.trunk, draft_model=draft, **{**defaults, **options})

    def plain(self, prompt: list[int], n: int = N_TOKENS, **sampling: Any) -> list[int]:
        self._plain.reset()
        self._plain.set_seed(1)
        return generate(self._plain, prompt, n, **sampling)


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(261, 500) for _ in range(rng.randrange(2, 150))] for _ in range(n)]


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run all at once; an exception of one is raised here."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def two_threads(pair: Pair, n: int) -> dict[str, Any]:
    """Two Llamas are made, generate n texts each, and are closed, in two threads."""
    stats: dict[int, Any] = {}
    both_are_there = threading.Barrier(2, timeout=60)
    cases = [
        [(prompt, {"temp": 0.0 if i % 2 else 0.7}) for i, prompt in enumerate(prompts(n, seed))] for seed in range(2)
    ]
    expected = [[pair.plain(prompt, **sampling) for prompt, sampling in each] for each in cases]

    def job(which: int) -> None:
        llm = pair.llama(depth=2 + which)
        both_are_there.wait()
        for (prompt, sampling), text in zip(cases[which], expected[which]):
            llm.reset()
            llm.set_seed(1)
            assert generate(llm, prompt, N_TOKENS, **sampling) == text, (which, prompt)
        stats[which] = llm.draft_model.stats
        llm.close()

    in_threads(lambda: job(0), lambda: job(1))
    return {"texts": 2 * n, "accepted": [stats[i].accepted for i in (0, 1)], "iters": [stats[i].iters for i in (0, 1)]}


def freed(pair: Pair, n: int) -> dict[str, Any]:
    """n Llamas are made, used and freed, closed or dropped in the middle of a text, while another generates."""
    (long, *others), done = prompts(9, seed=2), threading.Event()
    expected, short = pair.plain(long, 200), [pair.plain(prompt, 8) for prompt in others]
    texts = accepted = 0

    def generates() -> None:
        nonlocal texts, accepted
        llm = pair.llama()
        while not done.is_set():
            llm.reset()
            assert generate(llm, long, 200) == expected
            texts += 1
        accepted = llm.draft_model.stats.accepted
        llm.close()

    def frees() -> None:
        try:
            for i in range(n):
                llm = pair.llama(depth=1 + i % 4)
                assert generate(llm, others[i % 8], 8) == short[i % 8]
                generation = llm.generate(others[i % 8], temp=0.0)
                next(generation)
                next(generation)
                if i % 2:
                    llm.close()
                del llm, generation
        finally:
            done.set()

    in_threads(generates, frees)
    return {"freed": n, "texts": texts, "accepted": accepted}


def resident() -> int:
    """Bytes of memory that this process holds, less what the C library keeps for the next allocation."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def rounds(pair: Pair, n: int) -> dict[str, Any]:
    """Create, generate, close, n times; closed, dropped, dropped in the middle of a text, made in vain."""
    cases = prompts(8, seed=3)
    expected = [pair.plain(prompt, 8) for prompt in cases]
    memory: list[int] = []
    n_files: list[int] = []
    accepted = 0
    for i in range(n):
        prompt, text = cases[i % 8], expected[i % 8]
        llm: Any = pair.llama(depth=1 + i % 4, logits_all=i % 5 == 0)
        generation: Any = None
        if i % 7:
            assert generate(llm, prompt, 8) == text
        else:
            generation = llm.generate(prompt, temp=0.0)
            assert [next(generation) for _ in range(8)] == text
        accepted += llm.draft_model.stats.accepted
        if i % 11 == 0:
            try:
                Llama(pair.trunk, draft_model=llm.draft_model, n_ctx=512, verbose=False)
            except ValueError as err:
                assert "in use" in str(err)
        if i % 3:
            llm.close()
        llm = generation = None
        memory.append(resident())
        n_files.append(len(os.listdir("/proc/self/fd")))
    part = n // 4  # less the first, in which what is made once is made
    return {
        "rounds": n,
        "accepted": accepted,
        "first": sum(memory[part : 2 * part]) // part,
        "last": sum(memory[-part:]) // part,
        "peak": max(memory),
        "files": [n_files[0], n_files[-1]],
        "threads": len(os.listdir("/proc/self/task")),
    }


def interrupts(pair: Pair, n: int) -> dict[str, Any]:
    """n times Ctrl-C, a moment after a random token of a generation or its prompt, and another generation after it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # one that begins in the background ignores it
    llm = pair.llama(n_ctx=1024)
    rng = random.Random(4)
    cases = prompts(6, seed=4)
    expected = [pair.plain(prompt, 300) for prompt in cases]
    in_the_middle = gave_up = 0
    for _ in range(n):
        which = rng.randrange(6)
        text = expected[which]
        tokens: list[int] = []
        timer = threading.Timer(0.01 * rng.random(), os.kill, (os.getpid(), signal.SIGINT))
        begin = rng.randrange(60)
        try:
            if begin == 0:
                timer.start()
            generation = llm.generate(cases[which], temp=0.0)
            try:
                for token in generation:
                    tokens.append(token)
                    if len(tokens) == begin:
                        timer.start()
                    if len(tokens) == 300:
                        break
            finally:
                if rng.random() < 0.5:
                    generation.close()
            timer.join()
            time.sleep(0.01)  # it comes after the text, or came while the host could not be interrupted
        except KeyboardInterrupt:
            in_the_middle += len(tokens) < 300
        timer.join()
        assert tokens == text[: len(tokens)]
        # The same prompt, so that what is in memory is used again, or another one.
        which = which if rng.random() < 0.5 else rng.randrange(6)
        longer = cases[which] + (expected[which][: rng.randrange(1, 40)] if rng.random() < 0.5 else [])
        have = len(longer) - len(cases[which])
        assert generate(llm, longer, N_TOKENS) == expected[which][have : have + N_TOKENS], (which, have)
        gave_up = llm.draft_model.stats.failures
    accepted = llm.draft_model.stats.accepted
    return {"interrupts": n, "in the middle": in_the_middle, "accepted": accepted, "gave up": gave_up}


class Interruption:
    """Raises KeyboardInterrupt at the line number `at`, counted as they run, of this package's code."""

    PACKAGE = str(Path(ds4_mtp_plugin.__file__).parent)

    def __init__(self, at: int) -> None:
        self.at, self.n_lines, self.where = at, 0, ""

    def __enter__(self) -> Interruption:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.PACKAGE) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.n_lines += 1
            if self.n_lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def lines(pair: Pair, n: int) -> dict[str, Any]:
    """An interrupt at n lines of the plugin's code, spread over a generation, and another generation after each."""
    first, other = (prompt[:20] for prompt in prompts(2, seed=5))
    return interrupted_at_lines(pair, pair.llama(), first, other, n)


class Resting(FixedDepth):
    """Drafts at every other look, and rests behind those at which it does not."""

    def __init__(self, rest: int = 4) -> None:
        super().__init__(3, text=False)
        self._looks, self._rest = 0, rest

    def choose(self, room: int) -> int:
        self._looks += 1
        return super().choose(room if self._looks % 2 else 0)

    @property
    def rest(self) -> int:
        return self._rest


def rests(pair: Pair, n: int) -> dict[str, Any]:
    """The same where speculation rests."""
    first, other = (prompt[:20] for prompt in prompts(2, seed=5))
    llm = pair.llama()
    session = session_of(llm)
    assert session is not None
    session.choose_by(Resting())
    return interrupted_at_lines(pair, llm, first, other, n)


def resumed(pair: Pair, n: int) -> dict[str, Any]:
    """The same where each prompt goes on from a checkpoint of the one before."""
    first, other = ([*(261 + i * i % 239 for i in range(256)), *prompt[:20]] for prompt in prompts(2, seed=5))
    llm = pair.llama()
    return interrupted_at_lines(pair, llm, first, other, n, before=lambda: generate(llm, other, 3))


def interrupted_at_lines(
    pair: Pair,
    llm: Any,
    first: list[int],
    other: list[int],
    n: int,
    *,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    text, other_text = pair.plain(first, 80), pair.plain(other)

    def interrupted(at: int) -> Interruption:
        tokens: list[int] = []
        before()
        with Interruption(at) as interruption:
            try:
                generation = llm.generate(first, temp=0.0)
                for token in generation:
                    tokens.append(token)
                    if len(tokens) == 16:
                        generation.close()
                        break
            except KeyboardInterrupt:
                assert at
            finally:
                sys.settrace(None)
        assert tokens == text[: len(tokens)], interruption.where
        return interruption

    def goes_on(where: str) -> None:
        # The prompt grows: what is in memory is used again.
        for k in (3, 20):
            assert generate(llm, first + text[:k], 20) == text[k : k + 20], (where, k)

    n_lines = interrupted(0).n_lines
    places = set()
    for i in range(n):
        where = interrupted(1 + (i * n_lines + random.Random(i).randrange(n_lines)) // n).where
        places.add(where)
        if i % 4 == 3:
            assert generate(llm, other, N_TOKENS) == other_text, where
        else:
            goes_on(where)
    stats = llm.draft_model.stats
    counted = {"lines": n_lines, "interrupts": n, "places": len(places)}
    return {**counted, "gave up": stats.failures, "resumed": stats.resumed}


CASES: dict[str, Callable[[Pair, int], dict[str, Any]]] = {
    "two_threads": two_threads,
    "freed": freed,
    "rounds": rounds,
    "interrupts": interrupts,
    "lines": lines,
    "rests": rests,
    "resumed": resumed,
}


def main() -> None:
    case, n, trunk, mtp = sys.argv[1:]
    set_verbose(False)
    # While a Llama is made the host points the standard streams elsewhere; with two at once, or an interrupt, they may
    # stay there.
    streams = [(os.dup(fd), fd) for fd in (1, 2)]
    try:
        result = CASES[case](Pair(trunk, mtp), int(n))
    finally:
        for kept, fd in streams:
            os.dup2(kept, fd)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    print(json.dumps(result))


if __name__ == "__main__":
    main()
