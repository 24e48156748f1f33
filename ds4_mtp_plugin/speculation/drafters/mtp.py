"""A model's MTP (NextN) head as a drafter.

The head pairs the hidden row of position q - 1 with the token at q and predicts the token at q + 1 (DeepSeek-V3
report, arXiv:2412.19437, section 2.2; llama.cpp, src/models/deepseek4.cpp, graph_mtp). Deeper drafts feed the head its
own hidden row. Where its one layer attends over a sliding window, what it proposes at p depends on the pairs
p - window + 1 .. p alone. A head that attends over everything is given the last `window` pairs of a prompt, and keeps
up to three times as many. So no older hidden row is ever kept, no older prompt row ever decoded, and the head's memory
is of one size whatever the target's context length.

Pairs wait in a ring until a draft is wanted and then go into one decode together with the newest one, whose output
is the first draft. So K drafts cost K decodes, and text that is not drafted for costs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...engine import HIDDEN_OUTPUTS, Batch, Context, EngineError, Floats
from ..depth import Gate
from .drafter import NOTHING_READY, More, Ready


class _Sequence:
    """Committed rows of one sequence, the newest `window` of them, by position modulo `window`."""

    def __init__(self, window: int, n_embd_out: int) -> None:
        self.tokens = np.zeros(window, dtype=np.int32)
        self.hidden = np.zeros((window, n_embd_out), dtype=np.float32)
        self.lo = 0  # the ring holds positions lo <= p < hi
        self.hi = 0
        self.kv_lo = 0  # the head's memory holds pairs of positions kv_lo <= p < kv_hi
        self.kv_hi = 0


class MtpDrafter:
    """Drafts with the NextN block of a model of our own (the interface is `Drafter`'s)."""

    def __init__(
        self,
        context: Context,
        *,
        window: int | None = None,
        gate: Gate | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            context: an MTP context that is wholly this object's. Its ``n_batch`` and ``n_ubatch`` must hold a
                window of rows, and each sequence's share of ``n_ctx`` three.
            window: rows that a draft looks back on; None for the head's own attention window.
            gate: ends a draft early; None never does.
            on_close: called after the context is closed (to free its model).
        """
        self.window = context.window if window is None else window
        per_seq = context.n_ctx // context.n_seq_max
        if self.window < 1 or min(context.n_batch, context.n_ubatch) < self.window or per_seq < 3 * self.window:
            raise ValueError(
                f"an MTP context for a window of {self.window} needs n_ubatch {self.window} and n_ctx "
                f"{3 * self.window} a sequence; it has {context.n_ubatch} and {per_seq}"
            )
        self._context = context
        self._capacity = per_seq
        self._gate = gate or Gate()
        self._on_close = on_close
        self._batch = Batch(self.window, n_embd_out=context.n_embd_out)
        self._sequences: dict[int, _Sequence] = {}
        self._closed = False
        self.n_decodes = 0
        context.set_hidden(HIDDEN_OUTPUTS)

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: Floats) -> None:
        if self._closed:
            return
        s = self._sequences.get(seq_id)
        if s is None:
            s = self._sequences[seq_id] = _Sequence(self.window, self._context.n_embd_out)
        n = min(len(hidden), self.window)
        first, end = n_past + len(tokens) - n, n_past + len(tokens)
        # In this order an exception from outside, at any line, leaves rows that belong together.
        if s.hi != first:
            s.lo = s.hi = first
        s.lo = max(s.lo, end - self.window)
        at = np.arange(first, end) % self.window
        s.tokens[at] = tokens[len(tokens) - n :]
        s.hidden[at] = hidden[len(hidden) - n :]
        s.hi = end

    def ready(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> Ready:
        return NOTHING_READY

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        if self._closed:
            raise EngineError("the drafter is closed")  # asking the engine would crash
        s = self._sequences.get(seq_id)
        if s is None or s.hi != n_past or s.lo >= s.hi:
            return []  # cold: the hidden row of n_past - 1 is not known
        start = s.kv_hi
        if not s.lo < start <= n_past:
            # The pairs between the head's memory and the ring are lost, or there are none in memory: start over
            # with the ring, which reaches as far back as the window needs.
            self._clear(seq_id, s)
            start = s.kv_lo = s.lo + 1
        drafts: list[int] = []
        try:
            self._make_room(seq_id, s, start, n_past + n_max)
            n = n_past - start + 1
            self._batch.embd[:n] = s.hidden[np.arange(start - 1, n_past) % self.window]
            tokens = [*s.tokens[np.arange(start, n_past) % self.window].tolist(), id_last]
            while True:
                self._context.decode(self._batch.set(tokens, start, seq_id))
                self.n_decodes += 1
                start += len(tokens)
                s.kv_hi = start
                best = self._context.best(-1, with_prob=self._gate.p_min > 0)
                if not self._gate.passes(best):
                    return drafts
                drafts.append(best.id)
                if more is not None and not more(best) or len(drafts) == n_max or self._context.is_eog(best.id):
                    return drafts  # nothing follows the end of a text
                self._context.hidden(-1, self._batch.embd[0])
                tokens = drafts[-1:]
        except BaseException:
            self._clear(seq_id, s)
            raise

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

    def _make_room(self, seq_id: int, s: _Sequence, start: int, end: int) -> None:
        """Drop pairs that no later query can see, if rows up to position `end` do not fit beside them."""
        if end - s.kv_lo > self._capacity:
            s.kv_lo = start - self.window + 1
            if not self._context.seq_rm(seq_id, -1, s.kv_lo):
                raise EngineError(f"the engine refused to remove positions below {s.kv_lo} from the head's memory")

    def _clear(self, seq_id: int, s: _Sequence) -> None:
        self._context.seq_rm(seq_id, -1)
        s.kv_lo = s.kv_hi = 0
