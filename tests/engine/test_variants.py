"""A build with the CPU backend as modules, one for each kind of CPU: the best is taken, and each has a row's bits.

A wheel is built so (``python -m vendor.wheels``). Elsewhere there is one backend, linked, and nothing to try here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds4_mtp_plugin import engine, host
from tests import LONG

# Kernels differ by what they do with weights: taken as they are, in tiles, interleaved, or of 4 bits and looked up.
FEW = "test_k_rows and (F16 or Q8_0 or Q4_K or MXFP4)"

ROOT = Path(__file__).parents[2]
LIBRARY = engine.Library(host.library_path())
FOLDER = Path(LIBRARY.path).parent
MODULES = {path.stem.removeprefix("libggml-cpu-"): path for path in sorted(FOLDER.glob("libggml-cpu-*.so"))}
CODE = "from ds4_mtp_plugin import engine, host; print(engine.Library(host.library_path()).modules())"

pytestmark = pytest.mark.skipif(not MODULES, reason="this build has one CPU backend, no modules: wheels have them")


def loaded() -> list[str]:
    kinds = {name: is_loaded for name, is_loaded in LIBRARY.modules().items() if name.startswith("cpu-")}
    return [name.removeprefix("cpu-") for name, is_loaded in kinds.items() if is_loaded]


def engine_with(folder: Path, *variants: str) -> Path:
    """A copy of the engine with these of its modules alone."""
    folder.mkdir()
    for path in FOLDER.glob("*.so"):
        if path not in MODULES.values() or path in [MODULES[name] for name in variants]:
            shutil.copy(path, folder)
    return folder


def python(*arguments: str, engine: Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A Python with the host on `engine`, as if nothing of ours had been imported before."""
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(engine), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True)


def runs_here(name: str, tmp_path: Path) -> bool:
    return f"'cpu-{name}': True" in python("-c", CODE, engine=engine_with(tmp_path / name, name)).stdout


def test_one_is_loaded() -> None:
    assert len(loaded()) == 1


def test_another_is_loaded_where_it_is_all_there_is(tmp_path: Path) -> None:
    """In the working directory are modules that suit this CPU better: of another build, for all the engine knows."""
    least = next(name for name in ("x64", "armv8.0_1") if name in MODULES)
    engine = engine_with(tmp_path / "engine", least)
    for path in MODULES.values():
        shutil.copy(path, tmp_path)
    assert f"'cpu-{least}': True" in python("-c", CODE, engine=engine, cwd=tmp_path).stdout


def test_they_are_there_before_the_engine_is_started() -> None:
    """As linked backends are: apps ask whether there is a GPU before they make a Llama."""
    code = "import llama_cpp; print(llama_cpp.llama_print_system_info())"
    assert "CPU : " in python("-c", code, engine=FOLDER).stdout


def test_a_host_runs_on_them_without_the_plugin() -> None:
    """As it does where `ds4-mtp install-engine` has placed them in its folder."""
    model = ROOT / "ds4_mtp_plugin" / "models" / "ds4-mini-q8_0.gguf"
    llama = f"llama_cpp.Llama({str(model)!r}, n_ctx=64, verbose=False)"
    code = f"import llama_cpp; print({llama}('a', max_tokens=1)['object'])"
    done = python("-c", code, engine=FOLDER)
    assert done.stdout == "text_completion\n", done.stderr


def test_a_cpu_without_kernels_is_said(tmp_path: Path) -> None:
    others = [name for name in MODULES if not runs_here(name, tmp_path)]
    if not others:
        pytest.skip("all kernels run on this CPU")
    done = python("-m", "ds4_mtp_plugin", "doctor", engine=engine_with(tmp_path / "engine", *others))
    assert done.returncode == 1
    assert f"kernels            none (of {', '.join(others)})" in done.stdout
    assert "are for this CPU" in done.stdout and "wrong: the engine cannot decode" in done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_a_row_has_its_bits_in_each(name: str, tmp_path: Path) -> None:
    if not runs_here(name, tmp_path):
        pytest.skip(f"this CPU cannot run the kernels for {name}")
    if [name] == loaded():
        pytest.skip("they are those of tests/engine/test_row_bits.py here")
    selected = () if LONG else ("-k", FEW)
    done = python("-m", "pytest", "-q", "-x", "tests/engine/test_row_bits.py", *selected, engine=tmp_path / name)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b\d+ passed", done.stdout) and "skipped" not in done.stdout
