"""The CPU as reports name it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds4_mtp_plugin.engine.cpu import Cpu, cpu

X86 = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor @ 2.10GHz
flags\t\t: fpu sse avx f16c fma avx2 avx512f avx512_vnni amx_tile amx_int8

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd asimddp sve i8mm
CPU implementer\t: 0x41
"""


def test_x86(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(X86)
    found = cpu(info)
    assert found.name == "Intel(R) Xeon(R) Processor @ 2.10GHz"
    assert found.features == ("AVX", "AVX2", "FMA", "F16C", "AVX512F", "AVX512_VNNI", "AMX_TILE", "AMX_INT8")
    assert str(found).startswith(found.name) and "AMX_INT8" in str(found)


def test_arm(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(ARM)
    found = cpu(info)
    assert found.features == ("NEON", "DOTPROD", "MATMUL_INT8", "SVE")
    assert found.name


@pytest.mark.parametrize("content", [b"", b"\xff\xfe:\n::\n", None])
def test_a_system_that_says_nothing(tmp_path: Path, content: bytes | None) -> None:
    info = tmp_path / "cpuinfo"
    if content is not None:
        info.write_bytes(content)
    found = cpu(info)
    assert found.name and found.features is None
    assert "features unknown" in str(found)


def test_here() -> None:
    assert isinstance(cpu(), Cpu) and cpu().threads > 0
