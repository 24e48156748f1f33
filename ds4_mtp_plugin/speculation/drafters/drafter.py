"""The interface of what proposes tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ...engine import Best, Floats

More = Callable[[Best], bool]


class Ready(NamedTuple):
    """Drafts that cost nothing to make.

    Attributes:
        rates: for each of them the share of such drafts that are right, where all before it were.
    """

    tokens: Sequence[int]
    rates: Sequence[float]


NOTHING_READY = Ready((), ())


class Drafter(Protocol):
    """Proposes tokens for sequences whose committed text it follows, by position.

    A drafter keeps no account of what it drafted: a draft is not committed until `process` says so, and a drafter may
    forget anything at any time. What it proposes changes no text, only how fast it comes.

    Calls come from one thread at a time. For each sequence they come in this order, any number of times: `rollback`
    where committed text was taken back, `process` for every token that was committed (a prompt in pieces of any
    length), and `draft`. Positions that `process` skips were evaluated by someone else: what lies before such a gap is
    of no use for drafting behind it. A drafter that has no basis for a draft (no hidden row of the token before, or an
    unknown sequence) returns none. Before `draft` may come `ready`, with the same arguments.

    Failures of its own are EngineErrors. Speculation then ends until the next generation, and the drafter is called
    again as if nothing had happened: it has to come out of a failure, or of any other exception that passes through it
    (a signal handler's, for instance), in a state that it can go on from.

    Attributes:
        window: how many of the newest committed rows the drafter can make use of. Hidden rows of older ones are not
            kept for it; at 0 none are, and the target's graph is that of plain decoding. It does not change.
        n_decodes: decodes made so far, for the statistics.
    """

    window: int

    @property
    def n_decodes(self) -> int: ...

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: Floats) -> None:
        """`tokens` were committed at positions n_past, n_past + 1, ...

        Args:
            hidden: hidden rows of the last n of them, shape (n, n_embd_out), n <= len(tokens). The drafter copies
                what it keeps: the array is the caller's.
        """

    def ready(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> Ready:
        """Up to `n_max` drafts that are there without a decode, and how likely each is; `NOTHING_READY` for none."""

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        """Up to `n_max` tokens (at least 1 is asked for) that may follow `id_last`.

        Args:
            n_past: the position of `id_last`, which was sampled and is not committed yet. All tokens below it are.
            more: told of each draft, it says whether one more is to be made; None for always. Who makes all of its
                drafts at once need not ask.

        Raises:
            EngineError: it failed.
        """

    def rollback(self, seq_id: int, n_past: int) -> None:
        """Nothing at position `n_past` or behind is committed any more; 0 forgets the sequence."""

    def close(self) -> None:
        """Free what it holds. Afterwards `draft` raises an EngineError, and the other calls do nothing."""
