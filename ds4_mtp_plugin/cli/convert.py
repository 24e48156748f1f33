"""Make files that drafts are made with.

Of antirez/ds4's own MTP file and its model (-m) the head's file as the engine reads it: no value changes, and no more
is in memory than a few megabytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from .. import gguf
from ..gguf import ds4

HELP = "the file of a head, from antirez/ds4's own"

_EXIT_TERMINATED = 128 + signal.SIGTERM
EXITS = {_EXIT_TERMINATED: "ended by SIGTERM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="antirez/ds4's MTP file ('...-MTP-Q4K-Q8_0-F32.gguf')")
    parser.add_argument("-m", "--model", metavar="BASE", help="GGUF of the model that the head belongs to")
    parser.add_argument(
        "-o", "--outfile", type=Path, metavar="OUT", help="file to write (default: FILE's name, with '-converted')"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT where it exists")


def do(args: argparse.Namespace) -> int:
    source = Path(args.source).expanduser()
    if args.model is None:
        args.usage_error("of which model the head is, its file does not say: give -m BASE")
    planned = ds4.plan(source, args.model)
    out = args.outfile or Path(f"{source.stem}-converted.gguf")
    with _written(out, force=args.force, n_bytes=planned.n_bytes, sources=(source, args.model)) as part:
        with open(part, "wb") as file:
            ds4.write(planned, file, _Progress(planned.n_bytes))
        gguf.check_head(part)
    print(f"{out}: {gguf.read_model(out).kind} for {args.model}, {planned.n_bytes / 1e6:,.1f} MB")
    return 0


@contextlib.contextmanager
def _written(out: Path, *, force: bool, sources: tuple[str | Path, ...], n_bytes: int = 0) -> Iterator[Path]:
    """A file to write beside `out`, which takes its place when the block ends; otherwise nothing is left of it.

    Raises:
        FileExistsError: `out` is there, and it is not to be overwritten or is a source.
        OSError: there is no such folder, or not enough room on its disk.
    """
    if out.exists() and (not force or any(out.samefile(source) for source in sources)):
        why = "--force overwrites it" if not force else "it is what this reads: name another file with -o"
        raise FileExistsError(f"{out} exists: {why}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder")
    free = shutil.disk_usage(out.parent).free
    if free < n_bytes:
        raise OSError(f"{out} takes {n_bytes / 1e6:,.1f} MB, and {out.parent} has {free / 1e6:,.1f} MB left: make room")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with _terminated_as_an_exception():
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _terminated_as_an_exception() -> Iterator[None]:
    """So that SIGTERM leaves nothing behind either."""

    def end(*_: int | FrameType | None) -> None:
        sys.exit(_EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Progress:
    """What was copied, on stderr, once a second."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes, self._done, self._said = n_bytes, 0, time.monotonic()

    def __call__(self, n: int) -> None:
        self._done += n
        if (now := time.monotonic()) - self._said >= 1:
            self._said = now
            print(f"{self._done / 1e6:,.0f} of {self._n_bytes / 1e6:,.0f} MB", file=sys.stderr)
