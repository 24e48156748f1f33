"""Removing rows from DeepSeek-V4's memory either restores the state of a fresh run, to the bit, or is refused."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, Planted

TEXT = np.random.default_rng(0).integers(260, 500, 400).tolist()


@pytest.fixture(scope="module")
def model(plant: Callable[..., Planted]) -> Iterator[engine.Model]:
    library = engine.Library(host.library_path())
    model = engine.Model(library, str(plant(**BY_CONTEXT).trunk), n_gpu_layers=GPU_LAYERS)
    yield model
    model.close()


def run(
    model: engine.Model,
    steps: list[int],
    n_past: int,
    *,
    n_rs_seq: int,
    n_ubatch: int,
    roll: int,
    text: list[int] = TEXT,
) -> bool | None:
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
            rolled.decode(batch.set(text[p : p + n], p, 0))
            p += n
        p -= roll
        if not rolled.seq_rm(0, p):
            return None
        fed = 0
        for n in [n_past, *steps]:  # in the same batches, as far as they go: kernels differ by their number of rows
            n = min(n, p - fed)
            if n:
                fresh.decode(batch.set(text[fed : fed + n], fed, 0))
                fed += n
        same = True
        for i in range(6):
            for context in contexts:
                context.decode(batch.set([text[300 + i]], p + i, 0))
            # A GPU computes 9 rows otherwise than one.
            same &= np.allclose(rolled.logits(), fresh.logits(), rtol=0, atol=0.02 if GPU_LAYERS else 0)
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


@pytest.mark.parametrize(("n_rs_seq", "roll"), [(0, 1), (3, 4), (8, 9)])
def test_further_back_than_was_asked_for_is_refused(model: engine.Model, n_rs_seq: int, roll: int) -> None:
    found = [run(model, [16], n, n_rs_seq=n_rs_seq, n_ubatch=64, roll=roll) for n in ALIGNMENTS]
    assert found == [None] * len(ALIGNMENTS)


@pytest.mark.parametrize("n", [8, 40, 127, 128, 129])
def test_removals_add_up(model: engine.Model, n: int) -> None:
    """What counts is the furthest row that was written, until the text is as long again."""
    context, fresh = (model.new_context(n_ctx=256, n_rs_seq=4, n_threads=1, n_threads_batch=1) for _ in range(2))
    batch = engine.Batch(256)
    context.decode(batch.set(TEXT[:n], 0, 0))
    assert [context.seq_rm(0, p) for p in (n - 1, n - 3, n - 4, n - 5)] == [True, True, True, False]
    fresh.decode(batch.set(TEXT[: n - 4], 0, 0))
    for p in range(n - 4, n - 1):
        for each in (context, fresh):
            each.decode(batch.set([TEXT[100 + p]], p, 0))
        np.testing.assert_array_equal(context.logits(), fresh.logits())
        assert not context.seq_rm(0, n - 5)
    context.decode(batch.set(TEXT[n - 1 : n + 5], n - 1, 0))
    assert [context.seq_rm(0, p) for p in (n, n + 1, n)] == [False, True, False]
    context.decode(batch.set(TEXT[n + 1 : n + 2], n + 1, 0))
    assert [context.seq_rm(0, p) for p in (n, n + 1)] == [False, True]
    fresh.decode(batch.set(TEXT[n - 1 : n + 1], n - 1, 0))
    for each in (context, fresh):
        each.decode(batch.set([TEXT[0]], n + 1, 0))
    # A GPU computes 6 rows otherwise than one.
    np.testing.assert_allclose(context.logits(), fresh.logits(), rtol=0, atol=0.02 if GPU_LAYERS else 0)
    for each in (context, fresh):
        each.close()


@pytest.mark.parametrize("n_rs_seq", [0, 1, 3, 16])
def test_a_prompt_is_cut_as_without_rollback(model: engine.Model, n_rs_seq: int) -> None:
    plain, ours = (
        model.new_context(n_ctx=256, n_ubatch=64, n_rs_seq=n, n_threads=1, n_threads_batch=1) for n in (0, n_rs_seq)
    )
    batch = engine.Batch(130)
    for each in (plain, ours):
        each.decode(batch.set(TEXT[:130], 0, 0))
    np.testing.assert_array_equal(plain.logits(), ours.logits())
    for each in (plain, ours):
        each.close()


@pytest.mark.skipif(GPU_LAYERS != 0, reason="CUDA asks no abort callback")
@pytest.mark.parametrize("pending", [False, True], ids=["plain", "rolled back"])
def test_an_aborted_decode_leaves_nothing_behind(model: engine.Model, pending: bool) -> None:
    """What an aborted decode leaves is either the state before it or an empty sequence; never something between."""
    context, fresh = (model.new_context(n_ctx=256, n_rs_seq=4, n_threads=1, n_threads_batch=1) for _ in range(2))
    batch, calls = engine.Batch(64), 0

    @llama_cpp.llama_cpp.ggml_abort_callback
    def stop(_: object) -> bool:
        nonlocal calls
        calls += 1
        return calls > 200  # in the middle of the graph

    address = int(engine.ffi.cast("uintptr_t", context._ptr))
    context.decode(batch.set(TEXT[:40], 0, 0))
    if pending:
        assert context.seq_rm(0, 38)
    p = context.seq_pos_max(0) + 1
    llama_cpp.llama_set_abort_callback(address, stop, None)
    with pytest.raises(engine.DecodeAborted, match="returned 2"):
        context.decode(batch.set(TEXT[p : p + 3], p, 0))
    llama_cpp.llama_set_abort_callback(address, llama_cpp.llama_cpp.ggml_abort_callback(0), None)
    assert context.seq_pos_max(0) == -1
    for each in (context, fresh):
        each.decode(batch.set(TEXT[:p], 0, 0))
        each.decode(batch.set(TEXT[p : p + 1], p, 0))
    np.testing.assert_array_equal(context.logits(), fresh.logits())
    for each in (context, fresh):
        each.close()


def after_a_failed_decode(model: engine.Model, n: int, fail: Callable[[engine.Context, engine.Batch], None]) -> bool:
    """Remove 3 of n rows; a decode that fails before it begins; then whether the state is the one before it."""
    context, fresh = (
        model.new_context(n_ctx=4096, n_batch=4096, n_rs_seq=4, n_threads=1, n_threads_batch=1) for _ in range(2)
    )
    batch = engine.Batch(4096)
    context.decode(batch.set(TEXT[:n], 0, 0))
    assert context.seq_rm(0, n - 3)
    fail(context, batch)
    assert context.seq_pos_max(0) == n - 4
    fresh.decode(batch.set(TEXT[: n - 3], 0, 0))
    same = True
    for i in range(6):
        for each in (context, fresh):
            each.decode(batch.set([TEXT[300 + i]], n - 3 + i, 0))
        same &= np.array_equal(context.logits(), fresh.logits())
    for each in (context, fresh):
        each.close()
    return same


@pytest.mark.parametrize(("rows", "gap", "code"), [(4090, 0, 1), (3, 7, -1)], ids=["no room", "a gap"])
def test_a_refused_decode_keeps_a_pending_removal(model: engine.Model, rows: int, gap: int, code: int) -> None:
    def fail(context: engine.Context, batch: engine.Batch) -> None:
        with pytest.raises(engine.DecodeError) as caught:
            context.decode(batch.set([300] * rows, context.seq_pos_max(0) + 1 + gap, 0))
        assert caught.value.code == code

    assert [after_a_failed_decode(model, n, fail) for n in range(40, 48)] == [True] * 8


def without_memory(context: engine.Context, batch: engine.Batch) -> None:
    import resource

    batch.set([300] * 4000, context.seq_pos_max(0) + 1, 0, outputs="all")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 5 * 2**20, before[1]))  # of 8 MiB for the outputs alone
    try:
        with pytest.raises(engine.DecodeError) as caught:
            context.decode(batch)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert caught.value.code == -2


WITHOUT_MEMORY = """
import sys
from ds4_mtp_plugin import engine, host
from tests.engine.test_rollback import after_a_failed_decode, without_memory
model = engine.Model(engine.Library(host.library_path()), sys.argv[1])
print([after_a_failed_decode(model, n, without_memory) for n in range(40, 48)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on a process's memory")
@pytest.mark.skipif(GPU_LAYERS != 0, reason="CUDA reserves more than there is")
def test_a_decode_without_memory_for_its_outputs_keeps_a_pending_removal(plant: Callable[..., Planted]) -> None:
    root = Path(__file__).resolve().parents[2]
    # glibc gives large blocks back at once, so that none is at hand where the next is refused
    env = {**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    argv = [sys.executable, "-c", WITHOUT_MEMORY, str(plant(**BY_CONTEXT).trunk)]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{[True] * 8}\n"


def test_any_sequence_is_removed_whole_or_not_at_all(model: engine.Model) -> None:
    """seq_id -1 means all: a part of all of them is refused."""
    context = model.new_context(n_ctx=512, n_seq_max=2, n_rs_seq=4, n_threads=1, n_threads_batch=1)
    batch = engine.Batch(8)
    for seq_id in range(2):
        context.decode(batch.set(TEXT[:8], 0, seq_id))
    assert not context.seq_rm(-1, 6)
    assert not context.seq_rm(0, 2, 4)
    assert [context.seq_pos_max(0), context.seq_pos_max(1)] == [7, 7]
    assert context.seq_rm(-1, -1)
    assert [context.seq_pos_max(0), context.seq_pos_max(1)] == [-1, -1]
    context.close()


@pytest.mark.parametrize("whole", [True, False], ids=["context", "sequence"])
@pytest.mark.parametrize("depths", [(4, 4), (0, 4), (4, 0), (3, 7)], ids=str)
@pytest.mark.parametrize("n", [5, 40, 128, 150])
def test_a_state_fits_any_depth_and_holds_no_way_back(
    model: engine.Model, n: int, depths: tuple[int, int], whole: bool
) -> None:
    """It is byte for byte what a context without rollback saves; where it is loaded, its rows cannot be removed."""
    saved, loaded, plain, fresh = (
        model.new_context(n_ctx=256, n_rs_seq=n_rs_seq, n_threads=1, n_threads_batch=1) for n_rs_seq in (*depths, 0, 0)
    )
    batch = engine.Batch(256)
    for context in (saved, plain, fresh):
        context.decode(batch.set(TEXT[:n], 0, 0))
    if depths[0]:
        saved.decode(batch.set(TEXT[200:202], n, 0))
        assert saved.seq_rm(0, n)
    loaded.decode(batch.set(TEXT[200:390], 0, 0))

    def state(context: engine.Context) -> ctypes.Array[ctypes.c_uint8]:
        pointer = int(engine.ffi.cast("uintptr_t", context._ptr))
        if whole:
            data = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(pointer))()
            assert llama_cpp.llama_state_get_data(pointer, data, len(data)) == len(data)
        else:
            data = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(pointer, 0))()
            assert llama_cpp.llama_state_seq_get_data(pointer, data, len(data), 0) == len(data)
        return data

    def load(context: engine.Context, data: ctypes.Array[ctypes.c_uint8]) -> None:
        pointer = int(engine.ffi.cast("uintptr_t", context._ptr))
        if whole:
            assert llama_cpp.llama_state_set_data(pointer, data, len(data)) > 0
        else:
            assert llama_cpp.llama_state_seq_set_data(pointer, data, len(data), 0) > 0

    load(loaded, state(saved))
    # Loading may put rows into other cells, which rounds otherwise: the reference has to load its state too.
    load(plain, state(plain))
    if not whole:
        assert bytes(state(loaded)) == bytes(state(plain)) == bytes(state(saved))
    assert loaded.seq_pos_max(0) == n - 1
    assert not loaded.seq_rm(0, n - 1)
    for p in range(n, n + 9):
        for context in (saved, loaded, plain, fresh):
            context.decode(batch.set([TEXT[p + 100]], p, 0))
        np.testing.assert_array_equal(saved.logits(), fresh.logits())
        np.testing.assert_array_equal(loaded.logits(), plain.logits())
        if p == n and depths[1]:  # what was decoded since can be removed, and no more
            assert [loaded.seq_rm(0, n - 1), loaded.seq_rm(0, n)] == [False, True]
            loaded.decode(batch.set([TEXT[n + 100]], n, 0))
    for context in (saved, loaded, plain, fresh):
        context.close()


def test_a_copied_sequence_can_be_cut_as_its_source(model: engine.Model) -> None:
    context = model.new_context(n_ctx=512, n_seq_max=2, n_rs_seq=4, n_threads=1, n_threads_batch=1)
    batch = engine.Batch(40)
    context.decode(batch.set(TEXT[:40], 0, 0))
    context.decode(batch.set(TEXT[200:230], 0, 1))
    llama_cpp.llama_memory_seq_cp(int(engine.ffi.cast("uintptr_t", context._memory)), 0, 1, -1, -1)
    assert context.seq_pos_max(1) == 39
    logits = []
    for seq_id in range(2):
        assert not context.seq_rm(seq_id, 35)
        assert context.seq_rm(seq_id, 37)
    for seq_id in range(2):
        context.decode(batch.set(TEXT[37:38], 37, seq_id))
        logits.append(context.logits().copy())
    np.testing.assert_array_equal(*logits)
    context.close()
