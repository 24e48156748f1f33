"""A model's MTP (NextN) head as a drafter.

The head pairs the hidden row of position q - 1 with the token at q and predicts the token at q + 1 (DeepSeek-V3
report, arXiv:2412.19437, section 2.2; llama.cpp, src/models/deepseek4.cpp, graph_mtp). Deeper drafts feed the head its
own hidden row. Where its one layer attends over a sliding window, what it proposes at p depends on the pairs
p - window + 1 .. p alone. A head that attends over everything is given the last `window` pairs of a prompt, and keeps
up to three times as many. So no older hidden row is ever kept, no older prompt row ever decoded, and the head's memory
is of one size whatever the target's context length.

Pairs wait in a ring until a draft is wanted and then go into one decode together with the newest one, whose output
is the first draft. So K drafts cost K decodes, and text that is not drafted for costs none. Behind much of it a head
with a window starts over with the newest few pairs.
"""

from __future__ import annotations

from collections.abc import Callable

from ...engine import HIDDEN_OUTPUTS, Batch, Context
from ..depth import Gate
from .drafter import More
from .rows import RowDrafter


class MtpDrafter(RowDrafter):
    """Drafts with the NextN block of a model."""

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
            context: an MTP context; and `window`, `gate`, `on_close`: as of `RowDrafter`.
        """
        super().__init__(
            context,
            window=window,
            width=context.n_embd_out,
            gate=gate,
            on_close=on_close,
        )
        self._batch = Batch(self.window, n_embd_out=context.n_embd_out)
        context.set_hidden(HIDDEN_OUTPUTS)

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        s = self._at(seq_id, n_past)
        if s is None:
            return []  # cold: the hidden row of n_past - 1 is not known
        start = self._start(seq_id, s, n_past, s.lo + 1)
        drafts: list[int] = []
        try:
            self._make_room(seq_id, s, start, n_past + n_max)
            n = n_past - start + 1
            self._batch.embd[:n] = s.hidden[self._places(start - 1, n_past)]
            tokens = [*s.tokens[self._places(start, n_past)].tolist(), id_last]
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
