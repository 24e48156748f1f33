"""Compiles the CUDA files that the patch series touches, where there is no GPU and no CUDA installed.

Run by ``.ci/run``, or by hand: ``python vendor/cuda_check.py``. A touched header means the files that include it. With
no such file in the series nothing is installed or compiled. The whole backend: ``python -m bench.device.prepare``.
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


def main() -> int:
    files = touched(read_series())
    if not files:
        print("no patch touches a CUDA file: nothing to compile")
        return 0
    toolkit = cuda_toolkit.install(cuda_toolkit.DEST)
    env = {**os.environ, **cuda_toolkit.environment(toolkit)}
    build = str(cuda_toolkit.BUILD)
    configure = ["cmake", "-S", str(ROOT / "vendor"), "-B", build, "-G", "Ninja", *cuda_toolkit.OPTIONS]
    subprocess.run(configure, check=True, env=env, stdout=subprocess.DEVNULL)
    sources = to_compile(files, ROOT / "vendor" / "patched")
    print(f"compiling {len(sources)} CUDA files:", *sources, sep="\n  ", flush=True)
    objects = [f"patched/{FOLDER}CMakeFiles/ggml-cuda.dir/{path[len(FOLDER) :]}.o" for path in sources]
    return subprocess.run(["cmake", "--build", build, "--target", *objects], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
