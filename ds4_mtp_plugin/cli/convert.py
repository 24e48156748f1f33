"""Make files that drafts are made with.

Of a Hugging Face checkpoint, by llama.cpp's own convert_hf_to_gguf.py: the model with its MTP head in its file, or with
--mtp or --dspark the head alone. DeepSeek-V4's head is always in a file of its own. The converter may run Python code
that the folder brings: convert what you trust.

Of antirez/ds4's own MTP file and its model (-m): the head's file as the engine reads it. No value changes, and no more
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
from . import EXIT_OK, checkpoint

HELP = "a model with its head, or the head alone, from a checkpoint or from antirez/ds4's MTP file"

_EXIT_TERMINATED = 128 + signal.SIGTERM
EXITS = {_EXIT_TERMINATED: "ended by SIGTERM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the folder of a checkpoint, or antirez/ds4's MTP file")
    parser.add_argument(
        "-o", "--outfile", type=Path, metavar="OUT", help="file to write (default: by SOURCE's name, in this folder)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT where it exists")
    parser.add_argument("-m", "--model", metavar="BASE", help="of ds4's file: GGUF of the model that it belongs to")
    group = parser.add_argument_group("of a checkpoint", "named as the converter's own")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--mtp", action="store_true", help="the MTP head alone")
    which.add_argument("--no-mtp", action="store_true", help="the model without its MTP head")
    which.add_argument("--dspark", action="store_true", help="the DSpark head alone (DeepSeek-V4 from 0731 on)")
    group.add_argument("--target-model-dir", metavar="DIR", help="folder of the checkpoint that a DSpark head is for")
    group.add_argument(
        "--outtype",
        choices=("auto", "f32", "f16", "bf16", "q8_0"),
        help="type of the weights (default: auto, 16 bits as in the checkpoint)",
    )


def do(args: argparse.Namespace) -> int:
    source = Path(args.source).expanduser()
    of_checkpoint = [name for name in ("mtp", "no_mtp", "dspark", "target_model_dir", "outtype") if getattr(args, name)]
    if source.is_dir():
        if args.model is not None:
            args.usage_error(f"-m is for antirez/ds4's MTP file, and {source} is a folder")
        return _checkpoint(source, args)
    if of_checkpoint:
        args.usage_error(f"--{of_checkpoint[0].replace('_', '-')} is for the folder of a checkpoint; {source} is none")
    if args.model is None:
        args.usage_error("of which model the head is, its file does not say: give -m BASE")
    return _ds4(source, args)


def _ds4(source: Path, args: argparse.Namespace) -> int:
    planned = ds4.plan(source, args.model)
    out = args.outfile or Path(f"{source.stem}-converted.gguf")
    with _written(out, force=args.force, n_bytes=planned.n_bytes, sources=(source, args.model)) as part:
        with open(part, "wb") as file:
            ds4.write(planned, file, _Progress(planned.n_bytes))
        gguf.check_head(part)
    print(f"{out}: {gguf.read_model(out).kind} for {args.model}, {planned.n_bytes / 1e6:,.1f} MB")
    return EXIT_OK


def _checkpoint(folder: Path, args: argparse.Namespace) -> int:
    if args.dspark != (args.target_model_dir is not None):
        args.usage_error("--dspark and --target-model-dir go together")
    checkpoint.check(folder, head=not args.no_mtp)
    what = "-MTP" if args.mtp else "-DSpark" if args.dspark else ""
    out = args.outfile or Path(f"{folder.resolve().name}{what}.gguf")
    options = [f"--{name.replace('_', '-')}" for name in ("mtp", "no_mtp", "dspark") if getattr(args, name)]
    options += ["--outtype", args.outtype] if args.outtype else []
    options += ["--target-model-dir", args.target_model_dir] if args.dspark else []
    with _written(out, force=args.force) as part:
        checkpoint.convert(folder, part, options)
    made = gguf.read_model(out)
    print(f"{out}: {made.kind} of architecture {made.architecture}, {made.n_bytes / 1e6:,.1f} MB")
    if made.kind in (gguf.HEAD, gguf.DSPARK):
        gguf.check_head(out)
    elif made.kind == gguf.TRUNK_AND_HEAD:
        gguf.check_inside(out)
        print("its head is in it: MtpDraft()")
    elif not args.no_mtp:
        print("its head goes into a file of its own: convert the folder again with --mtp (or --dspark)")
    return EXIT_OK


@contextlib.contextmanager
def _written(out: Path, *, force: bool, sources: tuple[str | Path, ...] = (), n_bytes: int = 0) -> Iterator[Path]:
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
    """What was copied, on stderr, every five seconds."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes, self._done, self._said = n_bytes, 0, time.monotonic()

    def __call__(self, n: int) -> None:
        self._done += n
        if (now := time.monotonic()) - self._said >= 5:
            self._said = now
            print(f"{self._done / 1e6:,.0f} of {self._n_bytes / 1e6:,.0f} MB", file=sys.stderr)
