"""AMX's tile configuration is the thread's, and others in the process use the thread too: oneDNN, in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest

from ds4_mtp_plugin.cli.demo import BASE
from tests.fixtures import GPU_LAYERS
from tests.fixtures.row_engine import F32, RowEngine
from tests.fixtures.tiles import SIZE, Tiles, configuration

pytestmark = pytest.mark.skipif(GPU_LAYERS != 0, reason="AMX is of the CPU")

RELEASED = bytes(SIZE)
# As a product of bfloat16 has them: all tiles whole.
ANOTHERS = configuration([(16, 64)] * 8)
TEXT = np.random.default_rng(0).integers(260, 500, 120).tolist()


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    try:
        return Tiles()
    except OSError as err:
        pytest.skip(str(err))


def decode(between: Callable[[], object] = lambda: None) -> F32:
    """Logits of a text, 2 to 40 rows per decode, all on this thread; `between` is called before every decode."""
    parts = []
    with RowEngine(BASE, n_threads=1, n_threads_batch=1) as engine:
        at = 0
        for k in (40, 2, 3, 5, 17, 33, 20):
            between()
            parts.append(engine.decode(TEXT[at : at + k], at)[0])
            at += k
    assert at == len(TEXT)
    return np.concatenate(parts)


@pytest.mark.parametrize("config", [RELEASED, ANOTHERS], ids=["released", "another's"])
def test_what_another_leaves_the_tiles_in_does_not_matter(tiles: Tiles, config: bytes) -> None:
    undisturbed = decode()
    assert tiles.store() not in (RELEASED, ANOTHERS)  # so this thread did compute with tiles
    disturbed = decode(lambda: tiles.load(config))
    assert np.array_equal(undisturbed, disturbed)


def test_a_product_of_pytorch_between_two_decodes_does_not_matter(tiles: Tiles) -> None:
    if tiles.emulated:
        pytest.skip("PyTorch uses the CPU's own tiles")
    if os.environ.get("DS4_TEST_REQUIRE") != "apps":
        pytest.importorskip("torch", reason="pip install '.[reference]'")
    import torch

    here: list[bytes] = []

    def product() -> None:
        a = torch.ones(256, 256, dtype=torch.bfloat16)
        assert torch.equal(a @ a, 256 * a)
        here.append(tiles.store())

    undisturbed = decode()
    ours = tiles.store()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # this one
    try:
        disturbed = decode(product)
    finally:
        torch.set_num_threads(threads)
    if here[-1] == ours:
        pytest.skip(f"PyTorch {torch.__version__} computes bfloat16 without tiles here")
    assert np.array_equal(undisturbed, disturbed)
