from __future__ import annotations

from ds4_mtp_plugin.stats import Counters, MtpStats


def test_nothing_proposed_divides_by_nothing() -> None:
    assert (MtpStats().rate, MtpStats().per_iter, MtpStats().rate_per_position) == (0.0, 0.0, ())


def test_counts_per_position_add_up() -> None:
    counters = Counters(depth=3)
    counters.verified(3)
    counters.accepted(0)
    counters.accepted(1)
    counters.verified(1)
    stats = counters.snapshot(draft_decodes=4)
    assert (stats.iters, stats.proposed, stats.accepted, stats.draft_decodes) == (2, 4, 2, 4)
    assert stats.proposed_per_position == (2, 1, 1)
    assert stats.rate_per_position == (0.5, 1.0, 0.0)
    assert stats.per_iter == 1.0


def test_the_report_begins_as_ds4s() -> None:
    stats = MtpStats(iters=44, proposed=88, accepted=55, exact=False)
    assert str(stats) == "mtp accept: iters=44 proposed=88 accepted=55 rate=62.5% per_iter=1.25 exact=no"
    assert str(MtpStats(failures=2, exact=True)).endswith("per_iter=0.00 exact=yes failures=2")


def test_since_a_snapshot() -> None:
    counters = Counters(depth=2)
    counters.verified(2)
    counters.accepted(0)
    before = counters.snapshot(draft_decodes=2)
    counters.verified(1)
    counters.verified(5, ready=True)
    counters.accepted(0)
    counters.plain += 3
    found = counters.snapshot(draft_decodes=3).since(before)
    assert (found.iters, found.proposed, found.accepted, found.plain, found.draft_decodes) == (2, 6, 1, 3, 1)
    assert (found.proposed_per_position, found.accepted_per_position) == ((1, 0), (1, 0))
    assert (found.ngram_iters, found.depth, found.exact) == (1, 2, True)
    assert found.since(MtpStats()) == found
