"""vendor/cuda_check.py: which CUDA files a series makes it compile."""

from __future__ import annotations

from pathlib import Path

import pytest

from patches.apply import Series
from vendor.cuda_check import FOLDER, one_of_each, to_compile, touched

FILES = {
    "norm.cu": "norm.cuh",
    "norm.cuh": "common.cuh",
    "common.cuh": "",
    "sum.cu": "common.cuh",
    "alone.cu": "",
    "template-instances/mma.cu": "../norm.cuh",
}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    for name, included in FILES.items():
        path = tmp_path / FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#include "{included}"\n' if included else "", "utf-8")
    return tmp_path


def diff(path: str) -> bytes:
    return f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -1,1 +1,2 @@\n a\n+b\n".encode()


def test_edited_and_new_files_of_the_backend_alone() -> None:
    paths = [f"{FOLDER}norm.cu", f"{FOLDER}CMakeLists.txt", "ggml/src/ggml.c"]
    diffs = [(f"{i:04}-x.patch", diff(path)) for i, path in enumerate(paths)]
    sources = {f"{FOLDER}new.cuh": b"", "src/new.cpp": b""}
    assert touched(Series(diffs, sources)) == {f"{FOLDER}norm.cu", f"{FOLDER}new.cuh"}


@pytest.mark.parametrize(
    ("edited", "compiled"),
    [
        ("alone.cu", {"alone.cu"}),
        ("norm.cuh", {"norm.cu", "template-instances/mma.cu"}),
        ("common.cuh", {"norm.cu", "sum.cu", "template-instances/mma.cu"}),
    ],
)
def test_a_header_stands_for_what_includes_it(edited: str, compiled: set[str], engine: Path) -> None:
    assert set(to_compile({FOLDER + edited}, engine)) == {FOLDER + name for name in compiled}


def test_one_instance_stands_for_a_template() -> None:
    files = ["norm.cu", "template-instances/a-instance-1.cu", "template-instances/a-instance-2.cu"]
    files += ["template-instances/b-instance-1.cu", "x-instance-1.cu", "x-instance-2.cu"]
    kept = one_of_each([FOLDER + name for name in files])
    assert kept == [FOLDER + name for name in files if name != "template-instances/a-instance-2.cu"]
