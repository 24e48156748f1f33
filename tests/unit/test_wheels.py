"""vendor/wheels.py: what can be held to without compiling. `.ci/run` makes a wheel and tries it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ds4_mtp_plugin
from ds4_mtp_plugin.host import HOST_VERSION
from vendor import wheels

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["README.md", "USAGE.md"])
def test_the_documented_wheel_is_the_one_that_is_made(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    glibc = wheels.GLIBC.replace(".", "_")
    made = f"ds4_mtp_plugin-{ds4_mtp_plugin.__version__}-py3-none-manylinux_{glibc}_x86_64.whl"
    assert set(re.findall(r"ds4_mtp_plugin-\S+\.whl", text)) == {made}
    assert f"-C wheel.cmake=false llama-cpp-python=={HOST_VERSION} {made}\n" in text


def test_a_step_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here in place of the tools' folder there is a file. Nothing is left in the folder for the wheels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "BUILD", tmp_path / "build")
        (tmp_path / "build").mkdir()
        (tmp_path / "build" / "tools").write_text("")
        assert wheels.main(["--out", str(tmp_path / "dist")]) == 1
    assert re.match(r"vendor/wheels.py: .*tools", capsys.readouterr().err.splitlines()[-1])
    assert not list((tmp_path / "dist").iterdir())
