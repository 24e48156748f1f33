"""Mutants by the thousand, and what became of each.

>>> for result in run(range(1000), base, head, folder):
...     print(result.outcome, result.what)
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from tests.fixtures.ds4_gguf import Ds4Config
from tests.fixtures.planted import BY_CONTEXT, TINY, planted

ROOT = Path(__file__).resolve().parents[2]

#: Seconds that one mutant may take; a good file takes 0.1.
TIME = 20.0

#: What may become of a mutant. "plain dies too" and "not finite": the model's own fault, which a Llama without a draft
#: meets as well.
ALLOWED = ("text", "refused", "plain dies too", "not finite")

#: As small as the planted text allows.
CONFIG: Ds4Config = dataclasses.replace(TINY, n_vocab=320, compress_ratios=(4, 128), n_expert=4)


@dataclasses.dataclass(frozen=True)
class Result:
    seed: int
    what: str
    outcome: str
    said: str
    rss: int = 0  # of the worker behind it, in bytes


class Worker:
    """A process that takes mutants until one ends it."""

    def __init__(self, base: Path, head: Path, folder: Path) -> None:
        self._log = open(folder / "log", "a+b", buffering=0)  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", str(base), str(head), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            # A backtrace of the engine is a debugger that is started.
            env={**os.environ, "PYTHONPATH": str(ROOT), "GGML_NO_BACKTRACE": "1"},
        )
        os.set_blocking(self.fd, False)
        self._buffer = b""
        if self._line(60) != b"ready":
            raise RuntimeError(f"the worker does not start: {self.last_words()}")

    @property
    def fd(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.fileno())

    def _line(self, seconds: float) -> bytes | None:
        """The next line; None where it does not come in time; empty where the process ended."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            got = os.read(self.fd, 1 << 16)
            if not got:
                return b""
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def run(self, seed: int, drafted: bool) -> Result:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([seed, drafted]).encode() + b"\n")
        self._process.stdin.flush()
        line = self._line(TIME)
        if line:
            return Result(**json.loads(line))
        if line is None:
            return Result(seed, "", "hang", self.last_words())
        code = self._process.wait()
        died = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return Result(seed, "", died, self.last_words())

    def last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")[-1500:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                assert file is not None
                file.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()


def run(seeds: Iterable[int], folder: Path) -> Iterator[Result]:
    """Every seed's mutant in a worker, and a new worker behind each that died, hung or took memory."""
    files = planted(folder / "sound", config=CONFIG, **BY_CONTEXT)
    worker = Worker(files.trunk, files.mtp, folder)
    try:
        for seed in seeds:
            result = worker.run(seed, True)
            if result.outcome not in ALLOWED:
                worker.close()
                if result.what == "":  # it is dead: would it be without a draft?
                    with Worker(files.trunk, files.mtp, folder) as other:
                        plain = other.run(seed, False)
                    what = describe(seed, files.trunk, files.mtp, folder)
                    outcome = result.outcome if plain.what else "plain dies too"
                    result = dataclasses.replace(result, what=what, outcome=outcome)
                worker = Worker(files.trunk, files.mtp, folder)
            yield result
    finally:
        worker.close()


def describe(seed: int, base: Path, head: Path, folder: Path) -> str:
    code = "import sys; from pathlib import Path; from tests.fuzz.worker import mutate; "
    code += "print(mutate(int(sys.argv[1]), *map(Path, sys.argv[2:]))[2])"
    argv = [sys.executable, "-c", code, str(seed), str(base), str(head), str(folder)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Run mutants of GGUF files.")
    parser.add_argument("seeds", type=int, nargs="*", help="seeds to run; none for -n of them")
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("-v", action="store_true", help="every mutant, not only those that fail")
    args = parser.parse_args()
    counter: collections.Counter[str] = collections.Counter()
    failed = 0
    t0 = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for result in run(args.seeds or range(args.start, args.start + args.n), Path(folder)):
            counter[result.outcome] += 1
            bad = result.outcome not in ALLOWED
            failed += bad
            if bad or args.v:
                print(f"{result.seed}: {result.outcome}: {result.what}\n    {result.said[-600:]}", flush=True)
    print(f"{sum(counter.values())} mutants in {time.monotonic() - t0:.0f} s: {dict(counter.most_common())}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
