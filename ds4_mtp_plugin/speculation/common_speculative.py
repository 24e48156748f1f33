"""The cycle of speculative decoding for a sequence: draft, verify, accept, rollback. Knows no host runtime.

The names follow llama.cpp's ``common_speculative``; the cycle differs from it in two ways. It is continuous: the token
that was sampled last is not decoded alone, it is the first row of the verify (antirez/ds4, pull request 371). And the
drafter is told what was committed, by position, and keeps no account of what it drafted (am17an/llama.cpp, pull
request 6).

One cycle at position p, where ``id_last`` was sampled and is not decoded yet::

    drafts = spec.draft(seq_id, p, id_last, n_max)      # K decodes of the head
    verify = spec.verify(seq_id, p, id_last, drafts)    # one decode of the target, K + 1 rows
    # the caller samples row 0, 1, ...; verify.advance(token) while a sample is the draft that follows
    spec.accept(verify)                                 # rows behind the one that was reached are removed, once
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine import HIDDEN_OUTPUTS, Batch, Context, EngineError, Floats, HiddenRows
from ..stats import Counters, MtpStats
from .drafters import NOTHING_READY, Drafter, More, Ready

# How many hidden rows of tokens that were decoded alone can be kept.
N_KEEP = 8


class RollbackRefused(EngineError):
    """The target's memory cannot take back the rejected rows; only clearing and evaluating anew helps."""


@dataclass(eq=False)
class Verify:
    """A verify decode: rows n_past, n_past + 1, ... of a sequence in the target's memory, and how far they are taken.

    It is open until `CommonSpeculative.accept` closes it. While it is open the memory holds rows that nobody has
    committed, behind position ``n_past + row``. Row 0 is committed from the start.

    Attributes:
        tokens: the token sampled last, then its drafts.
        hidden: their hidden rows, shape (len(tokens), n_hidden); none for a drafter that wants none. They live until
            the sequence's next verify, or until a row is kept.
        ready: the drafts lay ready.
        row: the last row that is committed.
    """

    seq_id: int
    n_past: int
    tokens: list[int]
    hidden: Floats
    ready: bool = False
    row: int = 0
    open: bool = True

    @property
    def expected(self) -> int | None:
        """The draft in the row behind the last committed one; None behind the last row, or once closed."""
        return self.tokens[self.row + 1] if self.open and self.row + 1 < len(self.tokens) else None

    @property
    def n_committed(self) -> int:
        """Positions that are committed: the position of the next token."""
        return self.n_past + self.row + 1

    @property
    def end(self) -> int:
        """The position behind its last row."""
        return self.n_past + len(self.tokens)

    def advance(self, token: int) -> bool:
        """Take one more row if `token` is the draft in it."""
        if self.expected != token:
            return False
        self.row += 1
        return True


