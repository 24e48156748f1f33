"""How many tokens to draft next: a depth that is chosen by what is measured, and gates that end a draft early.

Neither looks at what the target would say, so both cost or save time and cannot change an exact text.
"""

from __future__ import annotations

import bisect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine import Best
from .times import Times


@dataclass(frozen=True)
class Gate:
    """Ends a draft at the first token that the head is not sure enough of.

    Attributes:
        p_min: least softmax probability of a draft (llama.cpp's ``--draft-p-min``); 0 lets every draft pass.
        margin: least lead of a draft over the second best logit (ds4's ``--mtp-margin``); 0 lets every draft pass.
    """

    p_min: float = 0.0
    margin: float = 0.0

    @property
    def open(self) -> bool:
        """Whether every draft passes, so that nobody has to know how sure the head is."""
        return self.p_min <= 0 and self.margin <= 0

    def passes(self, best: Best) -> bool:
        return best.prob >= self.p_min and best.margin >= self.margin


# The share of drafts that are right, before any was seen, and how many observations that counts for.
_PRIOR, _PRIOR_WEIGHT = 0.7, 2
# The least weight of a new observation: some twenty drafts are remembered. Of a probe's, which are few.
_WEIGHT, _PROBE_WEIGHT = 0.1, 0.3
# First drafts that are wrong in a row weigh as a probe's where chance would make so many of them less often than this,
# with the share that was right before, or with this one if more were: the text has changed.
_UNLIKELY, _MOST = 0.003, 0.9
# What a deeper draft that was not tried lately is believed to be, of the one before it, and how fast.
_DEEPER, _LIFT = 0.95, 0.02
# Drafting has to promise so much more than plain decoding to begin.
_HYSTERESIS = 0.03
# By how much the best logit of a draft leads (in nats), drafts are learned of apart; the least weight of a new one.
_LEADS, _LEAD_WEIGHT = (0.5, 1.0, 2.0, 4.0), 0.05
# What looking again may cost on average, and as long as a verified draft was right within so many single rows; how many
# looks may be owed while they are right; and how many are free where drafts paid for some time until now.
_PROBE_SHARE, _PROBE_SHARE_LATELY, _LATELY = 0.01, 0.02, 200
_PROBES_OWED, _PROBES_FREE, _SOME_TIME = 6, 4, 16
# Of drafts that lie ready so many are verified: fewer sizes are known sooner. With 7 a verify has 8 rows: more keep
# no graph (patches/0009-graphs-by-rows.patch), and GPUs take another kernel for them.
_READY_SIZES = (1, 2, 3, 4, 5, 7, 11, 16)
# Where nothing is measured, one that lies ready is verified as long as all up to it are as likely right as this.
_READY_LEAST = 0.5
# After so many cycles a single row is timed again, at first soon, later seldom. Where drafts gain little, one that was
# timed in a bad moment would make a loss of it, and is never left for long. So many of them decide; times before count
# no more if these are so much less.
_REFRESH, _REFRESH_AT_LAST, _LITTLE, _REFRESH_LITTLE, _AGAIN, _FASTER = 32, 256, 1.2, 48, 3, 0.95
# Where for so many single rows nothing was verified and no draft was right, so many seconds pass between two looks (and
# no more tokens than hidden rows are kept of), and the times of one look, or one rest, in so many are learned: Python
# takes a share of a small model's token.
_QUIET, _REST, _QUIETLY = 8, 0.01, 4


