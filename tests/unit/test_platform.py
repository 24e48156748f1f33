"""vendor/platform.cmake: what a build chooses on each platform."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PLATFORM = Path(__file__).resolve().parents[2] / "vendor" / "platform.cmake"
CMAKE = shutil.which("cmake")

SCRIPT = """
include("{platform}")
message("metal ${{GGML_METAL}}, embedded ${{GGML_METAL_EMBED_LIBRARY}}, rpath ${{CMAKE_INSTALL_RPATH}}")
"""

APPLE = "metal ON, embedded ON, rpath @loader_path"
ELSEWHERE = "metal OFF, embedded , rpath $ORIGIN"


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake here")
@pytest.mark.parametrize(
    "given, chosen",
    [
        (["-DAPPLE=1"], APPLE),
        (["-DAPPLE=1", "-DGGML_METAL=off"], "metal off, embedded ON, rpath @loader_path"),
        (["-DAPPLE=", "-DUNIX=1"], ELSEWHERE),
        (["-DAPPLE=", "-DWIN32=1"], ELSEWHERE),
        (["-DAPPLE=", "-DCMAKE_INSTALL_RPATH=$ORIGIN;/cuda"], "metal OFF, embedded , rpath $ORIGIN;/cuda"),
    ],
)
def test_options(given: list[str], chosen: str, tmp_path: Path) -> None:
    script = tmp_path / "script.cmake"
    script.write_text(SCRIPT.format(platform=PLATFORM.as_posix()))
    done = subprocess.run([str(CMAKE), *given, "-P", str(script)], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == chosen
