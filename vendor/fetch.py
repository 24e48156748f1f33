"""Gets the engine's source: the pinned sdist, verified, and of it the part that the build needs.

Run by the build (vendor/CMakeLists.txt), or by hand to be ready for a build without a network::

    python vendor/fetch.py [--dest DIR]

The sdist comes from pip, so the index, mirror, proxy and certificates are those that the user has set
up for pip. A file named by the environment variable ``DS4_MTP_ENGINE_SDIST`` is taken instead, where
it is set. Either is checked against the sha256 in ``engine.toml`` before a byte of it is used; pip
gets the hash too, and so runs nothing of an sdist that is not the pinned one.

Only the standard library is used, apart from pip, which runs as a program.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

HERE = Path(__file__).resolve().parent
SDIST_VARIABLE = "DS4_MTP_ENGINE_SDIST"
STAMP = ".fetched"

# What the libraries are built from, below vendor/llama.cpp in the sdist; its converter of checkpoints, which is
# installed beside them; and llama.cpp's own server, which benchmarks compare with. The rest (tools, tests, docs,
# models: 140 of 176 MB) stays packed.
WANTED_DIRS = (
    *("cmake", "common", "ggml", "include", "licenses", "src", "tools/mtmd", "tools/server", "vendor"),
    *("conversion", "gguf-py/gguf"),
)
WANTED_FILES = (
    "CMakeLists.txt",
    "LICENSE",
    "convert_hf_to_gguf.py",
    "gguf-py/LICENSE",
    "models/templates/deepseek-ai-DeepSeek-V4-Flash-0731.jinja",
    "models/templates/deepseek-ai-DeepSeek-V4.jinja",
    "scripts/ui-assets.cmake",
    "tools/ui/CMakeLists.txt",
    "tools/ui/ui.cpp.in",
    "tools/ui/ui.h.in",
)


class FetchError(Exception):
    """The source could not be had; the message says what to do."""


@dataclass(frozen=True)
class Pin:
    """The engine's source as ``engine.toml`` names it.

    Attributes:
        name: the sdist's project on the package index.
        version: its exact version.
        sha256: of the sdist's file, 64 hexadecimal digits.
        commit: llama.cpp's, 40 hexadecimal digits.
        licence: SPDX identifier.
    """

    name: str
    version: str
    sha256: str
    commit: str
    licence: str

    @property
    def filename(self) -> str:
        """The sdist's file name (PEP 625)."""
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"

    @property
    def engine_dir(self) -> PurePosixPath:
        """Where llama.cpp lies in the sdist."""
        return PurePosixPath(self.filename[: -len(".tar.gz")], "vendor", "llama.cpp")


def read_pin(path: Path = HERE / "engine.toml") -> Pin:
    """Reads the pin.

    The file keeps to ``key = "value"`` lines, so that Python 3.9 and 3.10, which have no tomllib, can
    read it too.

    Raises:
        FetchError: a key is missing.
    """
    values = dict(re.findall(r'^(\w+) = "(.*)"$', path.read_text(encoding="utf-8"), re.MULTILINE))
    try:
        return Pin(**{field: values[field] for field in Pin.__dataclass_fields__})
    except KeyError as missing:
        raise FetchError(f"{path} has no {missing}: restore it from the repository") from None


def fetch(dest: Path = HERE / "src", *, pin: Pin | None = None, cache: Path = HERE / "cache") -> Path:
    """Makes ``dest`` hold the pinned llama.cpp, as the sdist has it, less what the build has no use for.

    Args:
        dest: the folder to fill; what an interrupted run or another pin left there is replaced.
        pin: what to get; by default what ``engine.toml`` says.
        cache: the folder that keeps the downloaded sdist.

    Returns:
        ``dest``. It is whole: it is moved into place only when everything was unpacked.

    Raises:
        FetchError: no source could be had, or not the pinned one. Nothing partial is left.
    """
    pin = pin or read_pin()
    if _stamp(dest) == _content(pin):
        return dest
    try:
        sdist = fetch_sdist(pin, cache)
        _unpack(sdist, pin, dest)
    except OSError as error:
        raise FetchError(
            f"the engine's source could not be written: {error}. It needs about 200 MB in {cache} and "
            f"{dest.parent}: make room (or mend the permissions), then run this again"
        ) from error
    return dest


