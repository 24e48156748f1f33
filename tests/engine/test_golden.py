"""The engine against stored logits of the PyTorch reference: no PyTorch needed.

``python -m tests.reference.parity --write-golden`` writes them anew.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference.parity import (
    CASES,
    GOLDEN,
    MODES,
    N_TOKENS,
    digest,
    engine_rows,
    random_tensors,
    random_tokens,
    row_errors,
    written,
)

CASE = CASES["yarn"]


def test_weights_are_those_of_the_golden_file() -> None:
    """If this fails, numpy draws other numbers, and the comparison says nothing of the engine."""
    trunk, mtp = random_tensors(CASE.cfg, CASE.seed)
    tokens = random_tokens(CASE.cfg, N_TOKENS, CASE.seed)
    with np.load(GOLDEN) as golden:
        assert golden["digests"].tolist() == [digest(trunk), digest(mtp), digest({"tokens": tokens})]


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.f32 and not mode.flash])
def test_engine_matches_golden_rows(mode: str) -> None:
    """Trunk logits and hidden rows, MTP logits, and two MTP rows on its own hidden rows: 1e-3 of the largest."""
    tokens = random_tokens(CASE.cfg, N_TOKENS, CASE.seed)
    with written(CASE.cfg, CASE.seed) as (trunk, mtp, _, _):
        got = engine_rows(CASE.cfg, trunk, mtp, tokens, MODES[mode])
    with np.load(GOLDEN) as golden:
        rows = golden["rows"]
        for name, have in (
            ("logits", got.logits[rows]),
            ("hidden", got.hidden[rows]),
            ("mtp_logits", got.mtp_logits[rows]),
            ("step_logits", got.step_logits),
        ):
            errors = row_errors(have, golden[name])
            assert errors.max() < 1e-3, f"{name}: {errors.max():.1e} at {errors.argmax()}"
