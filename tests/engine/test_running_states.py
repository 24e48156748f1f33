"""Removing rows from the memory of a hybrid model restores the state of a fresh run, to the bit, or is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import llama_cpp
import numpy as np
import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from tests.engine.test_rollback import run
from tests.fixtures import GPU_LAYERS
from tests.fixtures.mtp_gguf import ACTIVE, plant

TEXT = np.random.default_rng(0).choice(ACTIVE, 400).tolist()
HYBRID = ("qwen35", "qwen35moe", "qwen3next", "nemotron_h_moe", "bailingmoe3")


@pytest.fixture(scope="module", params=HYBRID)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[engine.Model]:
    path = plant(tmp_path_factory.mktemp("hybrid"), request.param).trunk
    model = engine.Model(engine.Library(host.library_path()), str(path), n_gpu_layers=GPU_LAYERS)
    yield model
    model.close()


@pytest.mark.parametrize("roll", [1, 2, 3, 4])
def test_within_the_last_batch_it_is_exact(model: engine.Model, roll: int) -> None:
    for n in (1, 17, 64, 97):
        assert run(model, [5], n, n_rs_seq=4, n_ubatch=128, roll=roll, text=TEXT) is True


@pytest.mark.parametrize(
    ("steps", "n_ubatch", "roll"),
    [([5], 128, 5), ([1], 128, 1), ([1, 1, 1], 128, 2), ([2, 3], 128, 3), ([5], 2, 1), ([5], 2, 2), ([6], 128, 5)],
)
def test_to_the_last_batch_s_beginning_and_behind_it_is_refused(
    model: engine.Model, steps: list[int], n_ubatch: int, roll: int
) -> None:
    for n in (16, 40):
        assert run(model, steps, n, n_rs_seq=4, n_ubatch=n_ubatch, roll=roll, text=TEXT) is None


def test_it_is_done_once_until_the_next_decode(model: engine.Model) -> None:
    context = model.new_context(n_ctx=128, n_rs_seq=4, n_threads=1, n_threads_batch=1)
    context.decode(engine.Batch(64).set(TEXT[:20], 0, 0))
    assert [context.seq_rm(0, 18), context.seq_rm(0, 17)] == [True, False]
    context.close()


def test_a_state_has_no_rows_to_take_back(model: engine.Model) -> None:
    saving, loading = (model.new_context(n_ctx=128, n_rs_seq=4, n_threads=1, n_threads_batch=1) for _ in range(2))
    batch = engine.Batch(64)
    for context in (saving, loading):
        context.decode(batch.set(TEXT[:20] if context is saving else TEXT[30:50], 0, 0))
    at = [int(engine.ffi.cast("uintptr_t", each._ptr)) for each in (saving, loading)]
    for of_sequence in ((), (0,)):
        get_size, get_data, set_data = (
            getattr(llama_cpp, f"llama_state_{'seq_' if of_sequence else ''}{what}")
            for what in ("get_size", "get_data", "set_data")
        )
        size = get_size(at[0], *of_sequence)
        data = (ctypes.c_uint8 * size)()
        assert get_data(at[0], data, size, *of_sequence) > 0 and set_data(at[1], data, size, *of_sequence) > 0
        assert not loading.seq_rm(0, 18)
        for each in (saving, loading):
            each.decode(batch.set(TEXT[60:61], 20, 0))
        np.testing.assert_array_equal(saving.logits(), loading.logits())
        saving.clear()
        saving.decode(batch.set(TEXT[:20], 0, 0))
    for context in (saving, loading):
        context.close()


@pytest.mark.parametrize("n_rs_seq", [1, 3])
@pytest.mark.parametrize("n_ubatch", [16, 32])
def test_a_prompt_is_cut_as_without_rollback(model: engine.Model, n_rs_seq: int, n_ubatch: int) -> None:
    plain, ours = (
        model.new_context(n_ctx=256, n_ubatch=n_ubatch, n_rs_seq=n, n_threads=1, n_threads_batch=1)
        for n in (0, n_rs_seq)
    )
    batch = engine.Batch(256)
    for n in (n_ubatch, n_ubatch + 1, 2 * n_ubatch + 2, 100):
        for context in (plain, ours):
            context.clear()
            context.decode(batch.set(TEXT[:n], 0, 0))
        np.testing.assert_array_equal(plain.logits(), ours.logits())
    for context in (plain, ours):
        context.close()
