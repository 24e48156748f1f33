"""The account of the engine's memory, and what is known of a generation. No engine."""

from __future__ import annotations

import pytest

from ds4_mtp_plugin.host.generation import Generation
from ds4_mtp_plugin.host.ledger import Ledger


def test_text_is_evaluated_again_in_the_large_batches_that_it_was_in() -> None:
    ledger = Ledger(single_rows=4)
    at = 0
    for n in (10, 1, 1, 4, 1, 7, 2):
        ledger.evaluated(at, n)
        at += n
    assert ledger.known == at == 26
    assert list(ledger.batches()) == [(0, 10), (10, 14), (14, 17), (17, 24), (24, 26)]


def test_what_lies_behind_a_cut_is_gone() -> None:
    ledger = Ledger(single_rows=4)
    ledger.evaluated(0, 10)
    ledger.evaluated(10, 8)
    ledger.evaluated(18, 6)
    ledger.evaluated(13, 1)  # into the second batch: three of its rows stay, and the third batch goes
    assert ledger.known == 14
    assert list(ledger.batches()) == [(0, 10), (10, 13), (13, 14)]
    ledger.evaluated(6, 0)  # a cut alone
    assert ledger.known == 6
    assert list(ledger.batches()) == [(0, 6)]
    ledger.evaluated(0, 10)
    ledger.evaluated(5, 1)  # into the last batch
    assert list(ledger.batches()) == [(0, 5), (5, 6)]


def test_rows_behind_what_the_llama_does_not_know_are_not_known() -> None:
    ledger = Ledger(single_rows=4)
    ledger.evaluated(0, 3)
    ledger.evaluated(7, 9)
    assert ledger.known == 3
    assert list(ledger.batches()) == [(0, 3)]


def test_a_state_brings_its_batches_along() -> None:
    ledger = Ledger(single_rows=4)
    ledger.evaluated(0, 2)
    ledger.evaluated(2, 9)
    saved = ledger.save()
    ledger.evaluated(11, 20)
    other = Ledger(single_rows=4)
    other.load(11, saved)
    assert (other.known, list(other.batches())) == (11, [(0, 2), (2, 11)])
    other.load(11, None)  # of a Llama without a draft: most likely a prompt
    assert list(other.batches()) == [(0, 11)]
    other.load(3, None)
    assert list(other.batches()) == [(0, 3)]
    assert saved == [(2, 9)]
    for known, found in ((7, 7), (11, 11), (20, 11)):  # less than it holds: rows of an image; more: the app has cut it
        other.load(11, saved, known)
        assert other.known == found


def test_only_a_normal_exit_makes_it_sure() -> None:
    ledger = Ledger(single_rows=4)
    with pytest.raises(KeyboardInterrupt), ledger.changing():
        assert not ledger.sure
        raise KeyboardInterrupt
    assert not ledger.sure
    with ledger.changing():
        ledger.evaluated(0, 1)
    assert ledger.sure
    with pytest.raises(ValueError), ledger.changing():
        raise ValueError
    ledger.forget()
    assert (ledger.sure, ledger.known, list(ledger.batches())) == (True, 0, [])


def test_no_draft_goes_beyond_what_is_wanted() -> None:
    generation = Generation(3)
    assert generation.room(0, 100) == 2
    generation.chosen()
    assert generation.room(0, 100) == 1
    generation.chosen()
    assert generation.room(0, 100) == 0
    assert generation.room(98, 100) == 0


def test_no_draft_goes_beyond_the_context() -> None:
    generation = Generation()
    assert [generation.room(p, 100) for p in (0, 97, 98, 99)] == [99, 2, 1, 0]
    assert Generation(500).room(97, 100) == 2
