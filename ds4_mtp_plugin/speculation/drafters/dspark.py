"""A DSpark head as a drafter: a block of tokens in one decode (llama.cpp, src/models/dflash.cpp).

The head has no text of its own. Of each committed row it reads what went into some layers of the target, from which
its stages make the keys of that position. A draft is one decode of a block: the token sampled last, and mask tokens
behind it, which all see each other; a Markov chain over the tokens of the block is part of the graph. So all drafts of
a block cost the same, however many are wanted. The stages attend over a sliding window.

Rows wait in a ring until a draft is wanted and are then injected in one decode; where they are many, the newest few.
The rows of a block are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ...engine import HIDDEN_OUTPUTS, Batch, Best, Context
from ..depth import Gate
from .drafter import More
from .rows import RowDrafter

# The least that a confidence lacks of certainty.
_LEAST = 1e-6


class DsparkDrafter(RowDrafter):
    """Drafts with a DSpark head, a model of its own."""

    def __init__(
        self,
        context: Context,
        *,
        width: int,
        n_block: int,
        mask: int,
        confident: bool,
        window: int | None = None,
        gate: Gate | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            context: the head's; and `window`, `gate`, `on_close`: as of `RowDrafter`. As many rows as a block has must
                be able to have outputs.
            width: floats that the head reads of a committed row.
            n_block: tokens of a block, the first of which is known.
            mask: the token that stands for the others.
            confident: the head says how sure it is of each token.
        """
        super().__init__(
            context,
            window=window,
            width=width,
            gate=gate,
            on_close=on_close,
        )
        self._rows = Batch(self.window, n_embd_out=width, tokens=False)
        self._block = Batch(n_block)
        self._n_block, self._mask, self._confident = n_block, mask, confident
        context.see_all()
        context.set_hidden(HIDDEN_OUTPUTS)

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        s = self._at(seq_id, n_past)
        if s is None:
            return []  # cold: what went into the layers at n_past - 1 is not known
        start = self._start(seq_id, s, n_past, s.lo)
        try:
            self._make_room(seq_id, s, start, n_past + self._n_block)
            if start < n_past:
                at = self._places(start, n_past)
                self._rows.embd[: n_past - start] = s.hidden[at]
                self._context.decode(self._rows.set(s.tokens[at].tolist(), start, seq_id))
                self.n_decodes += 1
            s.kv_hi = n_past
            block = [id_last, *[self._mask] * (self._n_block - 1)]  # a shorter one is drafted otherwise
            self._context.decode(self._block.set(block, n_past, seq_id, outputs="all"))
            self.n_decodes += 1
            drafts = self._drafts(min(n_max, self._n_block), more)
            if not self._context.seq_rm(seq_id, n_past):
                self._clear(seq_id, s)
            return drafts
        except BaseException:
            self._clear(seq_id, s)
            raise

    def _drafts(self, n: int, more: More | None) -> list[int]:
        drafts: list[int] = []
        row = np.empty(self._context.n_embd_out, dtype=np.float32)
        for i in range(n):
            best = self._context.best(i, with_prob=self._gate.p_min > 0 and not self._confident)
            if self._confident:
                self._context.hidden(i, row)
                sure = float(row[0])
                # In place of its lead over the second best, and as that in nats: how unlikely it is that it is wrong.
                best = Best(best.id, sure, -math.log(max(1 - sure, _LEAST)))
            if not self._gate.passes(best):
                break
            drafts.append(best.id)
            if more is not None:
                more(best)  # for the account of it alone: the next one is there
            if self._context.is_eog(best.id):
                break
        return drafts
