"""What proposes tokens, behind one protocol."""

from .drafter import Drafter
from .mtp import MtpDrafter

__all__ = ["Drafter", "MtpDrafter"]
