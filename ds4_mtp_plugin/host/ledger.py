"""What the engine's memory holds of a Llama's text, in which batches it was evaluated, and whether that is sure."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType


class Ledger:
    """The account of one sequence of tokens in the engine's memory.

    Rows depend on the batch that they were evaluated in where that was a large one (a prompt); rows of batches of up
    to `single_rows` are computed as if each were alone. So text that has to be evaluated again, because memory was
    lost, is evaluated in the large batches that it was in: then it gives the same rows.

    Attributes:
        known: positions 0 <= p < known hold the tokens that the Llama evaluated there. Behind them an app may have
            decoded what the Llama does not know (rows of an image).
        sure: whether memory holds what the account says. It does not while a change of both is under way, and where
            an exception ended one.
        under_way: whether a change of both is under way. An exception from outside that comes as one ends may leave it
            set until the next change.
    """

    def __init__(self, single_rows: int) -> None:
        self._single_rows = single_rows
        self._large: list[tuple[int, int]] = []  # (position, rows) of the large batches, by position
        self.known = 0
        self.sure = True
        self.under_way = False

    def forget(self) -> None:
        """Memory is empty, or about to be."""
        self._large, self.known, self.sure = [], 0, True

    def changing(self) -> Change:
        """A context in which memory and account change together; only a normal exit makes them sure again."""
        return Change(self)

    def evaluated(self, n_past: int, n: int) -> None:
        """The Llama evaluated n tokens at position n_past in one batch. What lay behind n_past is gone."""
        if n_past > self.known:
            return  # behind rows that the Llama does not know
        if self._large and sum(self._large[-1]) > n_past:
            self._large = [(p, min(rows, n_past - p)) for p, rows in self._large if p < n_past]
        if n > self._single_rows:
            self._large.append((n_past, n))
        self.known = n_past + n

    def batches(self) -> Iterator[tuple[int, int]]:
        """The known positions as batches (first, end) to evaluate them in again."""
        at = 0
        for start, rows in [*self._large, (self.known, 0)]:
            while at < start:
                yield at, min(at + self._single_rows, start)
                at = min(at + self._single_rows, start)
            if rows:
                yield start, start + rows
                at = start + rows

    def save(self) -> list[tuple[int, int]]:
        """What a saved state has to carry along: the large batches."""
        return self._large[:]

    def load(self, n_tokens: int, large: list[tuple[int, int]] | None, known: int | None = None) -> None:
        """A state of n_tokens was loaded into memory.

        Args:
            large: what `save` said of it; None for a state that a Llama without a draft saved, which most likely
                holds a prompt.
            known: `known` as it was saved; None where that is all of it.
        """
        if large is None:
            large = [(0, n_tokens)] if n_tokens > self._single_rows else []
        self._large, self.known = large[:], n_tokens if known is None else min(known, n_tokens)


class Change:
    """A change of memory and account (see `Ledger.changing`)."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __enter__(self) -> Change:
        self._ledger.sure, self._ledger.under_way = False, True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ledger.under_way = False
        if kind is None:
            self._ledger.sure = True
