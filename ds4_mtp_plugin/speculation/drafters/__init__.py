"""What proposes tokens, behind one protocol."""

from .chain import ChainDrafter
from .drafter import NOTHING_READY, Drafter, More, Ready
from .dspark import DsparkDrafter
from .mtp import MtpDrafter
from .mtp_heads import MtpHeadsDrafter
from .ngram import NgramDrafter
from .none import NoDrafter

__all__ = [
    "NOTHING_READY",
    "ChainDrafter",
    "Drafter",
    "DsparkDrafter",
    "More",
    "MtpDrafter",
    "MtpHeadsDrafter",
    "NgramDrafter",
    "NoDrafter",
    "Ready",
]
