"""What drafters from committed rows share: the newest rows of each sequence, and the account of the head's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ...engine import Context, EngineError, Floats
from ..depth import Gate
from .drafter import NOTHING_READY, Ready

# Where a head that attends over a sliding window has fallen so many rows behind, it starts over with the newest of as
# many positions. Of the small model's drafts 0.97 are then right of those that are behind all 128, for a fifth of the
# time, and it sees more with each token.
_CATCH_UP = 16


class Rows:
    """Committed rows of one sequence, the newest `window` of them, by position modulo `window`."""

    def __init__(self, window: int, width: int) -> None:
        self.tokens = np.zeros(window, dtype=np.int32)
        self.hidden = np.zeros((window, width), dtype=np.float32)
        self.lo = 0  # the ring holds positions lo <= p < hi
        self.hi = 0
        self.kv_lo = 0  # the head's memory holds pairs of positions kv_lo <= p < kv_hi
        self.kv_hi = 0


class RowDrafter:
    """Keeps rows until a draft is wanted; what that is made of is a subclass's (the interface is `Drafter`'s)."""

    def __init__(
        self,
        context: Context,
        *,
        window: int | None,
        width: int,
        gate: Gate | None,
        on_close: Callable[[], None] | None,
    ) -> None:
        """
        Args:
            context: the head's, wholly this object's. Its ``n_batch`` and ``n_ubatch`` must hold a window of rows, and
                each sequence's share of ``n_ctx`` three.
            window: rows that a draft looks back on; None for the head's own attention window.
            width: floats of a row.
            gate: ends a draft early; None never does.
            on_close: called after the context is closed (to free its model).
        """
        self.window = window = context.window if window is None else window
        per_seq = context.n_ctx // context.n_seq_max
        if window < 1 or min(context.n_batch, context.n_ubatch) < window or per_seq < 3 * window:
            raise ValueError(
                f"a head's context for a window of {window} needs n_ubatch {window} and n_ctx {3 * window} a sequence; "
                f"it has {context.n_ubatch} and {per_seq}"
            )
        self._sliding = context.window > 0
        self._context = context
        self._width = width
        self._capacity = per_seq
        self._gate = gate or Gate()
        self._on_close = on_close
        self._sequences: dict[int, Rows] = {}
        self._closed = False
        self.n_decodes = 0

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: Floats) -> None:
        if self._closed:
            return
        s = self._sequences.get(seq_id)
        if s is None:
            s = self._sequences[seq_id] = Rows(self.window, self._width)
        n = min(len(hidden), self.window)
        first, end = n_past + len(tokens) - n, n_past + len(tokens)
        # In this order an exception from outside, at any line, leaves rows that belong together.
        if s.hi != first:
            s.lo = s.hi = first
        s.lo = max(s.lo, end - self.window)
        if n == 1:
            at = first % self.window
            s.tokens[at], s.hidden[at] = tokens[-1], hidden[-1]
        else:
            places = self._places(first, end)
            s.tokens[places] = tokens[len(tokens) - n :]
            s.hidden[places] = hidden[len(hidden) - n :]
        s.hi = end

    def ready(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> Ready:
        return NOTHING_READY

    def _at(self, seq_id: int, n_past: int) -> Rows | None:
        """The rows of a sequence, if they reach to position n_past; None where there is no basis for a draft.

        Raises:
            EngineError: the drafter is closed.
        """
        if self._closed:
            raise EngineError("the drafter is closed")  # asking the engine would crash
        s = self._sequences.get(seq_id)
        return None if s is None or s.hi != n_past or s.lo >= s.hi else s

    def _places(self, first: int, end: int) -> slice | npt.NDArray[np.intp]:
        """Where the ring has the positions first <= p < end, no more than it holds."""
        at, n = first % self.window, end - first
        return slice(at, at + n) if at + n <= self.window else np.arange(first, end) % self.window

    def rollback(self, seq_id: int, n_past: int) -> None:
        s = self._sequences.get(seq_id)
        if s is None:
            return
        s.hi = min(s.hi, n_past)
        s.lo = min(s.lo, s.hi)
        if s.kv_hi > n_past:
            if self._context.seq_rm(seq_id, n_past):
                s.kv_hi = n_past
                s.kv_lo = min(s.kv_lo, n_past)
            else:
                self._clear(seq_id, s)

    def close(self) -> None:
        self._closed = True
        self._sequences.clear()
        self._context.close()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None

    def _start(self, seq_id: int, s: Rows, n_past: int, oldest: int) -> int:
        """From which position on the head is shown rows for a draft at n_past: behind those that it holds.

        Where there are none, or those between are lost, or many, it starts over: not before `oldest`.
        """
        start = s.kv_hi
        holds = 0 < start <= n_past
        if holds and start >= oldest and not (self._sliding and n_past - start >= _CATCH_UP):
            return start
        self._clear(seq_id, s)
        s.kv_lo = max(oldest, n_past - _CATCH_UP + 1) if holds and self._sliding else oldest
        return s.kv_lo

    def _make_room(self, seq_id: int, s: Rows, start: int, end: int) -> None:
        """Drop pairs that no later query can see, if rows up to position `end` do not fit beside them."""
        if end - s.kv_lo > self._capacity:
            s.kv_lo = start - self.window + 1
            if not self._context.seq_rm(seq_id, -1, s.kv_lo):
                raise EngineError(f"the engine refused to remove positions below {s.kv_lo} from the head's memory")

    def _clear(self, seq_id: int, s: Rows) -> None:
        self._context.seq_rm(seq_id, -1)
        s.kv_lo = s.kv_hi = 0
