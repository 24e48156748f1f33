"""Removing rows from DeepSeek-V4's memory either restores the state of a fresh run, to the bit, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from tests.fixtures.planted import BY_CONTEXT, Planted

TEXT = np.random.default_rng(0).integers(260, 500, 400).tolist()


@pytest.fixture(scope="module")
def model(plant: Callable[..., Planted]) -> Iterator[engine.Model]:
    model = engine.Model(engine.Library(host.library_path()), str(plant(**BY_CONTEXT).trunk))
    yield model
    model.close()


def run(model: engine.Model, steps: list[int], n_past: int, *, n_rs_seq: int, n_ubatch: int, roll: int) -> bool | None:
    """Decode n_past tokens at once, then `steps` batches; remove `roll` rows; True: the next logits are those of a
    context that never had them, False: they are not, None: the removal was refused."""
    contexts = [
        model.new_context(n_ctx=512, n_ubatch=n_ubatch, n_rs_seq=n_rs_seq, n_threads=1, n_threads_batch=1)
        for _ in range(2)
    ]
    rolled, fresh = contexts
    batch = engine.Batch(512)
    try:
        p = 0
        for n in [n_past, *steps]:
            rolled.decode(batch.set(TEXT[p : p + n], p, 0))
            p += n
        p -= roll
        if not rolled.seq_rm(0, p):
            return None
        fed = 0
        for n in [n_past, *steps]:  # in the same batches, as far as they go: kernels differ by their number of rows
            n = min(n, p - fed)
            if n:
                fresh.decode(batch.set(TEXT[fed : fed + n], fed, 0))
                fed += n
        same = True
        for i in range(6):
            for context in contexts:
                context.decode(batch.set([TEXT[300 + i]], p + i, 0))
            same &= np.array_equal(rolled.logits(), fresh.logits())
        return same
    finally:
        for context in contexts:
            context.close()


ALIGNMENTS = range(96, 128)


@pytest.mark.parametrize(
    ("steps", "n_rs_seq", "n_ubatch", "roll"),
    [([1, 1, 1], 3, 64, 3), ([4, 1], 3, 64, 3), ([4], 3, 1, 3), ([4], 3, 3, 3), ([1] * 5, 8, 64, 6)],
    ids=["three singles", "a batch and a single", "ubatches of 1", "ubatches of 3", "prompt and five singles"],
)
def test_behind_the_last_ubatch_is_refused(
    model: engine.Model, steps: list[int], n_rs_seq: int, n_ubatch: int, roll: int
) -> None:
    found = [run(model, steps, n, n_rs_seq=n_rs_seq, n_ubatch=n_ubatch, roll=roll) for n in ALIGNMENTS]
    assert found == [None] * len(ALIGNMENTS)


@pytest.mark.parametrize("roll", [1, 2, 3, 8])
def test_within_the_last_ubatch_is_exact(model: engine.Model, roll: int) -> None:
    found = [run(model, [9], n, n_rs_seq=8, n_ubatch=64, roll=roll) for n in ALIGNMENTS]
    assert found == [True] * len(ALIGNMENTS)


def test_a_second_removal_is_refused_until_a_decode(model: engine.Model) -> None:
    context = model.new_context(n_ctx=256, n_rs_seq=4, n_threads=1, n_threads_batch=1)
    batch = engine.Batch(8)
    context.decode(batch.set(TEXT[:8], 0, 0))
    assert context.seq_rm(0, 7)
    assert not context.seq_rm(0, 6)
    context.decode(batch.set(TEXT[7:8], 7, 0))
    assert context.seq_rm(0, 7)
    context.close()
