"""Show what is installed, which engine the host runs on, and what files are.

Of a FILE it says what it holds; of two, whether the one is the other's MTP head. Nothing is loaded. It works where
importing the package fails, and says why that is.
"""

from __future__ import annotations

import argparse as _argparse
import importlib.metadata as _metadata
import importlib.util as _util
import os as _os
import pathlib as _pathlib
import platform as _platform
import typing as _t

import ds4_mtp_plugin as _package

from .. import gguf as _gguf
from ..settings import Settings as _Settings

HELP = "what is installed, and whether files fit together"

_NAMES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")
_PREFIX = "DS4_MTP_"


def add_arguments(parser: _argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="GGUF files: a model, an MTP head, or both")


def do(args: _argparse.Namespace) -> int:
    wrong = [*_software(), *_environment(), *_files(args.files)]
    print()
    for what in wrong:
        print(f"wrong: {what}")
    if not wrong:
        print("all well")
    return 1 if wrong else 0


def host_folder() -> _pathlib.Path | None:
    """Where the host's package is, without importing it; None where there is none."""
    try:
        spec = _util.find_spec("llama_cpp")
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else _pathlib.Path(spec.origin).parent


def _say(name: str, value: object) -> None:
    print(f"{name:<18} {value}")


def _software() -> _t.Iterator[str]:
    """Print what is there; yield what is wrong with it."""
    _say("python", f"{_platform.python_version()}, {_platform.system()} {_platform.machine()}")
    _say("ds4-mtp-plugin", f"{_package.__version__} in {_pathlib.Path(_package.__file__).parent}")
    host = host_folder()
    for name in ("llama-cpp-python", "cffi", "numpy"):
        try:
            version = _metadata.version(name)
        except _metadata.PackageNotFoundError:
            version = "not installed"
        _say(name, f"{version} in {host}" if name == "llama-cpp-python" and host else version)
    if _package.import_error is not None:
        yield str(_package.import_error)
    try:
        _engine(host)
    except ImportError as err:
        if str(err) != str(_package.import_error):
            yield str(err)


def _engine(host: _pathlib.Path | None) -> None:
    """Print what there is to say of the engine; ImportError where it is not this package's."""
    from ..engine import LIBRARY_DIR, Library

    if _package.import_error is None:
        from ..host import library_path

        path = _pathlib.Path(library_path())
    else:
        # What the host would load, or did.
        given = _os.environ.get("LLAMA_CPP_LIB_PATH")
        folder = _pathlib.Path(given) if given is not None else LIBRARY_DIR if host is None else host / "lib"
        found = sorted(path for path in folder.glob("*llama.*") if path.suffix in (".so", ".dylib", ".dll"))
        if not found:
            _say("engine", f"no libllama in {folder}")
            return
        path = found[0]
    _say("engine", path)
    library = Library(str(path))
    if host is not None and (host / "lib.ds4-mtp").exists():
        _say("", f"'ds4-mtp install-engine' placed a copy in {host / 'lib'}")
    _say("patch set", library.patchset)
    _say("llama.cpp", library.version)
    _say("system", library.system_info.strip())
    folder = _pathlib.Path(_os.environ.get("MTMD_CPP_LIB", (host or path.parent) / "lib"))
    mtmd = sorted(folder.glob("*mtmd.*"))
    _say("libmtmd", mtmd[0] if mtmd else f"not in {folder} (images and sound need it, text does not)")


def _environment() -> _t.Iterator[str]:
    names = [*_NAMES, *sorted(name for name in _os.environ if name.startswith(_PREFIX))]
    for name in names:
        _say(name, _os.environ.get(name, "not set"))
    try:
        settings = _Settings.of(_os.environ)
    except ValueError as err:
        yield str(err)
    else:
        if settings.disable:
            print("speculation is off: DS4_MTP_SPEC_DISABLE is set")


def _files(paths: _t.Sequence[str]) -> _t.Iterator[str]:
    models: list[_gguf.Model] = []
    for path in paths:
        try:
            models.append(_gguf.read_model(path))
        except (OSError, ValueError) as err:
            yield str(err)
            continue
        _describe(path, models[-1])
        try:
            if models[-1].kind in (_gguf.TRUNK, _gguf.TRUNK_AND_HEAD):
                _gguf.check_base(path)
            else:
                _gguf.check_head(path)
        except ValueError as err:
            models.pop()
            yield str(err)
    if len(paths) == 2 and len(models) == 2:
        # The head may come first.
        base, head = sorted(models, key=lambda model: model.kind == _gguf.HEAD)
        try:
            _gguf.check_pair(base.path, head.path)
        except ValueError as err:
            yield str(err)
        else:
            print(f"\n{head.path} belongs to {base.path}")


def _describe(path: str, model: _gguf.Model) -> None:
    print(f"\n{path}: {model.kind}" + (f" of architecture {model.architecture}" if model.architecture else ""))
    layers = model.n_layer
    if layers is not None and model.kind == _gguf.HEAD:
        print(f"  on top of {layers} layers")
    elif layers is not None:
        print(f"  {layers} layers")
    for value, what in (
        (model.n_vocab, "tokens in the vocabulary"),
        (model.n_embd, "wide"),
        (model.n_hc, "hyper-connection streams"),
        (model.n_head, f"attention heads of {model.head_dim}"),
        (model.window, "rows in the sliding window"),
    ):
        if value is not None:
            print(f"  {value} {what}")
    print(f"  mostly {model.quant}, {model.n_bytes / 1e6:,.1f} MB")
