"""Lays the patch series over the engine's pristine source; the result is a tree of its own.

Run by the build (vendor/CMakeLists.txt), or by hand::

    python patches/apply.py [--engine DIR] [--dest DIR]

The rules are in README.md. The applier is ours because a build machine has surely a Python, but not
surely ``git`` or ``patch`` (Windows, slim containers), and because both of those bend rules that have
to hold here: ``patch`` guesses (fuzz), and ``git apply`` skips, without a word, files that it takes
for another repository's. A hunk here goes where all of its lines are found, byte for byte, or the
build stops: at the stated line, or elsewhere if there is exactly one such place.

The tree is compared file by file and only what differs is written, so files that did not change keep
their times and the compiler is not asked about them again. Comparing takes well under a second, which
is why no stamp says "already done": a stamp can be wrong (an edit by hand, an interrupted run), a
comparison cannot.

Only the standard library is used.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
VERSION_HEADER = "src/ds4-mtp-version.h"

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_NOT_AN_EDIT = (b"new file mode", b"deleted file mode", b"rename ", b"copy ", b"old mode", b"GIT binary")


class PatchError(Exception):
    """The series cannot be applied; the message names the file and the place."""


@dataclass(frozen=True)
class Hunk:
    """One hunk of a unified diff.

    Attributes:
        header: its ``@@`` line, for messages.
        start: the index of its first line in the old file, from 0.
        old: the lines that have to be there, line ends included.
        new: the lines that take their place.
    """

    header: str
    start: int
    old: list[bytes]
    new: list[bytes]


@dataclass(frozen=True)
class Series:
    """The patch set as it lies in its folder.

    Attributes:
        diffs: (file name, content) in the order of application.
        sources: path in the engine's tree -> content, of the new files.
    """

    diffs: list[tuple[str, bytes]]
    sources: dict[str, bytes]

    @property
    def patchset(self) -> str:
        """12 hexadecimal digits that change with any diff, source, or their order."""
        digest = hashlib.sha256()
        for name, content in [*self.diffs, *sorted(self.sources.items())]:
            for part in (name.encode(), content):
                digest.update(b"%d:" % len(part) + part)
        return digest.hexdigest()[:12]


def read_series(folder: Path = HERE) -> Series:
    """Reads ``series``, the diffs that it lists, and the new files.

    Raises:
        PatchError: a listed diff is missing, or one is there and not listed.
    """
    lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for name in names:
        if not (folder / name).is_file():
            raise PatchError(f"{folder / 'series'} lists {name}, which is not there")
    unlisted = {path.name for path in folder.glob("*.patch")} - set(names)
    if unlisted:
        raise PatchError(f"{folder / 'series'} does not list {', '.join(sorted(unlisted))}")
    sources = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder and "__pycache__" not in path.parts
    }
    return Series([(name, (folder / name).read_bytes()) for name in names], sources)


def parse(diff: bytes) -> Iterator[tuple[str, list[Hunk]]]:
    """Yields (path, hunks) for each file of a unified diff, whose prose and ``git`` lines are skipped.

    Raises:
        PatchError: the diff is damaged, or does something else than edit a file.
    """
    lines = diff.splitlines(keepends=True)
    at = 0
    in_git_header = False
    while at < len(lines):
        line = lines[at]
        if line.startswith(b"diff --git "):
            in_git_header = True
        elif in_git_header and line.startswith(_NOT_AN_EDIT):
            raise PatchError(f"line {at + 1}: only edits are allowed here; see README.md on new files")
        elif line.startswith(b"--- ") and at + 1 < len(lines) and lines[at + 1].startswith(b"+++ "):
            old, new = _path(line, at), _path(lines[at + 1], at + 1)
            if old != new:
                raise PatchError(f"line {at + 1}: {old} becomes {new}; only edits are allowed here")
            hunks, at = _parse_hunks(lines, at + 2)
            in_git_header = False
            yield new, hunks
            continue
        at += 1


def _path(line: bytes, at: int) -> str:
    """The path of a ``--- a/path`` or ``+++ b/path`` line, in the engine's tree."""
    path = line[4:].split(b"\t")[0].strip().decode()
    prefix, _, rest = path.partition("/")
    if prefix not in ("a", "b") or not rest or ".." in PurePosixPath(rest).parts:
        raise PatchError(f"line {at + 1}: {path} is not a/PATH or b/PATH in the engine's tree")
    return rest


