"""On the CPU a row's logits do not depend, in a single bit, on how many rows were decoded with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ds4_mtp_plugin import engine, host
from tests.fixtures.planted import BY_CONTEXT, Planted
from tests.fixtures.row_engine import RowEngine

N = 300
TEXT = np.random.default_rng(0).integers(260, 500, N).tolist()


HAS_AMX = "AMX_INT8 = 1" in engine.Library(host.library_path()).system_info


@pytest.mark.skipif(HAS_AMX, reason="AMX has kernels of its own, which differ between one row and more")
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "MXFP4"])
@pytest.mark.parametrize("k", [2, 3, 5, 17])
def test_k_rows_are_k_single_rows(plant: Callable[..., Planted], quant: str, k: int) -> None:
    """Across positions mod 4 and the marks at 128 and 256, where the compressed layers change their state."""
    trunk = plant(**BY_CONTEXT, quant=quant).trunk
    with RowEngine(trunk, n_batch=1) as single, RowEngine(trunk, n_batch=k) as together:
        alone, alone_hidden = single.decode(TEXT)
        rows, rows_hidden = together.decode(TEXT)
    differing = np.flatnonzero((rows != alone).any(1) | (rows_hidden != alone_hidden).any(1))
    assert differing.tolist() == []
