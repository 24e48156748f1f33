"""A head, and before it what lies ready in the text."""

from __future__ import annotations

from collections.abc import Sequence

from ...engine import Floats
from .drafter import Drafter, More, Ready


class ChainDrafter:
    """Two drafters as one (the interface is `Drafter`'s): drafts of `text` lie ready, `head` is asked for the others.

    Both are told of every token, so each can draft at any time.
    """

    def __init__(self, text: Drafter, head: Drafter) -> None:
        """
        Args:
            text: a drafter with a window of 0.
        """
        self._text, self._head = text, head
        self.window = head.window

    @property
    def n_decodes(self) -> int:
        return self._head.n_decodes

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: Floats) -> None:
        self._text.process(seq_id, n_past, tokens, hidden)
        self._head.process(seq_id, n_past, tokens, hidden)

    def ready(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> Ready:
        return self._text.ready(seq_id, n_past, id_last, n_max)

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        return self._head.draft(seq_id, n_past, id_last, n_max, more)

    def rollback(self, seq_id: int, n_past: int) -> None:
        self._text.rollback(seq_id, n_past)
        self._head.rollback(seq_id, n_past)

    def close(self) -> None:
        self._text.close()
        self._head.close()
