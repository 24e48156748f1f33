"""The account of checkpoints: which one a prompt goes on behind, and which stay where there is no room for all."""

from __future__ import annotations

import numpy as np
import pytest

from ds4_mtp_plugin.host.checkpoints import Checkpoints

TEXT = np.arange(1000, 9001, dtype=np.intc)


def kept(checkpoints: Checkpoints) -> list[int]:
    found, tokens = [], TEXT.tolist()
    while (each := checkpoints.find(tokens)) is not None:
        found.append(each.n)
        tokens = tokens[: each.n]  # the next one has to be before it
    return found[::-1]


def filled(n: int, *, room: int = 100) -> Checkpoints:
    checkpoints = Checkpoints(10 * room)
    for i in range(1, n + 1):
        checkpoints.add(TEXT[: 10 * i], bytes(10), [])
    return checkpoints


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (TEXT[:55], 50),
        (TEXT[:50], 40),  # a token has to be left, whose logits are sampled
        (TEXT[:51], 50),
        ([*TEXT[:33], 1, *TEXT[34:80]], 30),
        ([*TEXT[:9], 1], None),
        (TEXT[:10], None),
        ([], None),
        ([2**40, 1], None),
        ([*TEXT[:25], "x", 1.5], 20),
    ],
)
def test_the_last_one_that_a_prompt_goes_on_behind(tokens: list[int], expected: int | None) -> None:
    found = filled(8).find([token.item() if isinstance(token, np.integer) else token for token in tokens])
    assert (None if found is None else found.n) == expected


def test_what_lies_behind_a_change_is_void() -> None:
    checkpoints = filled(8)
    checkpoints.cut(49)
    assert kept(checkpoints) == [10, 20, 30, 40]
    checkpoints.cut(40)
    assert kept(checkpoints) == [10, 20, 30, 40]
    checkpoints.add(np.concatenate([TEXT[:40], TEXT[:10]]), bytes(10), [])
    assert kept(checkpoints) == [10, 20, 30, 40]
    assert len(checkpoints) == 5  # of another text
    checkpoints.cut(0)
    assert len(checkpoints) == 0


def test_without_room_early_ones_stay_in_reach_and_late_ones_dense() -> None:
    positions = kept(filled(800, room=12))
    assert len(positions) == 12
    assert positions[0] < 2000 and positions[-1] == 8000
    gaps = [b - a for a, b in zip([0, *positions], positions)]
    assert gaps[0] == max(gaps) and max(gaps[-4:]) <= 400


def test_one_that_is_larger_than_the_room_is_none() -> None:
    checkpoints = Checkpoints(9)
    checkpoints.add(TEXT[:10], bytes(10), [])
    assert len(checkpoints) == 0
