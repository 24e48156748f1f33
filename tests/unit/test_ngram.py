"""Drafts from the text itself: the index against a search of the whole text, and what is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ds4_mtp_plugin.engine import EngineError
from ds4_mtp_plugin.speculation import NOTHING_READY, ChainDrafter, NgramDrafter

NONE = np.empty((0, 1), np.float32)
SHORTEST, LONGEST = 3, 32


def searched(text: list[int], token: int, n: int) -> list[int]:
    """What followed the longest match of the text's end before, the last of several; by looking everywhere."""
    whole = [*text, token]
    found, longest = -1, 0
    for end in range(len(text)):
        same = 0
        while same <= end and same < LONGEST and whole[end - same] == whole[-1 - same]:
            same += 1
        if same >= max(longest, SHORTEST):
            found, longest = end + 1, same
    if longest == 0:
        return []
    drafts: list[int] = []
    for i in range(found, found + n):
        drafts.append(whole[i] if i < len(whole) else drafts[i - len(whole)])
    return drafts


@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_what_followed_the_longest_match(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drafter, text = NgramDrafter(), []
    for _ in range(300):
        what = rng.integers(6)
        if what == 0 and text:  # an app cuts its text
            text = text[: rng.integers(len(text))]
            drafter.rollback(0, len(text))
        elif what == 1 and len(text) > 20:  # and repeats it
            start = rng.integers(len(text) - 10)
            new = text[start : start + rng.integers(3, 30)]
            drafter.process(0, len(text), new, NONE)
            text += new
        else:
            new = rng.integers(0, 1 << 17, rng.integers(1, 4)).tolist() if what < 5 else rng.integers(0, 3, 9).tolist()
            drafter.process(0, len(text), new, NONE)
            text += new
        token = int(text[rng.integers(len(text))]) if text else 5
        if text and rng.integers(2):
            token, n = text[-1], len(text) - 1
            drafter.rollback(0, n)
            text = text[:n]
        assert list(drafter.ready(0, len(text), token, 16).tokens) == searched(text, token, 16)


def test_sequences_do_not_see_each_other() -> None:
    drafter = NgramDrafter()
    drafter.process(0, 0, [1, 2, 3, 4, 1, 2], NONE)
    drafter.process(1, 0, [1, 2, 3, 9, 1, 2], NONE)
    assert [drafter.draft(seq, 6, 3, 1) for seq in (0, 1, 2)] == [[4], [9], []]


def test_a_gap_is_no_text() -> None:
    """Rows of an image lie between: what was before them is not followed by what comes behind."""
    drafter = NgramDrafter()
    drafter.process(0, 0, [1, 2, 3, 4], NONE)
    drafter.process(0, 100, [1, 2], NONE)
    assert drafter.ready(0, 102, 3, 4) == NOTHING_READY
    assert drafter.ready(0, 99, 3, 4) == NOTHING_READY
    drafter.process(0, 102, [3, 7, 1, 2], NONE)
    assert drafter.draft(0, 106, 3, 1) == [7]


def rates(drafter: NgramDrafter, follows: list[int]) -> list[float]:
    """The rate of one draft behind a match of three, while a text goes on with `follows` each time."""
    said, text = [], [1, 2, 3, 4]
    drafter.process(0, 0, text, NONE)
    for token in follows:
        drafter.process(0, len(text), [7 + len(text), 1, 2], NONE)
        text += [0, 0, 0]
        said.append(drafter.ready(0, len(text), 3, 1).rates[0])
        drafter.process(0, len(text), [3, token], NONE)
        text += [3, token]
    return said


def test_rates_are_learned_from_every_token() -> None:
    """None of these drafts is ever verified."""
    right, wrong = rates(NgramDrafter(), [4] * 60), rates(NgramDrafter(), list(range(1000, 1060)))
    assert right[0] == wrong[0]
    assert right[-1] > 0.95 and wrong[-1] < 0.05
    assert right == sorted(right) and wrong == sorted(wrong, reverse=True)


def test_a_token_is_judged_once() -> None:
    once, twice = NgramDrafter(), NgramDrafter()
    for drafter in (once, twice):
        drafter.process(0, 0, [1, 2, 3, 4, 5, 6, 1, 2], NONE)
        drafter.ready(0, 8, 3, 3)
        drafter.process(0, 8, [3], NONE)
    twice.ready(0, 9, 4, 1)  # sampled ...
    for drafter in (once, twice):
        drafter.process(0, 9, [4], NONE)  # ... and then evaluated
    assert once._rates == twice._rates != NgramDrafter()._rates


def test_behind_a_wrong_draft_nothing_is_judged() -> None:
    drafter = NgramDrafter()
    drafter.process(0, 0, [1, 2, 3, 4, 5, 6, 1, 2], NONE)
    assert list(drafter.ready(0, 8, 3, 3).rates) == [0.4, 0.5, 0.6]  # a match grows with each draft that is right
    before = dict(drafter._rates)
    drafter.process(0, 8, [3, 4, 9, 6], NONE)
    after = dict(drafter._rates)
    assert after.pop(3) > before.pop(3) and after.pop(4) < before.pop(4)
    assert after == before


def test_longer_matches_have_rates_of_their_own() -> None:
    drafter = NgramDrafter()
    text = list(range(40))
    drafter.process(0, 0, [*text, *text[:20]], NONE)
    ready = drafter.ready(0, 60, 20, 12)
    assert list(ready.tokens) == text[21:33]
    assert list(ready.rates) == sorted(ready.rates) and ready.rates[0] >= 0.9


class Interrupt(BaseException):
    pass


class _Fragile(list[int]):
    """Raises at the n-th append."""

    def __init__(self, values: list[int], n: int) -> None:
        super().__init__(values)
        self.n = n

    def append(self, value: Any) -> None:
        self.n -= 1
        if self.n == 0:
            raise Interrupt
        super().append(value)


@pytest.mark.parametrize("n", range(1, 6))
def test_an_exception_from_outside_as_tokens_come_leaves_it_usable(n: int) -> None:
    drafter, text = NgramDrafter(), [1, 2, 3, 4, 1, 2, 3, 5, 6]

    def interrupted() -> Iterator[int]:
        yield from text[4 : 3 + n]
        raise Interrupt

    drafter.process(0, 0, text[:4], NONE)
    with pytest.raises(Interrupt):
        drafter._sequences[0].add(interrupted())
    check(drafter, text[: drafter._sequences[0].hi])


def test_a_prompt_is_looked_at_as_it_comes_and_text_when_it_is_wanted() -> None:
    drafter = NgramDrafter()
    drafter.process(0, 0, list(range(100)), NONE)
    drafter.process(0, 100, [1, 2], NONE)
    assert len(drafter._sequences[0].before) == 100
    assert drafter.draft(0, 102, 3, 2) == [4, 5]
    assert len(drafter._sequences[0].before) == 102


@pytest.mark.parametrize("n", range(1, 10))
def test_an_exception_from_outside_as_runs_are_looked_at_leaves_it_usable(n: int) -> None:
    drafter, text = NgramDrafter(), [1, 2, 3, 4, 1, 2, 3, 5, 6]
    drafter.process(0, 0, text, NONE)
    s = drafter._sequences[0]
    s.before = before = _Fragile(s.before, n)
    with pytest.raises(Interrupt):
        drafter.draft(0, len(text), 2, 4)
    before.n = 0
    check(drafter, text)


def check(drafter: NgramDrafter, text: list[int]) -> None:
    assert drafter.draft(0, len(text), 2, 4) == searched(text, 2, 4)
    more = [8, 1, 2, 3, 4, 1]
    drafter.process(0, len(text), more, NONE)
    text = text + more
    for token in (2, 3, 9):
        assert drafter.draft(0, len(text), token, 4) == searched(text, token, 4)
    drafter.rollback(0, 2)
    assert drafter.draft(0, 2, 3, 4) == []


def test_closed() -> None:
    drafter = NgramDrafter()
    drafter.process(0, 0, [1, 2, 3, 4, 1, 2], NONE)
    drafter.close()
    with pytest.raises(EngineError, match="closed"):
        drafter.draft(0, 6, 3, 1)
    drafter.process(0, 6, [3], NONE)
    drafter.rollback(0, 0)
    assert drafter.ready(0, 7, 4, 1) == NOTHING_READY


def test_a_chain_asks_the_head_for_what_does_not_lie_ready() -> None:
    head = NgramDrafter()  # any drafter will do
    chain = ChainDrafter(NgramDrafter(), head)
    chain.process(0, 0, [1, 2, 3, 4, 1, 2], NONE)
    head.rollback(0, 0)
    head.process(0, 0, [1, 2, 3, 9, 1, 2], NONE)
    assert list(chain.ready(0, 6, 3, 1).tokens) == [4]
    assert chain.draft(0, 6, 3, 1) == [9]
    chain.rollback(0, 3)
    chain.process(0, 3, [5, 1, 2], NONE)
    assert list(chain.ready(0, 6, 3, 1).tokens) == chain.draft(0, 6, 3, 1) == [5]