def fetch_sdist(pin: Pin, cache: Path = HERE / "cache") -> Path:
    """The pinned sdist: the file that the environment names, or the one in ``cache``, downloaded if need be.

    Raises:
        FetchError: it could not be had, or what is there is another file.
    """
    given = os.environ.get(SDIST_VARIABLE)
    if not given:
        return _download(pin, cache)
    sdist = Path(given)
    if not sdist.is_file():
        where = "" if sdist.is_absolute() else f", nor in {Path.cwd()}, where this build runs; give its whole path"
        raise FetchError(f"{SDIST_VARIABLE} names {sdist}, and no file is there{where}: mend or unset it")
    _verify(sdist, pin, f"{SDIST_VARIABLE} names another file: get {pin.filename} anew or unset it")
    return sdist


def _content(pin: Pin) -> str:
    """What a whole tree's stamp says: of which sdist it is, and which part."""
    return "\n".join([pin.sha256, *WANTED_DIRS, *WANTED_FILES])


def _stamp(dest: Path) -> str | None:
    try:
        return (dest / STAMP).read_text(encoding="ascii").strip()
    except OSError:
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _verify(sdist: Path, pin: Pin, remedy: str) -> None:
    found = _sha256(sdist)
    if found != pin.sha256:
        hashes = f"  sha256 {found}\n  pinned {pin.sha256}"
        raise FetchError(f"{sdist} is not the pinned source:\n{hashes}\n{remedy}")


def _download(pin: Pin, cache: Path) -> Path:
    """The sdist in the cache, downloaded with pip where it is not there yet."""
    sdist = cache / pin.filename
    if sdist.is_file():
        if _sha256(sdist) == pin.sha256:
            return sdist
        sdist.unlink()
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {pin.filename} (77 MB)", flush=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        _pip_download(pin, Path(folder))
        fresh = Path(folder, pin.filename)
        if not fresh.is_file():
            raise FetchError(f"pip ended well and left no {pin.filename}: {_by_hand(pin)}")
        _verify(fresh, pin, f"the index served another file: {_by_hand(pin)}")
        os.replace(fresh, sdist)
    return sdist


def _by_hand(pin: Pin) -> str:
    return (
        f"download {pin.filename} by other means (https://pypi.org/project/{pin.name}/{pin.version}/#files) "
        f"and set {SDIST_VARIABLE}=/path/to/{pin.filename}"
    )


def _pip_download(pin: Pin, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="ascii")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", pin.name]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # pip prepares every sdist's metadata with its build backend. Our own build has that backend at
    # hand; outside of it pip makes an environment for it, at the price of another download.
    if _has("scikit_build_core"):
        command.append("--no-build-isolation")
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode == 0:
        return
    if not _has("pip"):
        raise FetchError(f"{sys.executable} has no pip: {_by_hand(pin)}")
    raise FetchError(
        f"pip could not download {pin.filename}:\n{result.stdout}\n"
        f"see to the network, the index and the disk, or {_by_hand(pin)}"
    )


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _unpack(sdist: Path, pin: Pin, dest: Path) -> None:
    """Unpacks the wanted members beside ``dest`` and puts the whole folder in its place."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                place = _place(member, pin)
                content = archive.extractfile(member) if place and member.isfile() else None
                if place and content:
                    with content:
                        _write(content, fresh / place, executable=bool(member.mode & 0o100))
        missing = [name for name in (*WANTED_DIRS, *WANTED_FILES) if not (fresh / name).exists()]
        if missing:
            names = ", ".join(missing)
            raise FetchError(f"{sdist} has no {names} in {pin.engine_dir}: mend WANTED_* in {__file__}")
        (fresh / STAMP).write_text(_content(pin) + "\n", encoding="ascii")
        fresh.chmod(0o755)  # mkdtemp's 0700 would lock other users of a shared checkout out
        if dest.exists():
            shutil.rmtree(dest)
        os.replace(fresh, dest)
    except tarfile.TarError as error:
        raise FetchError(f"{sdist} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _place(member: tarfile.TarInfo, pin: Pin) -> PurePosixPath | None:
    """Where a member goes below the destination; None for what the build does not need."""
    path = PurePosixPath(member.name)
    if ".." in path.parts or pin.engine_dir not in path.parents:
        return None
    place = path.relative_to(pin.engine_dir)
    wanted = str(place) in WANTED_FILES or any(PurePosixPath(name) in place.parents for name in WANTED_DIRS)
    return place if wanted else None


def _write(content: IO[bytes], path: Path, *, executable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file)
    if executable:
        path.chmod(0o755)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Get the engine's pinned source, verified.")
    parser.add_argument("--dest", type=Path, default=HERE / "src", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        print(fetch(options.dest))
    except FetchError as error:
        print(f"vendor/fetch.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
