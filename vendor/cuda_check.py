"""Compiles the CUDA files that the patch series touches, where there is no GPU and no CUDA installed.

Run by ``.ci/run``, or by hand: ``python vendor/cuda_check.py``. A touched header means the files that include it, and
of the many instances of a kernel's template one. With no such file in the series nothing is installed or compiled. The
whole backend: ``python -m bench.device.prepare``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script it sees its own folder alone

from patches.apply import Series, parse, read_series  # noqa: E402
from vendor import cuda_toolkit  # noqa: E402

FOLDER = "ggml/src/ggml-cuda/"


def touched(series: Series) -> set[str]:
    """The CUDA backend's files that a diff edits or that are new, by their path in the engine's tree."""
    edited = {path for _, diff in series.diffs for path, _ in parse(diff)}
    return {path for path in edited | set(series.sources) if path.startswith(FOLDER) and path.endswith((".cu", ".cuh"))}


def to_compile(files: set[str], engine: Path) -> list[str]:
    """The ``.cu`` among `files`, and those that include a header among them, directly or not."""
    includes = {
        path.relative_to(engine).as_posix(): set(re.findall(r'#include "(?:.*/)?([^"/]+)"', path.read_text("utf-8")))
        for path in (engine / FOLDER).rglob("*.cu*")
    }
    found = set(files)
    while True:
        names = {Path(path).name for path in found if path.endswith(".cuh")}
        more = {path for path, included in includes.items() if included & names} - found
        if not more:
            return sorted(path for path in found if path.endswith(".cu"))
        found |= more


def one_of_each(files: list[str]) -> list[str]:
    """`files` with the first instance alone of each template: all take minutes, and differ in types and sizes."""
    kernels: set[str] = set()
    kept = []
    for path in files:
        folder, _, name = path.rpartition("/")
        kernel = name.partition("-instance")[0] if folder.endswith("template-instances") else path
        if kernel not in kernels:
            kept.append(path)
        kernels.add(kernel)
    return kept


def main() -> int:
    files = touched(read_series())
    if not files:
        print("no patch touches a CUDA file: nothing to compile")
        return 0
    toolkit = cuda_toolkit.install(cuda_toolkit.DEST)
    env = {**os.environ, **cuda_toolkit.environment(toolkit)}
    build = str(cuda_toolkit.BUILD)
    options = [*cuda_toolkit.OPTIONS, cuda_toolkit.HOPPER]
    configure = ["cmake", "-S", str(ROOT / "vendor"), "-B", build, "-G", "Ninja", *options]
    subprocess.run(configure, check=True, env=env, stdout=subprocess.DEVNULL)
    # The build has not every file of the tree: instances for mixed types of cache are an option of the engine's.
    listed = subprocess.run(["ninja", "-C", build, "-t", "targets", "all"], check=True, env=env, capture_output=True)
    objects = {target.partition(":")[0] for target in listed.stdout.decode().splitlines()}
    sources = [path for path in to_compile(files, ROOT / "vendor" / "patched") if _object(path) in objects]
    sources = one_of_each(sources)
    print(f"compiling {len(sources)} CUDA files:", *sources, sep="\n  ", flush=True)
    command = ["cmake", "--build", build, "--target", *map(_object, sources)]
    return subprocess.run(command, env=env, check=False).returncode


def _object(path: str) -> str:
    return f"patched/{FOLDER}CMakeFiles/ggml-cuda.dir/{path[len(FOLDER) :]}.o"


if __name__ == "__main__":
    sys.exit(main())
