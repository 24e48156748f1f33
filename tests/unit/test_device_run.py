"""bench/device/run.py, as far as only a machine with a GPU would show it."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.device import run
from bench.device.table import render

NOTHING = subprocess.CompletedProcess[str]([], 0, stdout="", stderr="")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library where the linker or Python looks."""
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: NOTHING)
    monkeypatch.setattr(glob, "glob", lambda pattern: [])


def test_cuda_libraries_are_found_where_they_lie(
    elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit, package = tmp_path / "toolkit", tmp_path / "package"
    for folder, names in ((toolkit, run.RUNTIME[:1]), (package, run.RUNTIME[1:])):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(toolkit))
    with pytest.raises(FileNotFoundError, match=r"libcublas\.so\.13 is in none"):
        run.cuda_libraries()
    monkeypatch.setattr(glob, "glob", lambda pattern: [str(package)] if pattern.endswith("nvidia/*/lib") else [])
    assert run.cuda_libraries() == [str(toolkit), str(package)]


def test_the_models_go_to_the_gpu_and_no_switch_comes_along(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS4_MTP_SPEC_DISABLE", "1")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/elsewhere")
    monkeypatch.setattr(run, "cuda_libraries", lambda: ["/cuda"])
    env = run.environment(cpu=False)
    assert "DS4_MTP_SPEC_DISABLE" not in env and "LLAMA_CPP_LIB_PATH" not in env
    assert env["DS4_TEST_GPU_LAYERS"] == "-1"
    assert env["LD_LIBRARY_PATH"].split(":")[0] == "/cuda"


def test_every_step_fits_a_call() -> None:
    names = run.steps(tiny=False)
    assert len(names) == len(set(names)) > len(run.steps(tiny=True)) > 10
    assert {"tests/engine/test_row_bits.py", "tests/host/test_text.py"} < set(names)
    assert all(run.limit(name) <= run.BUDGET_S < 600 for name in names)


def test_a_step_that_fails_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "interpreter", lambda: sys.executable)
    result = run.do("tests/nowhere.py", {}, dict(os.environ), tmp_path)
    assert result["failed"].startswith("status") and any("nowhere.py" in line for line in result["said"])
    assert "FAILED" in render({"tests/nowhere.py": result})
