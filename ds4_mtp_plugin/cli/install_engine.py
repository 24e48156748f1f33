"""Place this package's llama.cpp libraries in llama-cpp-python's own folder, or take them away again.

For programs that import llama_cpp before ds4_mtp_plugin, or that cannot be changed: the host then loads the patched
engine by itself. Its own libraries are kept beside them, and --undo puts them back as they were.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import ds4_mtp_plugin

from .doctor import host_folder

HELP = "place the patched engine in llama-cpp-python's own folder (--undo: take it away)"

# Names below a folder, each with the hash of the file's content, or with the target of the link.
_Files = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--undo", action="store_true", help="put back what was there before")


def do(args: argparse.Namespace) -> int:
    from ..host import HOST_VERSION, INSTALL_HOST

    host = host_folder()
    if host is None:
        raise RuntimeError(f"llama-cpp-python is not installed: {INSTALL_HOST}")
    if args.undo:
        print(undo(host))
        return 0
    version = metadata.version("llama-cpp-python")
    if version != HOST_VERSION:
        raise RuntimeError(
            f"llama-cpp-python {version} is installed; the engine is one of {HOST_VERSION}: {INSTALL_HOST}"
        )
    print(install(host, _engine_folder()))
    return 0


def install(host: Path, engine: Path) -> str:
    """Make `host`/lib a copy of the folder `engine`; what was done, in a line.

    ``lib`` is replaced as a whole, because libraries of two builds do not mix. What was there is moved, not copied, to
    ``lib.ds4-mtp/lib``, beside a manifest of both, written before anything is moved: wherever this is interrupted,
    `undo` and another `install` know what is what.

    Raises:
        RuntimeError: ``lib`` is not as it was left, so that its files would be lost.
        OSError: a file cannot be written or moved (no permission, or in use).
    """
    lib, kept = host / "lib", _Kept(host)
    if engine.resolve() == lib.resolve():
        raise RuntimeError(f"{engine} is llama-cpp-python's own folder: there is nothing to place in it")
    new = _listing(engine)
    if kept.exists():
        if kept.state(lib) == "installed" and kept.manifest["installed"] == new:
            return f"the engine of ds4_mtp_plugin is in {lib} already"
        undo(host)  # an older engine of ours, or an interrupted run
    try:
        kept.begin(original=_listing(lib) if lib.is_dir() else None, installed=new)
        shutil.copytree(engine, kept.new, symlinks=True)
        if _listing(kept.new) != new:
            raise RuntimeError(f"{engine} changed while it was copied; try again")
        if lib.is_dir():
            lib.rename(kept.original)
        kept.new.rename(lib)
    except BaseException:
        undo(host)
        raise
    return f"llama-cpp-python now runs on the engine of ds4_mtp_plugin, in {lib} ('ds4-mtp install-engine --undo')"


def undo(host: Path) -> str:
    """Put `host`/lib back as it was before `install`; what was done, in a line.

    Raises:
        RuntimeError: ``lib`` is neither what was installed nor what was there before.
        OSError: a file cannot be moved or removed.
    """
    lib, kept = host / "lib", _Kept(host)
    if not kept.exists():
        return f"nothing to undo: no engine was placed in {host}"
    state = kept.state(lib)
    if state == "installed":
        lib.rename(kept.removed)
        state = "gone"
    if state == "gone" and kept.manifest["original"] is not None:
        kept.original.rename(lib)
    kept.forget()
    return f"{lib} is as it was before"


class _Kept:
    """The folder beside ``lib`` with what `install` took away and a manifest of what it did."""

    def __init__(self, host: Path) -> None:
        self.folder = host / "lib.ds4-mtp"
        self.original = self.folder / "lib"
        self.new = self.folder / "new"
        self.removed = self.folder / "removed"
        self._file = self.folder / "manifest.json"
        self.manifest: dict[str, _Files | None] = {}

    def exists(self) -> bool:
        """Whether something was begun; then the manifest is read.

        Raises:
            RuntimeError: the folder holds files and no manifest of ours.
        """
        if not self.folder.exists():
            return False
        if not any(self.folder.iterdir()):
            self.folder.rmdir()  # `forget` was interrupted before its last step
            return False
        try:
            manifest = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            manifest = None
        if isinstance(manifest, dict) and {"original", "installed"} <= set(manifest):
            self.manifest = manifest
            return True
        raise RuntimeError(f"{self.folder} holds no manifest of ds4_mtp_plugin: look at it, and remove it by hand")

    def begin(self, *, original: _Files | None, installed: _Files) -> None:
        # Written elsewhere and moved: there is no folder without a whole manifest, however this ends.
        staged = self.folder.with_name(f"{self.folder.name}.{os.getpid()}")
        staged.mkdir()
        try:
            manifest = {"plugin": ds4_mtp_plugin.__version__, "original": original, "installed": installed}
            (staged / self._file.name).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            staged.rename(self.folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        self.manifest = {"original": original, "installed": installed}

    def state(self, lib: Path) -> str:
        """What ``lib`` is: "installed", "original" (not yet, or no longer, replaced), or "gone" (in between).

        A host that was installed again is "original" too, where its files are the same.

        Raises:
            RuntimeError: none of these.
        """
        found = _listing(lib) if lib.is_dir() else None
        original, moved = self.manifest["original"], self.original.is_dir()
        if moved and _listing(self.original) != original:
            raise RuntimeError(f"{self.original} was changed since it was kept: put it back, or remove it by hand")
        if found == original:
            return "original"
        if not moved and original is not None:
            raise RuntimeError(f"{self.original}, which held what was there before, is gone: nothing is touched")
        if found == self.manifest["installed"]:
            return "installed"
        if found is None:
            return "gone"
        differing = _differing(found or {}, self.manifest["installed"] or {})
        raise RuntimeError(
            f"{lib} was changed since the engine was placed there ({differing}); was llama-cpp-python installed "
            f"again? Nothing is touched. To keep it as it is, remove {self.folder}, which holds what was there before"
        )

    def forget(self) -> None:
        # The manifest goes last: half a removal is still known for what it is. rmdir takes an empty folder only.
        for folder in (self.new, self.removed, self.original):
            if folder.exists():
                shutil.rmtree(folder)
        self._file.unlink()
        self.folder.rmdir()


def _listing(folder: Path) -> _Files:
    files: _Files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            files[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            files[name] = digest.hexdigest()
    return files


def _differing(found: _Files, expected: _Files) -> str:
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _engine_folder() -> Path:
    """Where this package's libraries are; those that LLAMA_CPP_LIB_PATH names where it has none of its own.

    Raises:
        ImportError: they are not this package's.
    """
    from ..engine import LIBRARY_DIR, Library

    folder = LIBRARY_DIR
    if not any(folder.glob("*llama.*")) and os.environ.get("LLAMA_CPP_LIB_PATH"):
        folder = Path(os.environ["LLAMA_CPP_LIB_PATH"])
    libraries = [path for path in folder.glob("*llama.*") if path.suffix in (".so", ".dylib", ".dll")]
    if not libraries:
        raise RuntimeError(f"there is no engine in {folder}: reinstall ds4_mtp_plugin")
    Library(str(libraries[0]))
    return folder
