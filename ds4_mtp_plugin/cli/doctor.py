"""Show what is installed, which engine the host runs on, whether it works here, and what files are.

The small model that comes along is decoded in a process of its own. Of a FILE it says what it holds, and what a Llama
with it takes in memory; of several, which head belongs to which model. They are not loaded. It works where importing
the package fails, and says why that is.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ds4_mtp_plugin

from .. import gguf
from ..settings import Settings

if TYPE_CHECKING:
    from ..engine import Library

__all__ = ["HELP", "add_arguments", "do", "host_folder"]

HELP = "what is installed, whether it works here, and whether files fit together"

EXITS = {0: "all is well", 1: "something is wrong: each finding is a line 'wrong: ...'"}

_NAMES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")
_PREFIX = "DS4_MTP_"

# Kernels for AVX2, which all CPUs of the last ten years have. Tried: it avoids the crash of AMX's kernels as GCC 12
# compiles them without our patch.
_CAUTIOUS = "CMAKE_ARGS='-DGGML_NATIVE=OFF' pip install --no-cache-dir --force-reinstall --no-deps ."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="GGUF files: models, MTP heads, or both")
    # Not of `arguments`, which imports the host.
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=4096,
        metavar="N",
        help="length of the context that memory is said for (default %(default)s)",
    )

    parser.add_argument(
        "--rpc", default="", metavar="HOST:PORT,...", help="servers to look for, beside those of DS4_MTP_RPC_SERVERS"
    )


def do(args: argparse.Namespace) -> int:
    if not 0 < args.ctx_size < 2**31:
        args.usage_error(f"-c {args.ctx_size}: expected a whole number, 1 or more")
    wrong = [*_software(), *_environment(), *_servers(args.rpc), *_decodes(), *_files(args.files, args.ctx_size)]
    print()
    for what in wrong:
        print(f"wrong: {what}")
    if not wrong:
        print("all well")
    return 1 if wrong else 0


def host_folder() -> Path | None:
    """Where the host's package is, without importing it; None where there is none."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _say(name: str, value: object) -> None:
    print(f"{name:<18} {value}")


def _software() -> Iterator[str]:
    """Print what is there; yield what is wrong with it."""
    _say("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    _say("ds4-mtp-plugin", f"{ds4_mtp_plugin.__version__} in {Path(ds4_mtp_plugin.__file__).parent}")
    host = host_folder()
    for name in ("llama-cpp-python", "cffi", "numpy"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        _say(name, f"{version} in {host}" if name == "llama-cpp-python" and host else version)
    if ds4_mtp_plugin.import_error is not None:
        yield str(ds4_mtp_plugin.import_error)
    try:
        yield from _engine(host)
    except ImportError as err:
        if str(err) != str(ds4_mtp_plugin.import_error):
            yield str(err)


def _engine(host: Path | None) -> Iterator[str]:
    """Print what there is to say of the engine; yield what is wrong; ImportError where it is not this package's."""
    from ..engine import LIBRARY_DIR, Library
    from ..engine.cpu import cpu

    _say("cpu", cpu())
    if "llama_cpp.llama_cpp" in sys.modules:
        from ..host import library_path

        path = Path(library_path())
    else:
        # What the host would load.
        given = os.environ.get("LLAMA_CPP_LIB_PATH")
        folder = Path(given) if given is not None else LIBRARY_DIR
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
    _say("compiler", library.compiler)
    _say("system", library.system_info.strip())
    yield from _modules(library)
    folder = Path(os.environ.get("MTMD_CPP_LIB", path.parent))
    mtmd = sorted(folder.glob("*mtmd.*"))
    _say("libmtmd", mtmd[0] if mtmd else f"not in {folder} (images and sound need it, text does not)")


def _modules(library: Library) -> Iterator[str]:
    """Say which of several CPU backends is in use; yield what there is for a machine that is not this one."""
    from ..engine.cpu import cpu

    folder, modules = Path(library.path).parent, library.modules()
    kernels = {name.removeprefix("cpu-"): loaded for name, loaded in modules.items() if name.startswith("cpu-")}
    taken = [name for name, loaded in kernels.items() if loaded]
    if kernels:
        _say("kernels", f"{', '.join(taken) or 'none'} (of {', '.join(kernels)})")
    if kernels and not taken:
        yield f"no kernels in {folder} are for this CPU ({cpu()}): build the plugin from its source, 'pip install .'"
    if "cuda" in modules and not library.has_gpu:
        yield f"{folder} is for NVIDIA GPUs, and {_why_no_gpu(folder / 'libggml-cuda.so', modules['cuda'])}"


def _why_no_gpu(backend: Path, loaded: bool) -> str:
    if loaded:
        return "no GPU is at hand, or its driver is too old (CUDA 13 needs 580): mend that, or take the CPU wheel"
    try:
        ctypes.CDLL(str(backend))
        return f"{backend.name} was not taken: reinstall ds4_mtp_plugin"
    except OSError as err:
        return f"{err}: pip install 'ds4-mtp-plugin[cuda]', or take the CPU wheel"


def _environment() -> Iterator[str]:
    names = [*_NAMES, *sorted(name for name in os.environ if name.startswith(_PREFIX))]
    for name in names:
        _say(name, os.environ.get(name, "not set"))
    try:
        settings = Settings.of(os.environ)
    except ValueError as err:
        yield str(err)
    else:
        if settings.disable:
            print("speculation is off: DS4_MTP_SPEC_DISABLE is set")


def _servers(named: str) -> list[str]:
    """Print the devices of RPC servers; what is wrong: those that are not there, or of another build."""
    if ds4_mtp_plugin.import_error is not None:
        return []
    from .. import rpc

    wrong: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", rpc.OtherBuild)
        try:
            rpc.add_servers(filter(None, named.split(",")))
            for device in rpc.devices():
                _say("server", f"{device.endpoint}, {device.name}: {_mb(device.free)} of {_mb(device.total)} MB free")
        except (RuntimeError, ValueError) as err:
            wrong.append(str(err))
    return [*wrong, *(str(each.message) for each in said if issubclass(each.category, rpc.OtherBuild))]


def _decodes() -> Iterator[str]:
    """Whether the engine decodes here; in a child, which it may end."""
    if ds4_mtp_plugin.import_error is not None:
        return
    from ..engine.cpu import cpu
    from ..host.library import current

    done = _child("decode_check")
    if done.returncode == 0:
        _say("decoding", "works: single rows, verifies and prompts of the small model")
        return
    lines = done.stderr.strip().splitlines() or ["without a word"]
    if done.returncode > 0:
        _say("decoding", "fails")
        yield f"the engine cannot decode the small model here: {lines[-1]}"
        return
    name = signal.Signals(-done.returncode).name
    _say("decoding", f"crashes ({name})")
    yield (
        f"the engine crashed with {name} while it decoded the small model. CPU: {cpu()}. Compiler: "
        f"{current().compiler}. Build it with kernels for any CPU with AVX2, in the plugin's source: {_CAUTIOUS}. "
        "Please report it with this output"
    )


def _child(module: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"{__package__}.{module}", *argv]
    search = os.pathsep.join([str(Path(ds4_mtp_plugin.__file__).parent.parent), *sys.path])
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search})