class AdaptiveDepth:
    """The depth at which a token costs least, by measured times and by how often drafts were right of late.

    With a1, a2, ... the share of drafts at a position that are right where all before them were, a cycle of k drafts
    gives 1 + a1 + a1 a2 + ... tokens, and takes the time of its k head steps and of a decode of k + 1 rows. Times are
    running medians of the real ones, by size. They are no straight line, so all depths are compared, 0 among them. At 0
    nothing is verified; from time to time the head is asked for one token, which is compared with the one that comes.
    Drafts that lie ready (`drafters.Ready`) come with rates of their own and no time of a head.

    How sure the head is of a draft says more of it than its position does. So once drafting pays on average, each step
    decides (`more`) whether the next one pays, and the end (`worth`) how many drafts are verified: what counts is the
    tokens that are gained over those that the same time gives on average.

    One object serves one Llama, over all of its generations. It reads no clock: whoever decodes tells it.
    """

    def __init__(self, n_max: int, *, at_once: bool = False) -> None:
        """
        Args:
            n_max: the greatest number of drafts of the head; 0 where there is none.
            at_once: the head makes them all in the time of one.
        """
        self.n_max = n_max
        self._at_once = at_once
        self._times = Times(at_once=at_once)
        self._table_of, self._table_then = -1, ([0.0], [0.0])  # of which version of the times
        self._rates = [_PRIOR * _DEEPER**i for i in range(n_max)]
        self._seen = [0] * n_max
        # The same by the lead of the draft, where one of such a lead was seen.
        self._led: list[dict[int, tuple[float, int]]] = [{} for _ in range(n_max)]
        self._leads: list[int] = []  # of the drafts of this cycle
        self._pace = 0.0  # tokens per second, of the best depth on average
        # Of the drafts of this cycle: how likely all are right, the tokens that a verify gives, and for 0, 1, ...
        # drafts those beyond what its time gives on average.
        self._share = self._expected = 1.0
        self._gains: list[float] = []
        self._most = n_max  # how many drafts there is room for in this cycle
        self._worth = 0  # how many of them are verified
        self._current = n_max
        self._vain = 0  # with so many drafts, or fewer, drafting is known not to pay, and nothing was learned since
        self._cycles = 0  # since a single row was timed
        self._refresh = self._calm = _REFRESH  # as many of them until it is again, if drafts gain much
        self._again: list[float] = []  # the times of that
        self._single_before = math.inf  # the median until then
        self._cycles_drafted = 0  # since there was no drafting
        self._idle = 0  # decodes since the head's last draft, but for those of a rest
        self._quiet = 0  # single rows since the last verify, or right draft
        self._rests = 0  # how many there were
        self._budget = 0.0  # seconds that probes may take; below 0 they are owed
        self._probe = 0.0  # seconds that the last one took
        self._promising = False  # it was right
        self._offered = self._took = False  # drafts lay ready; they are verified
        self._since_right = _LATELY  # single rows since a first draft was right
        self.probing = False
        self.misses = 0  # first drafts in a row that were wrong
        self._before = self._rates[0] if n_max else 0.0  # the share of them that were right before those

    def choose(self, room: int) -> int:
        """How many tokens to draft next, at most `room`: 0 for a plain decode. `more` may end the draft before.

        Where that leaves `probing` True, one token is to be drafted all the same, and not verified.
        """
        room, self.probing, self._took, self._leads = min(room, self.n_max), False, False, []
        if room < 1 or not self._times.known or self._cycles >= self._refresh:
            return 0
        if room > self._vain:
            decodes, drafting = self._table()
            best, plain = 0, 1 / decodes[0]
            most, expected, share = plain, 1.0, 1.0
            for k in range(1, room + 1):
                share *= self._rates[k - 1]
                expected += share
                if (value := expected / (decodes[k] + drafting[k])) > most:
                    best, most = k, value
            if self._current == 0 and most <= plain * (1 + _HYSTERESIS):
                best = 0
            self._refresh = self._calm if best > 0 and most > _LITTLE * plain else min(self._calm, _REFRESH_LITTLE)
            if best > 0:
                self._current, self._pace, self._most = best, most, room
                self._share = self._expected = 1.0
                self._gains = [1.0 - most * decodes[0]]
                return room
            self._vain = room
        if self._current > 0:
            paid = self._cycles_drafted >= _SOME_TIME
            self._current, self._cycles_drafted = 0, 0
            if paid:
                self._times.doubt_soon()
            self._budget = _PROBES_FREE * self._draft(1) if paid else min(self._budget, 0.0)
        least = -_PROBES_OWED * self._probe if self._promising else 0.0
        self.probing = self._budget > least and self._could_pay(room)
        return 0

    def more(self, best: Best) -> bool:
        """The head drafted `best`, behind what it drafted before in this cycle: whether one more is to be drafted."""
        lead, made = bisect.bisect(_LEADS, best.margin), len(self._leads) + 1
        self._leads.append(lead)
        if self.probing:
            return False
        rate, _ = self._led[made - 1].get(lead, (self._rates[made - 1], 0))
        self._share *= rate
        self._expected += self._share
        decodes, drafting = self._table()
        self._gains.append(self._expected - self._pace * decodes[made])
        if made >= self._most or self._at_once:
            return made < self._most
        expected, share, stop = self._expected, self._share, max(self._gains)
        for k in range(made + 1, self._most + 1):
            share *= self._rates[k - 1]
            expected += share
            if expected - self._pace * (decodes[k] + drafting[k] - drafting[made]) > stop:
                return True
        return False

    def worth(self, n: int) -> int:
        """How many of the `n` drafts of the head to verify; 0 for a plain decode, beside which the first is counted."""
        gains = self._gains[: n + 1]
        self._worth = 0 if self.probing else gains.index(max(gains))
        return self._worth

    def take(self, rates: Sequence[float]) -> int:
        """How many of the drafts that lie ready to verify, instead of what `choose` has just said; 0 for none.

        Args:
            rates: for each of them the share of such drafts that are right, where all before it were.
        """
        self._offered = len(rates) > 0
        if not rates or not self._times.known or self._cycles >= self._refresh:
            return 0
        sizes = [k for k in _READY_SIZES if k <= len(rates)]
        values = [self._value(rates[:k]) for k in sizes]
        best = max(range(len(sizes)), key=values.__getitem__)
        n = self._current
        if values[best] <= max(self._value(self._rates[:n], self._draft(n)), self._value(())):
            return 0
        self.probing, self._took = False, True
        return sizes[best]

    def drafted(self, n: int, seconds: float) -> None:
        """The head made n drafts in so many seconds."""
        if self.probing:
            self._probe = seconds
            self._budget -= seconds
            if seconds < self._draft(1):  # in spite of what it had to catch up with
                self._times.drafted(1, seconds)
        elif self._idle == 0:  # else it had to catch up with rows that it did not draft for
            self._times.drafted(n, seconds)
        self._idle = 0

    def decoded(self, n_rows: int, seconds: float) -> None:
        """The target decoded so many rows in so many seconds: one row plainly, or a verify."""
        if n_rows == 1:
            known = (self._vain > 0 or self.n_max == 0) and self._cycles == 0 and self._idle >= _QUIET
            if known and self._idle % _QUIETLY > 0 or self.rest > 0:
                self._times.passed(1, seconds)
            else:
                self._times.decoded(1, seconds)
                self._check(seconds)
                self._vain = 0
            self._passed(1, seconds)
            self._idle += 1
        else:
            self._times.decoded(n_rows, seconds)
            self._vain = 0
            self._cycles += 1
            self._quiet = 0
            if self._took:
                self._idle += 1
            else:
                self._cycles_drafted += 1

    @property
    def rest(self) -> int:
        """How many tokens to decode one by one, and to tell of at once (`rested`), before any is drafted again."""
        if self._current > 0 or self._quiet < _QUIET or self._offered:
            return 0
        return int(_REST / self._decode(1))

    def rested(self, n: int, each: float) -> None:
        """n tokens of a rest were decoded, each in so many seconds."""
        self._rests += 1
        if self._rests % _QUIETLY > 0:
            self._times.passed(n, n * each)
        else:
            self._times.passed(n - 1, (n - 1) * each)
            self._times.decoded(1, each)
            self._single_before = self._times.single
            self._vain = 0
        self._passed(n, n * each)

    def outcome(self, position: int, right: bool) -> None:
        """The draft at `position` (from 0), all before which were right, was the next token or was not."""
        self._seen[position] += 1
        least = _PROBE_WEIGHT if self.probing else _WEIGHT
        if position == 0:
            self.misses = 0 if right else self.misses + 1
            if (1 - min(self._before, _MOST)) ** self.misses < _UNLIKELY:
                least = _PROBE_WEIGHT
        weight = max(least, 1 / (self._seen[position] + _PRIOR_WEIGHT))
        if position < len(self._leads):
            lead, led = self._leads[position], self._led[position]
            rate, n = led.get(lead, (self._rates[position], 1))
            led[lead] = rate + max(_LEAD_WEIGHT, 1 / (n + 1)) * (right - rate), n + 1
        self._rates[position] += weight * (right - self._rates[position])
        if position == 0 and right:
            self._before, self._quiet, self._vain = self._rates[0], 0, 0
            if self._worth > 0:
                self._since_right = 0
        for deeper in range(max(position + 1, self._worth), self.n_max):
            believed, led = _DEEPER * self._rates[deeper - 1], self._led[deeper]
            if self._seen[deeper] == 0:
                self._rates[deeper] = believed
            elif right:
                self._rates[deeper] += _LIFT * max(0.0, believed - self._rates[deeper])
                for lead, (rate, n) in led.items():
                    led[lead] = rate + _LIFT * max(0.0, believed - rate), n
        if self.probing:
            self.probing, self._promising = False, right

    def times(self) -> tuple[dict[int, float], dict[int, float]]:
        """Medians of the last times, in seconds: of decodes by their rows, and of drafting by the number of drafts."""
        return self._times.medians()

    # -- inside --

    def _passed(self, n: int, seconds: float) -> None:
        """n single rows took so many seconds."""
        self._quiet += n
        self._since_right += n
        self._budget += (_PROBE_SHARE if self._since_right > _LATELY else _PROBE_SHARE_LATELY) * seconds

    def _check(self, seconds: float) -> None:
        """A single row took so long. Where it was due to be timed again and was no faster than is believed, one is
        enough."""
        if self._cycles >= self._refresh:
            self._again.append(seconds)
            faster = sorted(self._again)[len(self._again) // 2] < _FASTER * self._single_before
            if faster and len(self._again) < _AGAIN:
                return
            self._refresh = self._calm = min(2 * self._calm, _REFRESH_AT_LAST)
            if faster:
                self._times.replace_single(self._again)
                self._refresh = self._calm = _REFRESH
        self._cycles, self._again = 0, []
        self._single_before = self._times.single

    def _value(self, rates: Sequence[float], seconds: float = 0.0) -> float:
        """Tokens per second with drafts of such rates, which take so many seconds to make."""
        return _expected(rates) / (self._decode(len(rates) + 1) + seconds)

    def _table(self) -> tuple[list[float], list[float]]:
        """Seconds of decodes of 1, 2, ... rows, and of 0, 1, ... drafts of the head."""
        if self._table_of != self._times.version:
            version, sizes = self._times.version, range(self.n_max + 1)
            self._table_then = [self._decode(k + 1) for k in sizes], [self._draft(k) for k in sizes]
            self._table_of = version  # last: an exception from outside may come before
        return self._table_then

    def _decode(self, n_rows: int) -> float:
        return self._times.decode(n_rows)

    def _draft(self, k: int) -> float:
        return self._times.draft(k)

    def _could_pay(self, room: int) -> bool:
        """Whether any depth would, were every draft right."""
        return any(
            self._value((1.0,) * k, self._draft(k)) > self._value(()) * (1 + _HYSTERESIS) for k in range(1, room + 1)
        )


@dataclass(frozen=True)
class Costs:
    """What is believed of a machine whose clock is not asked.

    Attributes:
        rows: what decodes of some numbers of rows take, by that number; in between, and behind, in proportion.
        step: what a step of the head takes. A single row takes 1.
    """

    rows: tuple[tuple[int, float], ...]
    step: float

    def decode(self, n_rows: int) -> float:
        at = min(max(1, bisect.bisect_left(self.rows, (n_rows, 0.0))), len(self.rows) - 1)
        (n0, before), (n1, behind) = self.rows[at - 1], self.rows[at]
        return before + (n_rows - n0) * (behind - before) / (n1 - n0)


# An H100 with 12 layers of DeepSeek-V4-Flash's widths, and a CPU where rows are dear.
GPU_COSTS = Costs(((1, 1.0), (2, 1.09), (3, 1.26), (4, 1.45), (5, 1.63), (8, 2.14), (9, 3.05), (17, 4.0)), 0.15)
CPU_COSTS = Costs(((1, 1.0), (2, 1.4), (4, 2.1), (17, 6.0)), 0.15)


class NominalDepth(AdaptiveDepth):
    """An `AdaptiveDepth` that asks no clock: costs are believed, and what was accepted of late alone decides.

    So a rerun drafts what the run did, and gives the same text also where a row rounds otherwise in a verify than
    alone.
    """

    def __init__(self, n_max: int, costs: Costs, *, at_once: bool = False) -> None:
        super().__init__(n_max, at_once=at_once)
        self._costs = costs
        for _ in range(2):  # the first one is not believed
            self._times.decoded(1, 1.0)

    def drafted(self, n: int, seconds: float) -> None:
        super().drafted(n, self._draft(n))

    def decoded(self, n_rows: int, seconds: float) -> None:
        super().decoded(n_rows, self._decode(n_rows))
        self._cycles = 0  # no time has to be taken again

    def _decode(self, n_rows: int) -> float:
        return self._costs.decode(n_rows)

    def _draft(self, k: int) -> float:
        return self._costs.step * (min(k, 1) if self._at_once else k)


class FixedDepth(AdaptiveDepth):
    """Always as many drafts as there is room for, up to n_max; measured as an `AdaptiveDepth` measures.

    What lies ready goes first where more of it is expected to be right. No time has a say, so a rerun does the same.
    """

    def __init__(self, n_max: int, *, text: bool = True) -> None:
        """
        Args:
            text: whether to take what lies ready.
        """
        super().__init__(n_max)
        self._text = text

    def choose(self, room: int) -> int:
        self.probing = self._took = False
        self._most = max(0, min(room, self.n_max))
        return self._most

    def more(self, best: Best) -> bool:
        return True

    def worth(self, n: int) -> int:
        self._worth = n
        return n

    @property
    def rest(self) -> int:
        return 0 if self.n_max > 0 or self._text else sys.maxsize

    def take(self, rates: Sequence[float]) -> int:
        share, k = 1.0, 0
        for rate in rates:
            share *= rate
            if share < _READY_LEAST:
                break
            k += 1
        self._took = self._text and k > 0 and _expected(rates[:k]) >= _expected(self._rates[: self._most])
        return k if self._took else 0


def _expected(rates: Sequence[float]) -> float:
    """Tokens that a verify gives, with the share of drafts that are right where all before them were."""
    tokens = share = 1.0
    for rate in rates:
        share *= rate
        tokens += share
    return tokens
