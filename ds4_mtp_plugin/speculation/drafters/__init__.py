"""What proposes tokens, behind one protocol."""

from .chain import ChainDrafter
from .drafter import NOTHING_READY, Drafter, Ready
from .mtp import MtpDrafter
from .ngram import NgramDrafter
from .none import NoDrafter

__all__ = ["NOTHING_READY", "ChainDrafter", "Drafter", "MtpDrafter", "NgramDrafter", "NoDrafter", "Ready"]
