"""Speculation over an engine's contexts: the cycle, what proposes tokens, how many. Knows no host runtime."""

from .common_speculative import CommonSpeculative, RollbackRefused, Verify
from .depth import AdaptiveDepth, FixedDepth, Gate
from .drafters import NOTHING_READY, ChainDrafter, Drafter, DsparkDrafter, MtpDrafter, NgramDrafter, NoDrafter, Ready

__all__ = [
    "NOTHING_READY",
    "AdaptiveDepth",
    "ChainDrafter",
    "CommonSpeculative",
    "Drafter",
    "DsparkDrafter",
    "FixedDepth",
    "Gate",
    "MtpDrafter",
    "NgramDrafter",
    "NoDrafter",
    "Ready",
    "RollbackRefused",
    "Verify",
]
