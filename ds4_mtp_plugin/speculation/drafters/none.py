"""No drafts."""

from __future__ import annotations

from collections.abc import Sequence

from ...engine import Floats
from .drafter import NOTHING_READY, More, Ready


class NoDrafter:
    """Never proposes anything, for what else there is to a session (the interface is `Drafter`'s)."""

    window = 0
    n_decodes = 0

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: Floats) -> None:
        pass

    def ready(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> Ready:
        return NOTHING_READY

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        return []

    def rollback(self, seq_id: int, n_past: int) -> None:
        pass

    def close(self) -> None:
        pass
