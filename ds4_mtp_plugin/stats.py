"""What speculation did: counters, a frozen snapshot of them, and the one-line report."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class MtpStats:
    """A snapshot of speculation's counters since the draft was attached.

    Attributes:
        iters: verify decodes, each of one sampled token and its drafts.
        proposed: drafts verified.
        accepted: drafts that the host's sampler then chose itself.
        proposed_per_position: drafts of the head verified at depth 1, 2, ...
        accepted_per_position: drafts of the head accepted at depth 1, 2, ...
        ngram_iters: of the iters those with drafts from the text itself.
        ngram_proposed: of the drafts verified those from the text.
        ngram_accepted: and those of them that were accepted.
        plain: single tokens decoded in a generation without drafts (no room, no hidden row yet, or a failure).
        evaluated: tokens of prompts that were evaluated, and those of an app's own `eval`.
        resumed: tokens of prompts that were not, because a checkpoint was behind them.
        failures: generations that something failed in, and that went on plainly.
        draft_decodes: decodes of the MTP head.
        draft_ms: time spent in drafting, milliseconds.
        verify_ms: time spent in verify decodes, milliseconds.
        depth: the greatest number of drafts of the head per cycle (num_pred_tokens after clamping).
        exact: the text is promised to be plain decoding's, byte for byte; it is where nothing is drafted.
    """

    iters: int = 0
    proposed: int = 0
    accepted: int = 0
    proposed_per_position: tuple[int, ...] = ()
    accepted_per_position: tuple[int, ...] = ()
    ngram_iters: int = 0
    ngram_proposed: int = 0
    ngram_accepted: int = 0
    plain: int = 0
    evaluated: int = 0
    resumed: int = 0
    failures: int = 0
    draft_decodes: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    depth: int = 0
    exact: bool = True

    @property
    def rate(self) -> float:
        """accepted / proposed, 0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def per_iter(self) -> float:
        """Accepted drafts per verify decode, 0 where there was none; each verify emits one token more than this."""
        return self.accepted / self.iters if self.iters else 0.0

    @property
    def rate_per_position(self) -> tuple[float, ...]:
        """Share of the drafts verified at depth 1, 2, ... that were accepted, which all before them were too."""
        return tuple(a / p if p else 0.0 for a, p in zip(self.accepted_per_position, self.proposed_per_position))

    @property
    def cycles_per_depth(self) -> tuple[int, ...]:
        """Cycles with 0, 1, 2, ... drafts of the head; one with 0 is a plain decode."""
        at_least = (*self.proposed_per_position, 0)
        return (self.plain, *(a - b for a, b in zip(at_least, at_least[1:])))

    def since(self, before: MtpStats) -> MtpStats:
        """What was counted since the snapshot `before` of the same draft."""

        def less(now: Any, then: Any) -> Any:
            if isinstance(now, tuple):
                return tuple(a - b for a, b in zip(now, then or (0,) * len(now)))
            return now - then

        counted = (each.name for each in fields(self) if each.name not in ("depth", "exact"))
        return replace(self, **{name: less(getattr(self, name), getattr(before, name)) for name in counted})

    def __str__(self) -> str:
        # The fields and their order are those of ds4's report (TrevorS/ds4, pull request 4); ours come behind them.
        return (
            f"mtp accept: iters={self.iters} proposed={self.proposed} accepted={self.accepted} "
            f"rate={100 * self.rate:.1f}% per_iter={self.per_iter:.2f} "
            f"exact={'yes' if self.exact else 'no'}"
            + (f" ngram={self.ngram_accepted}/{self.ngram_proposed}" if self.ngram_proposed else "")
            + (f" failures={self.failures}" if self.failures else "")
        )


class Counters:
    """The mutable side of MtpStats."""

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.exact = True
        self.iters = 0
        self.plain = 0
        self.evaluated = 0
        self.resumed = 0
        self.failures = 0
        self.draft_s = 0.0
        self.verify_s = 0.0
        self._proposed = [0] * depth
        self._accepted = [0] * depth
        self._ngram_iters = self._ngram_proposed = self._ngram_accepted = 0

    def verified(self, n_drafts: int, *, ready: bool = False) -> None:
        """A verify decode of `n_drafts` drafts was made; of those that lay ready, or of the head's."""
        self.iters += 1
        if ready:
            self._ngram_iters += 1
            self._ngram_proposed += n_drafts
            return
        for i in range(n_drafts):
            self._proposed[i] += 1

    def accepted(self, position: int, *, ready: bool = False) -> None:
        """The draft at depth `position` (from 0) was accepted."""
        if ready:
            self._ngram_accepted += 1
        else:
            self._accepted[position] += 1

    def snapshot(self, *, draft_decodes: int) -> MtpStats:
        return MtpStats(
            iters=self.iters,
            proposed=sum(self._proposed) + self._ngram_proposed,
            accepted=sum(self._accepted) + self._ngram_accepted,
            proposed_per_position=tuple(self._proposed),
            accepted_per_position=tuple(self._accepted),
            ngram_iters=self._ngram_iters,
            ngram_proposed=self._ngram_proposed,
            ngram_accepted=self._ngram_accepted,
            plain=self.plain,
            evaluated=self.evaluated,
            resumed=self.resumed,
            failures=self.failures,
            draft_decodes=draft_decodes,
            draft_ms=1000 * self.draft_s,
            verify_ms=1000 * self.verify_s,
            depth=self.depth,
            exact=self.exact,
        )
