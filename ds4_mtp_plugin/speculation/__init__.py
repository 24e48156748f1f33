"""Speculation over an engine's contexts: the cycle, what proposes tokens, how many. Knows no host runtime."""

from .common_speculative import N_KEEP, CommonSpeculative, RollbackRefused, Verify
from .depth import CPU_COSTS, GPU_COSTS, AdaptiveDepth, FixedDepth, Gate, NominalDepth
from .drafters import (
    NOTHING_READY,
    ChainDrafter,
    Drafter,
    DsparkDrafter,
    MtpDrafter,
    MtpHeadsDrafter,
    NgramDrafter,
    NoDrafter,
    Ready,
)

__all__ = [
    "CPU_COSTS",
    "GPU_COSTS",
    "NOTHING_READY",
    "N_KEEP",
    "AdaptiveDepth",
    "ChainDrafter",
    "CommonSpeculative",
    "Drafter",
    "DsparkDrafter",
    "FixedDepth",
    "Gate",
    "MtpDrafter",
    "MtpHeadsDrafter",
    "NgramDrafter",
    "NoDrafter",
    "NominalDepth",
    "Ready",
    "RollbackRefused",
    "Verify",
]