def _parse_hunks(lines: list[bytes], at: int) -> tuple[list[Hunk], int]:
    hunks: list[Hunk] = []
    while at < len(lines) and (head := _HUNK.match(lines[at])):
        header = lines[at].decode(errors="replace").strip()
        start, n_old, n_new = int(head[1]), int(head[2] or 1), int(head[4] or 1)
        old: list[bytes] = []
        new: list[bytes] = []
        at += 1
        while len(old) < n_old or len(new) < n_new:
            kind, text = (lines[at][:1], lines[at][1:]) if at < len(lines) else (b"", b"")
            if kind not in (b" ", b"-", b"+"):
                raise PatchError(f"line {at + 1}: {header} counts more lines than follow")
            bare = at + 1 < len(lines) and lines[at + 1].startswith(b"\\")
            for side in (old,) * (kind != b"+") + (new,) * (kind != b"-"):
                side.append(text.rstrip(b"\n") if bare else text)
            at += 1 + bare
        rest = lines[at] if at < len(lines) else b""
        if rest.startswith((b" ", b"-", b"+")) and not rest.startswith((b"--- ", b"-- \n")):
            raise PatchError(f"line {at + 1}: {header} counts fewer lines than follow")
        if len(old) != n_old or len(new) != n_new:
            raise PatchError(f"line {at}: {header} does not count its lines right")
        if not any(line in new for line in old):
            raise PatchError(f"line {at}: {header} has no context: make the diff with the usual three lines")
        hunks.append(Hunk(header, start - 1, old, new))
    if not hunks:
        raise PatchError(f"line {at + 1}: a file without a hunk")
    return hunks, at


def edit(content: bytes, hunks: list[Hunk]) -> bytes:
    """Applies the hunks, in order.

    Raises:
        PatchError: a hunk's lines are nowhere, or not at the stated place and in several others.
    """
    lines = content.splitlines(keepends=True)
    result: list[bytes] = []
    done = 0
    shift = 0
    for hunk in hunks:
        stated = hunk.start + shift
        length = len(hunk.old)
        places = [i for i in range(done, len(lines) - length + 1) if lines[i : i + length] == hunk.old]
        if stated not in places and len(places) != 1:
            found = f"{len(places)} places have its lines" if places else "no place has its lines"
            raise PatchError(f"{hunk.header}: not at line {stated + 1}, and {found}")
        place = stated if stated in places else places[0]
        shift = place - hunk.start
        result += lines[done:place] + hunk.new
        done = place + length
    return b"".join(result + lines[done:])


def changed_files(engine: Path, series: Series) -> dict[str, bytes]:
    """What the series makes of the engine: path -> content, of edited and of new files.

    Raises:
        PatchError: the series does not apply to this engine.
    """
    files: dict[str, bytes] = {}
    for name, diff in series.diffs:
        try:
            for path, hunks in parse(diff):
                if not (engine / path).is_file():
                    raise PatchError(f"{path}: the engine has no such file")
                content = files[path] if path in files else (engine / path).read_bytes()
                try:
                    files[path] = edit(content, hunks)
                except PatchError as error:
                    raise PatchError(f"{path}: {error}") from None
        except PatchError as error:
            raise PatchError(f"{name}: {error}") from None
    for path, content in series.sources.items():
        if (engine / path).exists():
            raise PatchError(f"{path}: the engine has this file: change it with a diff")
        files[path] = content
    files[VERSION_HEADER] = (
        "// Generated by patches/apply.py: names the patch set that this tree was built from.\n"
        f'#pragma once\n#define DS4_MTP_PATCHSET "{series.patchset}"\n'
    ).encode()
    return files


def apply(engine: Path, dest: Path, folder: Path = HERE) -> str:
    """Makes ``dest`` the engine's tree with the series applied; writes only files that differ.

    Args:
        engine: the pristine tree; it is only read.
        dest: the patched tree; files that do not belong there are removed, but a ``.git`` is left alone.
        folder: the patch set.

    Returns:
        The patch set's name, as the built library reports it.

    Raises:
        PatchError: the series does not apply; ``dest`` is then as it was.
    """
    series = read_series(folder)
    files = changed_files(engine, series)
    pristine = {path.relative_to(engine).as_posix(): path for path in engine.rglob("*") if path.is_file()}
    for name in sorted({*pristine, *files}):
        target = dest / name
        content = files[name] if name in files else pristine[name].read_bytes()
        if target.is_file() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        if name in pristine:
            shutil.copymode(pristine[name], target)
    for path in dest.rglob("*"):
        name = path.relative_to(dest).as_posix()
        if path.is_file() and name not in pristine and name not in files and not name.startswith(".git/"):
            path.unlink()
    return series.patchset


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    vendor = HERE.parent / "vendor"
    parser = argparse.ArgumentParser(description="Lay the patch series over the engine's source.")
    parser.add_argument("--engine", type=Path, default=vendor / "src", help="default: %(default)s")
    parser.add_argument("--dest", type=Path, default=vendor / "patched", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not options.engine.is_dir():
        print(f"patches/apply.py: no engine in {options.engine}: run vendor/fetch.py first", file=sys.stderr)
        return 1
    try:
        print(apply(options.engine, options.dest))
    except (PatchError, OSError) as error:
        print(f"patches/apply.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
