"""CPUs with AMX have matrix kernels and a weight buffer of their own. Here they run on any CPU with AVX-512 VNNI.

The CPU backend is compiled once more, a minute or two, with AMX's instructions in plain C++; the tests that AMX could
fail then run on it. Asked for by DS4_TEST_AMX=1. ``.ci/run`` does so where the CPU can run it and has no AMX: on a CPU
with AMX the same tests use the real thing.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds4_mtp_plugin import engine, host

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "fixtures" / "amx_emulation.h"
FEATURES = ["AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AMX_TILE", "AMX_INT8"]
TESTS = ["tests/engine/test_row_bits.py", "tests/engine/test_quant_defaults.py", "tests/engine/test_tiles.py"]
# The types that it has kernels for (ggml/src/ggml-cpu/amx/common.h).
TYPES = ["F16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
# Not with PyTorch: it has no emulation.
SELECTED = [*TYPES, "what_another_leaves"]


def system_info(folder: Path) -> str:
    script = "from ds4_mtp_plugin import engine, host; print(engine.Library(host.library_path()).system_info)"
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).stdout


@pytest.mark.skipif(not os.environ.get("DS4_TEST_AMX"), reason="DS4_TEST_AMX=1 asks for it: it compiles for a minute")
def test_amx_kernels_do_the_same(tmp_path: Path) -> None:
    here = engine.Library(host.library_path()).system_info
    assert "AVX512_VNNI = 1" in here, "without AVX-512 VNNI this CPU cannot run what stands around AMX"
    build = ROOT / "build" / "amx"
    options = [f"-DGGML_{feature}=ON" for feature in FEATURES]
    options += ["-DGGML_NATIVE=OFF", f"-DCMAKE_CXX_FLAGS=-include {EMULATION}"]
    subprocess.run(["cmake", "-S", ROOT / "vendor", "-B", build, *options], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "ggml-cpu", "--parallel", str(os.cpu_count())], check=True)

    for library in Path(host.library_path()).parent.glob("*.so"):
        shutil.copy(library, tmp_path)
    shutil.copy(build / "bin" / "libggml-cpu.so", tmp_path)
    assert "AMX_INT8 = 1" in system_info(tmp_path)
    assert hasattr(ctypes.CDLL(str(tmp_path / "libggml-cpu.so")), "amx_emulation_load")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", " or ".join(SELECTED)],
        cwd=ROOT,
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b\d\d+ passed", done.stdout) and "skipped" not in done.stdout
