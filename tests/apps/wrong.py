"""A drafter that is always wrong."""

from __future__ import annotations

from typing import Any

import pytest

from ds4_mtp_plugin.speculation import MtpDrafter

# The beginning of a text: no model here has ever seen it in one.
BOS = 0


def wrong_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every draft is a token that is never sampled; as many are proposed as before."""
    draft = MtpDrafter.draft

    def wrong(self: MtpDrafter, *args: Any) -> list[int]:
        return [BOS] * len(draft(self, *args))

    monkeypatch.setattr(MtpDrafter, "draft", wrong)
