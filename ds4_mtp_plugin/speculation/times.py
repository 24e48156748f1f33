"""How long decodes and drafts take on a machine that has other work too, by their size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

# Decodes of one size whose median counts, and the fewest that are believed at first.
_RECENT, _BELIEVED = 9, 3
# What was not timed in so many decodes is to be timed again, for the machine may have been busy then: first soon, then
# each time twice as late, at last seldom; and not before so many times as long has passed, for it may well be as slow
# again. Old times count again where the first new one is no less than this share.
_STALE, _STALE_AT_LAST, _STALE_TIMES, _CONFIRMED = 64, 1024, 20, 0.8

# A median that moves by no more than this share of what is believed changes nothing.
_NEGLIGIBLE = 0.01


class _Size:
    """Seconds of the last decodes of one size."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.n = self.at = 0
        self.clock = 0.0
        self.median = self.least = math.inf
        self.stale = False

    def add(self, seconds: float, at: int, clock: float) -> None:
        """`at` is the number of decodes until then, `clock` the seconds of all of them."""
        self._recent.append(seconds)
        ordered = sorted(self._recent)
        self.n, self.at, self.clock = self.n + 1, at, clock
        self.median, self.least = ordered[(len(ordered) - 1) // 2], ordered[0]


class Times:
    """What decodes of so many rows, and so many drafts, are believed to take: running medians of the last real ones.

    It reads no clock: whoever decodes tells it. Times of another number are guessed a little low, so that it is tried.
    """

    def __init__(self, *, at_once: bool) -> None:
        """
        Args:
            at_once: the head makes all drafts in the time of one.
        """
        self._at_once = at_once
        self._decodes: dict[int, _Size] = {}  # by number of rows
        self._drafts: dict[int, _Size] = {}  # by number of drafts
        # Of both the medians that are believed, and what follows for all sizes: until the next time is known.
        self._medians: tuple[dict[int, float], dict[int, float]] = {}, {}
        self._believed: tuple[dict[int, float], dict[int, float]] = {}, {}
        self._enough = _BELIEVED
        # The number of decodes, that at which old times are looked for, and for how many they have not been.
        self._now, self._doubts_at, self._stale = 0, _STALE, _STALE
        self._clock = 0.0  # the seconds of all decodes
        self.version = 0  # of what is believed
        self._latest = [0, 0]  # of decodes and of drafts the size that was timed last
        self._begun: set[tuple[str, int]] = set()  # whose first time was dropped: it builds graphs

    @property
    def known(self) -> bool:
        """Whether a single row was timed: before that nothing else can be guessed."""
        return 1 in self._medians[0]

    @property
    def single(self) -> float:
        """The median of the last single rows, infinite where none was timed."""
        return self._decodes[1].median if self.known else math.inf

    def decoded(self, n_rows: int, seconds: float) -> None:
        """A decode of so many rows took so many seconds."""
        self.passed(1, seconds)
        self._note(self._decodes, "decode", n_rows, seconds)
        if self._now >= self._doubts_at:
            self._doubt()

    def passed(self, n: int, seconds: float) -> None:
        """n decodes took so many seconds, of which nothing is learned."""
        self._now += n
        self._clock += seconds

    def drafted(self, n: int, seconds: float) -> None:
        """n drafts took so many seconds."""
        self._note(self._drafts, "draft", n, seconds)

    def replace_single(self, seconds: Iterable[float]) -> None:
        """These are the times of single rows; those before count no more."""
        self._decodes[1] = _Size()
        for each in seconds:
            self._decodes[1].add(each, self._now, self._clock)
        self._changed(drafts=False)

    def doubt_soon(self) -> None:
        """Look for old times soon again: drafting had paid, or what was believed was wrong."""
        self._stale, self._doubts_at = _STALE, self._now + _STALE

    def medians(self) -> tuple[dict[int, float], dict[int, float]]:
        """Of the last times, in seconds: of decodes by their rows, and of drafting by the number of drafts."""
        of_decodes, of_drafts = (
            {n: each.median for n, each in sorted(times.items())} for times in (self._decodes, self._drafts)
        )
        return of_decodes, of_drafts

    def decode(self, n_rows: int) -> float:
        """Seconds of a decode: measured, or a little less than what the measured ones suggest, so that it is tried."""
        believed = self._believed[0]
        if n_rows not in believed:
            medians, tried = self._medians[0], self._decodes.get(n_rows)
            bounds = [median for n, median in medians.items() if n > n_rows]
            if tried is not None:
                bounds.append(tried.least)
            believed[n_rows] = min(self._guess(n_rows, medians), *bounds, math.inf)
        return believed[n_rows]

    def draft(self, k: int) -> float:
        """Seconds of k drafts: measured, or in proportion to the nearest number that is.

        None take longer than more of them, nor than one does k times.
        """
        if k == 0:
            return 0.0
        believed = self._believed[1]
        if k not in believed:
            medians, seconds = self._medians[1], math.inf
            at = self._drafts[k].at if k in medians else 0
            for n, median in medians.items():
                if self._drafts[n].at >= at:
                    seconds = min(seconds, median if n >= k or self._at_once else median * k / n)
            if k not in medians and medians and not self._at_once:
                near = min(medians, key=lambda n: abs(n - k))
                seconds = min(seconds, medians[near] * k / near)
            elif not medians:
                per_draft = (each.least / (1 if self._at_once else n) for n, each in self._drafts.items())
                seconds = min(0.1 * self.decode(1), *per_draft, math.inf) * (1 if self._at_once else k)
            believed[k] = seconds
        return believed[k]

    # -- inside --

    def _note(self, times: dict[int, _Size], kind: str, n: int, seconds: float) -> None:
        if (kind, n) not in self._begun:
            self._begun.add((kind, n))
            return
        if n not in times or (times[n].stale and seconds < _CONFIRMED * times[n].median):
            if n in times:
                self.doubt_soon()
            each = _Size()
        else:
            each = times[n]
        was_stale, each.stale = each.stale, False
        each.add(seconds, self._now, self._clock)
        times[n] = each  # with a time: an exception from outside may come before
        drafts = times is self._drafts
        believed = self._medians[drafts].get(n, 0.0)
        moved = abs(each.median - believed) > _NEGLIGIBLE * believed
        # Which size was timed last counts too (`_changed`).
        if moved or was_stale or each.n <= self._enough or n != self._latest[drafts]:
            self._changed(drafts=drafts)
            self._latest[drafts] = n

    def _changed(self, drafts: bool) -> None:
        """A time of drafts, or of decodes, is new or too old.

        None is believed to take longer than what had more rows since: another process was in the way. Single rows count
        from the first on.
        """
        self.version += 1
        of_decodes, of_drafts = self._medians
        times = self._drafts if drafts else self._decodes
        medians = {n: each.median for n, each in times.items() if each.n >= self._enough and not each.stale}
        if drafts:
            of_drafts = medians
        else:
            if 1 in times:
                medians[1] = times[1].median
            of_decodes = {
                n: min(least for m, least in medians.items() if m >= n and times[m].at >= times[n].at) for n in medians
            }
        self._medians = of_decodes, of_drafts
        self._believed = (self._believed[0] if drafts else of_decodes.copy()), {}

    def _doubt(self) -> None:
        """What was not timed lately, but single rows: those have a time of their own to be timed again."""
        for times in (self._decodes, self._drafts):
            for n, each in times.items():
                old = self._now - each.at >= self._stale and self._clock - each.clock >= _STALE_TIMES * each.median
                each.stale |= old and (times is self._drafts or n > 1)
        self._enough, self._stale = 2, min(2 * self._stale, _STALE_AT_LAST)
        self._doubts_at = self._now + self._stale
        self._changed(drafts=True)
        self._changed(drafts=False)

    def _guess(self, n_rows: int, medians: dict[int, float]) -> float:
        below = max(n for n in medians if n < n_rows)
        above = min((n for n in medians if n > n_rows), default=None)
        if above is not None:
            slope = 0.4 * (medians[above] - medians[below]) / (above - below)
        elif below > 1:
            slope = 0.8 * (medians[below] - medians[1]) / (below - 1)
        else:
            slope = 0.15 * medians[1]
        return medians[below] + max(0.0, slope) * (n_rows - below)
