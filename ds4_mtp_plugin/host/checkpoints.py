"""States at the boundaries of a prompt's batches, so that a prompt that begins like the last one is read from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Checkpoint:
    """What memory needs to go on behind position n, besides the compressed rows, which stay in it.

    Attributes:
        n: the number of tokens before it.
        data: the engine's partial state (llama.h, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY).
        batches: the large batches that its text was evaluated in (`Ledger.save`).
        exact: evaluating a text that goes on behind it from its beginning would cut it there too.
    """

    n: int
    data: bytes
    batches: list[tuple[int, int]]
    exact: bool


class Checkpoints:
    """The checkpoints of one text, by position, in no more than so many bytes.

    A checkpoint is of use as long as memory keeps the rows before it as they were: `cut` drops those that evaluating
    something else, or clearing, has made void.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._text: npt.NDArray[np.intc] = np.empty(0, dtype=np.intc)
        self._all: list[Checkpoint] = []

    def add(
        self, text: npt.NDArray[np.intc], data: bytes, batches: list[tuple[int, int]], *, exact: bool = True
    ) -> None:
        """Behind `text`, which is the last checkpoint's text and more. Where there are too many, others go."""
        if len(data) > self.max_bytes:
            return
        self.cut(len(text) - 1)
        self._text = text.copy()
        self._all.append(Checkpoint(len(text), data, batches, exact))
        while sum(len(each.data) for each in self._all) > self.max_bytes:
            # The one whose neighbours are nearest to each other, measured from the end of the text: late positions
            # stay dense, where edits are likely, and early ones within reach.
            ends = [0, *(each.n for each in self._all)]
            end = ends[-1] + ends[1]
            del self._all[
                min(range(len(self._all) - 1), key=lambda i: (ends[i + 2] - ends[i]) / (end - ends[i + 1]), default=0)
            ]

    def find(self, tokens: Sequence[int]) -> Checkpoint | None:
        """The last one behind which `tokens` goes on: of its text `tokens` has all, and at least one token more."""
        pairs = enumerate(zip(self._text.tolist(), tokens))  # one by one: what is no token is the host's to refuse
        same = next((i for i, (a, b) in pairs if a != b), min(len(self._text), len(tokens)))
        return next((each for each in reversed(self._all) if each.n <= same and each.n < len(tokens)), None)

    def cut(self, n: int) -> None:
        """What lies behind position n is no longer what it was."""
        while self._all and self._all[-1].n > n:
            self._all.pop()

    def __len__(self) -> int:
        return len(self._all)
