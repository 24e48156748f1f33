"""What every application is held to: the same output without a draft, with one, and with drafts that are all wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ds4_mtp_plugin import MtpDraft
from ds4_mtp_plugin.cli.demo import HEAD
from tests.apps.wrong import wrong_drafts

Options = dict[str, Any]

# One thread, so that tests do not wait for each other's.
THREADS: Options = {"n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(params=["right drafts", "wrong drafts"])
def same(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Options], Any]], None]:
    """same(run): run(options) with options for a Llama gives the same without and with a draft, and drafts happen."""

    def check(run: Callable[[Options], Any]) -> None:
        plain = run(dict(THREADS))
        draft = MtpDraft(HEAD, num_pred_tokens=3)
        wrong = request.param == "wrong drafts"
        if wrong:
            wrong_drafts(monkeypatch)
        assert run({**THREADS, "draft_model": draft}) == plain
        stats = draft.stats
        assert stats.proposed > 0
        assert stats.accepted == 0 if wrong else 0 < stats.accepted < stats.proposed

    return check
