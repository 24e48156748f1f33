"""vendor/wheels.py: what can be held to without compiling. `.ci/run` makes a wheel and tries it."""

from __future__ import annotations

import os
import re
import subprocess
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


@pytest.mark.parametrize(
    ("clang", "zig"),
    [
        ("-march=armv8-a", "-mcpu=generic+v8a"),
        ("-march=armv8.2-a+dotprod+fp16+sve", "-mcpu=generic+v8_2a+dotprod+fullfp16+sve"),
        ("-march=armv9.2-a+dotprod+fp16+sve+i8mm+sve2+sme", "-mcpu=generic+v9_2a+dotprod+fullfp16+sve+i8mm+sve2+sme"),
    ],
)
def test_kinds_of_arm_are_named_as_zig_does(tmp_path: Path, clang: str, zig: str) -> None:
    """In place of zig stands a program that prints what it is given."""
    (tmp_path / "zig").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "zig").chmod(0o755)
    compiler = wheels.compilers("aarch64", tmp_path / "compilers")["CXX"]
    arguments = ['-DNAME="a b"', clang, "-march=native", "-c", "a file.cpp"]
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    given = subprocess.check_output([compiler, *arguments], env=env, text=True).splitlines()
    assert given == ["c++", "-target", "aarch64-linux-gnu.2.28", arguments[0], zig, *arguments[2:]]


def test_a_step_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here in place of the tools' folder there is a file. Nothing is left in the folder for the wheels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "BUILD", tmp_path / "build")
        (tmp_path / "build").mkdir()
        (tmp_path / "build" / "tools").write_text("")
        assert wheels.main(["--out", str(tmp_path / "dist")]) == 1
    assert re.match(r"vendor/wheels.py: .*tools", capsys.readouterr().err.splitlines()[-1])
    assert not list((tmp_path / "dist").iterdir())
