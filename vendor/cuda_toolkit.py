"""Makes a CUDA toolkit out of PyPI's packages, enough to compile the engine on a machine that has none.

Run by hand, or by what builds for a GPU that is elsewhere (``.ci/run``, ``bench/device``)::

    toolkit=$(python vendor/cuda_toolkit.py)
    export CUDAToolkit_ROOT=$toolkit CUDACXX=$toolkit/bin/nvcc
    CMAKE_ARGS="-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=on -DGGML_CUDA_NCCL=off" pip wheel .

No driver is needed to compile, and none comes along: ``GGML_CUDA_NO_VMM`` keeps the engine from
linking to ``libcuda``. NCCL would be for several GPUs.

Only the standard library is used, apart from pip, which runs as a program.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEST = HERE.parent / "build" / "cuda"
BUILD = HERE.parent / "build" / "device" / "cuda"  # of the engine with it
STAMP = ".installed"

#: The release is pinned: what is built with it runs with the libraries of any later CUDA 13.
PACKAGES = "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl,cublas]==13.0.2"

#: What the engine is configured with. The library paths of this machine would be of no use on the one with the GPU.
OPTIONS = (
    "-DGGML_CUDA=on",
    "-DGGML_CUDA_NO_VMM=on",
    "-DGGML_CUDA_NCCL=off",
    "-DGGML_NATIVE=off",
    "-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=off",
)

#: For one architecture, that of H100 and H200.
HOPPER = "-DCMAKE_CUDA_ARCHITECTURES=90-real"


class ToolkitError(Exception):
    """The toolkit could not be had; the message says what to do."""


def install(dest: Path) -> Path:
    """Makes ``dest`` hold the toolkit (870 MB).

    Returns:
        Its root: the folder with ``bin/nvcc``, ``include`` and ``lib64``.

    Raises:
        ToolkitError: pip could not install it. Nothing partial is left.
    """
    stamp = dest / STAMP
    if not (stamp.is_file() and stamp.read_text(encoding="ascii") == PACKAGES):
        dest.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
        try:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--only-binary", ":all:"]
            command += ["--target", str(fresh), PACKAGES]
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if result.returncode:
                raise ToolkitError(
                    f"pip could not install {PACKAGES}:\n{result.stdout}\nsee to the network and the disk"
                )
            link(_root(fresh))
            (fresh / STAMP).write_text(PACKAGES, encoding="ascii")
            if dest.exists():
                shutil.rmtree(dest)
            os.replace(fresh, dest)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return _root(dest)


def environment(root: Path) -> dict[str, str]:
    """The variables by which CMake finds the toolkit."""
    return {"CUDACXX": str(root / "bin" / "nvcc"), "CUDAToolkit_ROOT": str(root)}


def link(root: Path) -> None:
    """Adds the names that a linker looks for: the packages leave out what needs a symbolic link."""
    libraries = root / "lib"
    (root / "lib64").symlink_to("lib")
    for path in sorted(libraries.glob("*.so.*")):
        plain = libraries / (path.name.split(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(path.name)


def _root(dest: Path) -> Path:
    found = sorted(dest.glob("nvidia/*/bin/nvcc"))
    if len(found) != 1:
        raise ToolkitError(f"{PACKAGES} brought {len(found)} nvcc in place of one: mend PACKAGES in {__file__}")
    return found[0].parent.parent


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints the toolkit's root and returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a CUDA toolkit out of PyPI's packages.")
    parser.add_argument("--dest", type=Path, default=DEST, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        print(install(options.dest.resolve()))
    except (ToolkitError, OSError) as error:
        print(f"vendor/cuda_toolkit.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
