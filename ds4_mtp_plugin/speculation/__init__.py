"""Speculation over an engine's contexts: the cycle, what proposes tokens, how many. Knows no host runtime."""

from .common_speculative import CommonSpeculative, RollbackRefused, Verify
from .depth import AdaptiveDepth, FixedDepth, Gate
from .drafters import Drafter, MtpDrafter

__all__ = [
    "AdaptiveDepth",
    "CommonSpeculative",
    "Drafter",
    "FixedDepth",
    "Gate",
    "MtpDrafter",
    "RollbackRefused",
    "Verify",
]