def _memory(n_ctx: int, base: gguf.Model, head: gguf.Model | None = None) -> None:
    """Print what the engine allocates for a Llama."""
    if ds4_mtp_plugin.import_error is not None:
        return
    done = _child("memory_check", str(n_ctx), base.path, *([head.path] if head else []))
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["without a word"]
        print(f"  what it takes in memory is not known: the engine does not take it here ({lines[-1]})")
        return
    contexts = json.loads(done.stdout)
    of_head = contexts[1:]
    weights = contexts[0]["weights"] + sum(each["weights"] for each in of_head if head is not None)
    cache, compute = (sum(each[what] for each in contexts) for what in ("cache", "compute"))
    more = sum(each["cache"] + each["compute"] + (each["weights"] if head else base.n_head_bytes) for each in of_head)
    print(
        f"  about {_mb(weights + cache + compute)} MB for a Llama with a context of {n_ctx:,} tokens: weights "
        f"{_mb(weights)}, caches {_mb(cache)}, graphs {_mb(compute)}" + (f"; {_mb(more)} for the head" if more else "")
    )


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f}"


def _files(paths: Sequence[str], n_ctx: int) -> Iterator[str]:
    bases: list[gguf.Model] = []
    heads: list[gguf.Model] = []
    for path in paths:
        try:
            model = gguf.read_model(path)
        except (OSError, ValueError) as err:
            yield str(err)
            continue
        _describe(path, model)
        is_base = model.kind in (gguf.TRUNK, gguf.TRUNK_AND_HEAD)
        try:
            (gguf.check_base if is_base else gguf.check_head)(path)
            if model.kind == gguf.TRUNK_AND_HEAD and len(paths) == 1:
                gguf.check_inside(path)
                print("  its head can be used: MtpDraft()")
            if is_base and len(paths) == 1:
                _memory(n_ctx, model)
        except ValueError as err:
            yield str(err)
        else:
            (bases if is_base else heads).append(model)
    yield from _pairs(bases, heads, n_ctx)


def _pairs(bases: Sequence[gguf.Model], heads: Sequence[gguf.Model], n_ctx: int) -> Iterator[str]:
    """Print which head belongs to which model; yield what belongs to none."""
    if len(bases) + len(heads) > 1 and not (bases and heads):
        yield f"of these files none is {gguf.TRUNK if heads else gguf.HEAD}: there is no pair to check"
    for head in heads:
        misfits: list[str] = []
        for base in bases:
            try:
                gguf.check_pair(base.path, head.path)
            except ValueError as err:
                misfits.append(str(err))
            else:
                print(f"\n{head.path} belongs to {base.path}")
                _memory(n_ctx, base, head)
        if bases and len(misfits) == len(bases):
            yield from misfits


def _describe(path: str, model: gguf.Model) -> None:
    print(f"\n{path}: {model.kind}" + (f" of architecture {model.architecture}" if model.architecture else ""))
    layers = model.n_layer
    if layers is not None and model.kind == gguf.HEAD:
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
    print(f"  mostly {model.quant}, {_mb(model.n_bytes)} MB")
    if model.kind == gguf.TRUNK_AND_HEAD:
        print(
            f"  {model.n_nextn} MTP head{'s' if model.n_nextn > 1 else ''} in it, {_mb(model.n_head_bytes)} MB of that"
        )
    elif model.kind == gguf.TRUNK:
        print("  no MTP head in it")
