"""The cycle of speculative decoding for a sequence: draft, verify, accept, rollback. Knows no host runtime.

The names follow llama.cpp's ``common_speculative``; the cycle differs from it in two ways. It is continuous: the token
that was sampled last is not decoded alone, it is the first row of the verify (antirez/ds4, pull request 371). And the
drafter is told what was committed, by position, and keeps no account of what it drafted (am17an/llama.cpp, pull
request 6).

One cycle at position p, where ``id_last`` was sampled and is not decoded yet::

    drafts = spec.draft(seq, p, id_last, n_max)     # K MTP decodes
    spec.verify(seq, p, id_last, drafts)            # one target decode of K + 1 rows
    # the caller samples row 0, 1, ... until a sample is not the draft that follows
    spec.accept(seq, n_accepted)                    # rows behind the accepted ones are removed, once
"""

from __future__ import annotations

import dataclasses as _dataclasses
import time as _time
import typing as _t

import numpy as _np

from . import engine as _engine
from .stats import Counters as _Counters
from .stats import MtpStats as _MtpStats


class RollbackRefused(RuntimeError):
    """The target's memory cannot take back the rejected rows; only clearing and evaluating anew helps."""


class Drafter(_t.Protocol):
    """What proposes tokens. It follows the committed text by position and may forget at any time."""

    # How many of the newest committed rows it can make use of: older hidden rows need not be kept for it.
    window: int
    # Decodes made so far.
    n_decodes: int

    def process(self, seq_id: int, n_past: int, tokens: _t.Sequence[int], hidden: _engine.Floats) -> None:
        """`tokens` were committed at n_past, n_past + 1, ...; `hidden` (n, n_embd_out) is of the last n of them."""

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> list[int]:
        """Up to `n_max` tokens to follow `id_last` at position `n_past`; none where it has no basis for them."""

    def rollback(self, seq_id: int, n_past: int) -> None:
        """Nothing at or behind position `n_past` is committed any more."""

    def close(self) -> None: ...


@_dataclasses.dataclass
class _Verify:
    """The last verify decode of a sequence: rows n_past .. n_past + len(drafts), of which row 0 is committed."""

    n_past: int
    tokens: list[int]
    hidden: _engine.Floats


class CommonSpeculative:
    """Speculation over a target context and a drafter, for any number of sequences of the target.

    After ``verify`` and until ``accept`` the target's memory holds rows that nobody has committed; no other decode of
    the sequence may come between.
    """

    def __init__(self, target: _engine.Context, drafter: Drafter, *, n_draft: int) -> None:
        """
        Args:
            n_draft: the greatest number of drafts a cycle. The target must be able to roll back as many rows
                (``n_rs_seq``) and take one more in a micro-batch.

        Raises:
            ValueError: the target cannot verify `n_draft` drafts.
        """
        if n_draft < 1:
            raise ValueError(f"n_draft is {n_draft}, expected 1 or more")
        if target.n_rs_seq < n_draft:
            raise ValueError(f"the target context rolls back {target.n_rs_seq} rows, {n_draft} drafts need {n_draft}")
        if min(target.n_batch, target.n_ubatch) < n_draft + 1:
            raise ValueError(f"a micro-batch of {target.n_ubatch} rows cannot verify {n_draft} drafts")
        self.target = target
        self.drafter = drafter
        self.n_draft = n_draft
        self.counters = _Counters(n_draft)
        self._batch = _engine.Batch(n_draft + 1)
        self._verify: dict[int, _Verify] = {}

    def begin(self, seq_id: int) -> None:
        """The sequence starts anew: forget what is known of it. The caller clears the target's memory."""
        self._verify.pop(seq_id, None)
        self.drafter.rollback(seq_id, 0)

    def process(self, seq_id: int, n_past: int, tokens: _t.Sequence[int], hidden: _engine.Floats) -> None:
        """The caller decoded `tokens` at n_past, ... into the target and committed them.

        Args:
            hidden: hidden rows of the last tokens, shape (n, target.n_embd_out), n <= len(tokens), at most
                ``drafter.window`` of them of use.
        """
        self.drafter.rollback(seq_id, n_past)
        self.drafter.process(seq_id, n_past, tokens, hidden)

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> list[int]:
        """Up to `n_max` drafts to follow `id_last` at `n_past`, clamped to n_draft and to the room in the context."""
        n_max = min(n_max, self.n_draft, self.target.n_ctx // self.target.n_seq_max - 1 - n_past)
        if n_max < 1:
            return []
        t0 = _time.perf_counter()
        drafts = self.drafter.draft(seq_id, n_past, id_last, n_max)
        self.counters.draft_s += _time.perf_counter() - t0
        # What is no token of the target is no draft: its decode would fail, and take the verified rows with it.
        no_token = (i for i, token in enumerate(drafts) if not 0 <= token < self.target.n_vocab)
        return drafts[: next(no_token, None)]

    def verify(self, seq_id: int, n_past: int, id_last: int, drafts: _t.Sequence[int]) -> None:
        """Decode ``[id_last, *drafts]`` at `n_past` in one micro-batch; every row has logits, row 0 is committed.

        Raises:
            DecodeError: the target's decode failed; nothing was committed.
        """
        assert seq_id not in self._verify, "accept() comes before the next verify()"
        tokens = [id_last, *drafts]
        t0 = _time.perf_counter()
        self.target.set_hidden(_engine.HIDDEN_OUTPUTS)
        self.target.decode(self._batch.set(tokens, n_past, seq_id, outputs="all"))
        # Hidden rows die at the context's next decode, which may be another sequence's.
        hidden = _np.empty((len(tokens), self.target.n_embd_out), dtype=_np.float32)
        for i in range(len(tokens)):
            self.target.hidden(i, hidden[i])
        self.counters.verify_s += _time.perf_counter() - t0
        self.counters.verified(len(drafts))
        self._verify[seq_id] = _Verify(n_past, tokens, hidden)

    def accept(self, seq_id: int, n_accepted: int) -> None:
        """Of the last verify, `n_accepted` drafts are committed (and row 0); the rows behind them are removed.

        Raises:
            RollbackRefused: the target could not remove them; its memory of the sequence is of no use.
        """
        v = self._verify.pop(seq_id)
        n_past = v.n_past + 1 + n_accepted
        # The drafter's rows from v.n_past + 1 on were built on its own hidden rows: they go, accepted or not, and
        # come back with the true ones when it drafts next.
        self.drafter.rollback(seq_id, v.n_past + 1)
        self.drafter.process(seq_id, v.n_past, v.tokens[: n_accepted + 1], v.hidden[: n_accepted + 1])
        if n_accepted + 1 < len(v.tokens) and not self.target.seq_rm(seq_id, n_past):
            raise RollbackRefused(f"sequence {seq_id}: the engine refused to remove positions {n_past} and up")

    def stats(self) -> _MtpStats:
        return self.counters.snapshot(draft_decodes=self.drafter.n_decodes)

    def close(self) -> None:
        """Free what the drafter holds. The target is the caller's."""
        self.drafter.close()
