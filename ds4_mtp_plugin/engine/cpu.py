"""The CPU, for reports: its name, and which of the instructions it has that the engine has kernels for."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cpu", "cpu"]

# As Linux calls them, and as llama.cpp does (llama_print_system_info).
_FEATURES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX512F",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_tile": "AMX_TILE",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Cpu:
    """A CPU as reports name it.

    Attributes:
        name: its model, or no more than its architecture where the system does not say.
        features: of those that matter to the engine the ones it has; None where the system does not say.
        threads: how many threads it runs at once; 0 where the system does not say.
    """

    name: str
    features: tuple[str, ...] | None
    threads: int

    def __str__(self) -> str:
        features = "features unknown" if self.features is None else " ".join(self.features) or "no vector features"
        return f"{self.name}, {self.threads} threads, {features}"


def cpu(info: Path = Path("/proc/cpuinfo")) -> Cpu:
    """This machine's CPU, by Linux's `info` where there is one. Raises nothing."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # The first processor of several comes first.
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    flags = fields.get("flags", fields.get("features"))
    features = None if flags is None else tuple(known for flag, known in _FEATURES.items() if flag in flags.split())
    return Cpu(name, features, os.cpu_count() or 0)