class CommonSpeculative:
    """Speculation over a target context and a drafter, for any number of sequences of the target.

    It holds no state of a sequence that it needs: a `Verify` is the caller's until it is accepted, and between the two
    no other decode of that sequence may come.
    """

    def __init__(
        self,
        target: Context,
        drafter: Drafter,
        *,
        n_draft: int,
        n_asked: int | None = None,
        within: int | None = None,
    ) -> None:
        """
        Args:
            n_draft: the greatest number of drafts per cycle. The target must be able to roll back as many rows and take
                one more in a micro-batch.
            n_asked: the greatest number of them that the drafter is asked for (`draft`); None for n_draft.
            within: positions are in blocks of so many, and the rows of a verify all in one of them; None for no blocks.

        Raises:
            ValueError: the target cannot verify `n_draft` drafts.
        """
        if n_draft < 0:
            raise ValueError(f"n_draft is {n_draft}, expected 0 or more")
        if target.n_rollback < n_draft:
            raise ValueError(f"the target context rolls back {target.n_rollback} rows, {n_draft} drafts need {n_draft}")
        if min(target.n_batch, target.n_ubatch) < n_draft + 1:
            raise ValueError(f"a micro-batch of {target.n_ubatch} rows cannot verify {n_draft} drafts")
        self.target = target
        self.drafter = drafter
        self.n_draft = n_draft
        self._within = within
        self.counters = Counters(n_draft if n_asked is None else n_asked)
        self._batch = Batch(n_draft + 1)
        # Of a sequence the position behind what the drafter was told last, if nothing has come since: there it has
        # nothing to take back.
        self._told: dict[int, int] = {}
        # Of each the hidden rows of its last verify, or those that were kept. Behind a decode the caches are cold: to
        # allocate them anew takes as long as to copy.
        self._rows: dict[int, HiddenRows] = {}

    def begin(self, seq_id: int) -> None:
        """The sequence starts anew: forget what is known of it. The caller clears the target's memory."""
        self._told.pop(seq_id, None)
        self.drafter.rollback(seq_id, 0)

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: Floats) -> None:
        """The caller decoded `tokens` at n_past, n_past + 1, ... into the target and committed them.

        Args:
            hidden: hidden rows of the last n of them, shape (n, target.n_embd_out); more than ``drafter.window`` are
                of no use.
        """
        if self._told.pop(seq_id, None) != n_past:
            self.drafter.rollback(seq_id, n_past)
        self.drafter.process(seq_id, n_past, tokens, hidden)
        self._told[seq_id] = n_past + len(tokens)

    def ready(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> Ready:
        """Drafts that cost nothing to make, as `draft`."""
        n_max = self._room(n_past, n_max)
        return self.drafter.ready(seq_id, n_past, id_last, n_max) if n_max > 0 else NOTHING_READY

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        """Up to `n_max` drafts to follow `id_last` at position `n_past`; no more than n_draft, or than the context
        has room for, and none behind one at which `more` says so.

        Raises:
            EngineError: the drafter failed.
        """
        n_max = self._room(n_past, n_max)
        if n_max < 1:
            return []
        self._told.pop(seq_id, None)
        t0 = time.perf_counter()
        drafts = self.drafter.draft(seq_id, n_past, id_last, n_max, more)
        self.counters.draft_s += time.perf_counter() - t0
        # What is no token of the target is no draft: its decode would fail, and take the verified rows with it.
        no_token = (i for i, token in enumerate(drafts) if not 0 <= token < self.target.n_vocab)
        return drafts[: next(no_token, None)]

    def verify(self, seq_id: int, n_past: int, id_last: int, drafts: Sequence[int], *, ready: bool = False) -> Verify:
        """Decode ``[id_last, *drafts]`` at `n_past` in one micro-batch; every row has logits.

        Args:
            ready: the drafts lay ready, for the statistics.

        Raises:
            EngineError: the decode failed; what the target's memory holds of the sequence is not known.
            DecodeAborted: the app's abort callback ended it; the same holds.
        """
        tokens = [id_last, *drafts]
        t0 = time.perf_counter()
        self.keep_hidden(HIDDEN_OUTPUTS)
        self.target.decode(self._batch.set(tokens, n_past, seq_id, outputs="all"))
        self.target.wait()
        # Hidden rows die at the context's next decode, which may be another sequence's.
        hidden = self.target.hidden_rows(0, len(tokens) if self.drafter.window else 0, self._rows_of(seq_id))
        self.counters.verify_s += time.perf_counter() - t0
        self.counters.verified(len(drafts), ready=ready)
        return Verify(seq_id, n_past, tokens, hidden, ready)

    def keep(self, seq_id: int, i: int) -> None:
        """The caller decoded a token alone: keep its hidden row as number `i` (from 0) of those for `process_kept`.

        They live until the sequence's next verify. N_KEEP fit.

        Raises:
            EngineError: the target kept none.
        """
        if self.drafter.window:
            self.target.hidden_rows(0, 1, self._rows_of(seq_id), i)

    def process_kept(self, seq_id: int, n_past: int, tokens: Sequence[int]) -> None:
        """`process`, with the hidden rows that were kept of all tokens."""
        n = len(tokens) if self.drafter.window else 0
        self.process(seq_id, n_past, tokens, self._rows_of(seq_id).array[:n])

    def keep_hidden(self, mode: int) -> None:
        """Which hidden rows the target keeps from its next decode on, if the drafter wants any."""
        if self.drafter.window:
            self.target.set_hidden(mode)

    def accept(self, verify: Verify) -> None:
        """Close `verify`: its rows up to ``verify.row`` are committed, those behind are removed.

        Raises:
            RollbackRefused: the target could not remove them; its memory of the sequence is of no use.
        """
        verify.open = False
        seq_id, n_past, n = verify.seq_id, verify.n_past, verify.row + 1
        self._told.pop(seq_id, None)
        # The drafter's rows from n_past + 1 on were built on its own hidden rows: they go, accepted or not, and come
        # back with the true ones when it drafts next.
        self.drafter.rollback(seq_id, n_past + 1)
        self.drafter.process(seq_id, n_past, verify.tokens[:n], verify.hidden[:n])
        if n < len(verify.tokens) and not self.target.seq_rm(seq_id, n_past + n):
            raise RollbackRefused(f"sequence {seq_id}: the engine refused to remove positions {n_past + n} and up")

    def _rows_of(self, seq_id: int) -> HiddenRows:
        rows = self._rows.get(seq_id)
        if rows is None:
            n = max(self.n_draft + 1, N_KEEP) if self.drafter.window else 0
            rows = self._rows[seq_id] = HiddenRows(n, self.target.n_hidden)
        return rows

    def _room(self, n_past: int, n_max: int) -> int:
        n_max = min(n_max, self.n_draft, self.target.n_ctx // self.target.n_seq_max - 1 - n_past)
        return n_max if self._within is None else min(n_max, self._within - 1 - n_past % self._within)

    def stats(self) -> MtpStats:
        return self.counters.snapshot(draft_decodes=self.drafter.n_decodes)

    def close(self) -> None:
        """Free what the drafter holds. The target is the caller's."""
        self.drafter.close()
