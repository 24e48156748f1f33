"""Text that repeats itself, as a drafter: what followed the last tokens when they came before.

Needs no head and no decode, so drafts lie ready at any time, for any model (the idea of prompt lookup decoding, Saxena
2023; llama.cpp, common/ngram-map.cpp). How often they are right depends on how long the match is, and is learned from
every token that comes, drafted or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...engine import EngineError, Floats
from .drafter import NOTHING_READY, More, Ready

# The shortest match that is looked for, and the length at which a match is as good as any.
_SHORTEST, _LONGEST = 3, 32
# How many earlier places are compared. Of equally long matches the last one counts.
_PLACES = 24
# Of more tokens at once, a prompt, runs are looked at as they come: the first cycle behind it would pay for them.
_MANY = 16
# Bits per token in a key.
_BITS = 24

# The share of drafts that are right behind a match of so many tokens and up, before any was seen; how many observations
# that counts for; and the least weight of a new one.
_PRIORS = {3: 0.4, 4: 0.5, 5: 0.6, 7: 0.7, 10: 0.8, 16: 0.9, 25: 0.95}
_PRIOR_WEIGHT, _WEIGHT = 4, 0.05
_BIN = [max(least for least in _PRIORS if least <= max(n, _SHORTEST)) for n in range(_LONGEST + 1)]


class _Sequence:
    """Committed tokens of one sequence, and where each run of `_SHORTEST` of them was last.

    Runs are looked at when a match is wanted (`index`), many at once. An exception from outside, at any line, leaves it
    usable: a place may be missing from `last`.
    """

    def __init__(self, lo: int) -> None:
        self.lo = lo  # the position of tokens[0]
        self.tokens: list[int] = []
        self.last: dict[int, int] = {}  # by key: the index of the last token of the run that came last
        # For each index, as far as runs were looked at: that of the same run before it, -1 for none.
        self.before: list[int] = []

    @property
    def hi(self) -> int:
        """The position behind the last token."""
        return self.lo + len(self.tokens)

    def add(self, tokens: Iterable[int]) -> None:
        self.tokens.extend(map(int, tokens))

    def index(self) -> None:
        """Look at the runs that came since it was last called."""
        text, before, last = self.tokens, self.before, self.last
        for i in range(len(before), len(text)):
            key = self._key(i)
            before.append(last.get(key, -1))
            last[key] = i

    def cut(self, hi: int) -> None:
        """Forget the tokens at position `hi` and behind."""
        n = max(hi - self.lo, 0)
        for i in range(len(self.before) - 1, n - 1, -1):
            key = self._key(i)
            if self.before[i] < 0:
                self.last.pop(key, None)
            else:
                self.last[key] = self.before[i]
            self.before.pop()
        del self.tokens[n:]

    def match(self, token: int) -> tuple[int, int]:
        """Where the last tokens, and `token` behind them, came before: the index of the next one, and how many."""
        n = len(self.tokens)
        if n < _SHORTEST - 1:
            return 0, 0
        self.index()
        tokens = self.tokens
        place, found, longest = self.last.get(_key([*tokens[n - _SHORTEST + 1 : n], token]), -1), 0, 0
        for _ in range(_PLACES):
            if not _SHORTEST - 1 <= place < n:
                break
            same, most = int(tokens[place] == token), min(place + 1, _LONGEST)
            # A match that is no longer than the longest so far ends at this token at the latest.
            if same and longest < most and (longest == 0 or tokens[place - longest] == tokens[n - longest]):
                while same < most and tokens[place - same] == tokens[n - same]:
                    same += 1
                if same > longest:
                    found, longest = place + 1, same
            place = self.before[place]
        return found, longest if longest >= _SHORTEST else 0

    def _key(self, i: int) -> int:
        return _key(self.tokens[max(0, i - _SHORTEST + 1) : i + 1])


def _key(tokens: Sequence[int]) -> int:
    key = len(tokens)
    for token in tokens:
        key = key << _BITS | token
    return key


class NgramDrafter:
    """Drafts what followed the last tokens earlier in the text (the interface is `Drafter`'s)."""

    window = 0
    n_decodes = 0

    def __init__(self) -> None:
        self._sequences: dict[int, _Sequence] = {}
        # Of each sequence the drafts that are still to be judged: their first position, the match's length, and they.
        self._pending: dict[int, tuple[int, int, list[int]]] = {}
        self._rates = dict(_PRIORS)
        self._seen = dict.fromkeys(_PRIORS, _PRIOR_WEIGHT)
        self._closed = False

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: Floats) -> None:
        if self._closed:
            return
        s = self._sequences.get(seq_id)
        if s is None or s.hi != n_past:
            s = self._sequences[seq_id] = _Sequence(n_past)
        s.add(tokens)
        if len(tokens) > _MANY:
            s.index()
        if seq_id in self._pending:
            for i, token in enumerate(tokens):
                self._judge(seq_id, n_past + i, token)

    def ready(self, seq_id: int, n_past: int, id_last: int, n_max: int) -> Ready:
        s = self._sequences.get(seq_id)
        if s is None or s.hi != n_past:
            return NOTHING_READY
        self._judge(seq_id, n_past, id_last)
        at, length = s.match(id_last)
        if length == 0:
            return NOTHING_READY
        # Where the earlier place is near the end of the text, that repeats its end, and goes on doing so.
        text = [*s.tokens[at : min(at + n_max, s.hi - s.lo)], id_last]
        text = [text[i % len(text)] for i in range(n_max)]
        self._pending[seq_id] = n_past + 1, length, text
        return Ready(text, [self._rates[_BIN[min(length + i, _LONGEST)]] for i in range(n_max)])

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: More | None = None) -> list[int]:
        if self._closed:
            raise EngineError("the drafter is closed")
        return list(self.ready(seq_id, n_past, id_last, n_max).tokens)

    def rollback(self, seq_id: int, n_past: int) -> None:
        s = self._sequences.get(seq_id)
        if s is None or s.hi <= n_past:
            return
        self._pending.pop(seq_id, None)
        if n_past <= s.lo:
            del self._sequences[seq_id]  # all at once: each prompt begins so
        else:
            s.cut(n_past)

    def close(self) -> None:
        self._closed = True
        self._sequences.clear()
        self._pending.clear()

    def _judge(self, seq_id: int, position: int, token: int) -> None:
        """`token` came at `position`: was it the draft for it?"""
        first, length, drafts = self._pending.get(seq_id, (0, 0, ()))
        i = position - first
        if not 0 <= i < len(drafts):
            return
        right = drafts[i] == token
        if not right or i + 1 == len(drafts):
            del self._pending[seq_id]
        key = _BIN[min(length + i, _LONGEST)]
        self._seen[key] += 1
        self._rates[key] += max(_WEIGHT, 1 / self._seen[key]) * (right - self._rates[key])
