"""Several MTP heads as a drafter, one for each draft (llama.cpp, common/speculative.cpp, ``chain_heads``).

Head i is fed as the first one is: with the hidden row of position q - 1 and the token at q, of committed text. What it
proposes is draft i + 1, so behind the text it reads the drafts before, each with the hidden row that the head of that
draft made. So K drafts cost K decodes, of 1, 2, ..., K rows and of what each head has to catch up with.

A head has keys and values of its own, but all share their cells, which the engine knows by position. A head writes a
position into the same cell as the heads before it only where cells are given out in order. So rows are never dropped
from the beginning: where there is no room for more, all heads start over with the window.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...engine import HIDDEN_OUTPUTS, Batch, Context, EngineError
from ..depth import Gate
from .drafter import More
from .rows import RowDrafter, Rows


class MtpHeadsDrafter(RowDrafter):
    """Drafts with several NextN blocks of a model."""

    def __init__(
        self,
        context: Context,
        *,
        n_heads: int,
        window: int | None = None,
        gate: Gate | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            context: an MTP context, with swa_full; and `window`, `gate`, `on_close`: as of `RowDrafter`. A micro-batch
                has to hold a window of rows and one for each head behind the first.
            n_heads: the most drafts.

        Raises:
            ValueError: the context is too small.
        """
        super().__init__(context, window=window, width=context.n_embd_out, gate=gate, on_close=on_close)
        n_rows = self.window + n_heads - 1
        if min(context.n_batch, context.n_ubatch) < n_rows:
            raise ValueError(f"{n_heads} heads need n_ubatch {n_rows}; the context has {context.n_ubatch}")
        self._n_heads = n_heads
        self._batch = Batch(n_rows, n_embd_out=context.n_embd_out)
        # Of each sequence and head the position behind its last pair of committed text.
        self._fed: dict[int, list[int]] = {}
        context.set_hidden(HIDDEN_OUTPUTS)

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        s = self._at(seq_id, n_past)
        if s is None:
            return []  # cold: the hidden row of n_past - 1 is not known
        n_max = min(n_max, self._n_heads)
        fed = self._fed.setdefault(seq_id, [0] * self._n_heads)
        if not all(s.lo < end <= n_past for end in fed[:n_max]) or n_past + n_max - s.kv_lo > self._capacity:
            self._clear(seq_id, s)
            s.kv_lo = s.lo + 1
            fed = self._fed[seq_id] = [s.kv_lo] * self._n_heads
        drafts: list[int] = []
        made = np.empty((n_max, self._width), dtype=np.float32)  # the hidden row with each draft
        try:
            for head in range(n_max):
                start = fed[head]
                if s.kv_hi > start and not self._context.seq_rm(seq_id, start):
                    raise EngineError(f"the engine refused to remove positions {start} and up from the head's memory")
                of_text = n_past - start + 1
                self._batch.embd[:of_text] = s.hidden[self._places(start - 1, n_past)]
                self._batch.embd[of_text : of_text + head] = made[:head]
                tokens = [*s.tokens[self._places(start, n_past)].tolist(), id_last, *drafts]
                self._context.set_head(head)
                self._context.decode(self._batch.set(tokens, start, seq_id))
                self.n_decodes += 1
                s.kv_hi = start + len(tokens)
                fed[head] = n_past + 1
                best = self._context.best(-1, with_prob=self._gate.p_min > 0)
                if not self._gate.passes(best):
                    return drafts
                drafts.append(best.id)
                if more is not None and not more(best) or self._context.is_eog(best.id):
                    return drafts
                self._context.hidden(-1, made[head])
            return drafts
        except BaseException:
            self._clear(seq_id, s)
            raise

    def rollback(self, seq_id: int, n_past: int) -> None:
        super().rollback(seq_id, n_past)
        fed = self._fed.get(seq_id)
        if fed is not None:
            fed[:] = [min(end, n_past) for end in fed]

    def _clear(self, seq_id: int, s: Rows) -> None:
        super()._clear(seq_id, s)
        self._fed.pop(seq_id, None)
