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


@pytest.mark.parametrize("pending", [False, True], ids=["plain", "rolled back"])
def test_an_aborted_decode_leaves_nothing_behind(model: engine.Model, pending: bool) -> None:
    """What an aborted decode leaves is either the state before it or an empty sequence; never something between."""
    context, fresh = (model.new_context(n_ctx=256, n_rs_seq=4, n_threads=1, n_threads_batch=1) for _ in range(2))
    batch, calls = engine.Batch(64), 0

    @engine.ffi.callback("bool(void *)")  # type: ignore[untyped-decorator]
    def stop(_: object) -> bool:
        nonlocal calls
        calls += 1
        return calls > 200  # in the middle of the graph

    engine.ffi.cdef("void llama_set_abort_callback(struct llama_context *, bool (*)(void *), void *);", override=True)
    set_abort = engine.Library(host.library_path()).lib.llama_set_abort_callback
    context.decode(batch.set(TEXT[:40], 0, 0))
    if pending:
        assert context.seq_rm(0, 38)
    p = context.seq_pos_max(0) + 1
    set_abort(context._ptr, stop, engine.ffi.NULL)
    with pytest.raises(engine.DecodeAborted, match="returned 2"):
        context.decode(batch.set(TEXT[p : p + 3], p, 0))
    set_abort(context._ptr, engine.ffi.NULL, engine.ffi.NULL)
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
def test_a_state_holds_a_pending_removal_and_no_snapshots(model: engine.Model, whole: bool) -> None:
    """Where it is loaded nothing can be removed before the next decode, whatever was there before."""
    saved, loaded, fresh = (model.new_context(n_ctx=256, n_rs_seq=4, n_threads=1, n_threads_batch=1) for _ in range(3))
    batch = engine.Batch(64)
    saved.decode(batch.set(TEXT[:40], 0, 0))
    loaded.decode(batch.set(TEXT[200:240], 0, 0))
    fresh.decode(batch.set(TEXT[:38], 0, 0))
    assert saved.seq_rm(0, 38)

    source, target = (int(engine.ffi.cast("uintptr_t", context._ptr)) for context in (saved, loaded))
    if whole:
        state = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(source))()
        assert llama_cpp.llama_state_get_data(source, state, len(state)) > 0
        assert llama_cpp.llama_state_set_data(target, state, len(state)) > 0
    else:
        state = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(source, 0))()
        assert llama_cpp.llama_state_seq_get_data(source, state, len(state), 0) > 0
        assert llama_cpp.llama_state_seq_set_data(target, state, len(state), 0) > 0

    assert loaded.seq_pos_max(0) == 37
    assert not loaded.seq_rm(0, 37)
    for _ in range(2):
        for context in (saved, loaded, fresh):
            context.decode(batch.set(TEXT[38:39], 38, 0))
        np.testing.assert_array_equal(saved.logits(), fresh.logits())
        np.testing.assert_array_equal(loaded.logits(), fresh.logits())
        assert [context.seq_rm(0, 38) for context in (saved, loaded, fresh)] == [True] * 3
    for context in (saved, loaded, fresh):
        context.close()


def test_a_copied_sequence_has_no_snapshots(model: engine.Model) -> None:
    context = model.new_context(n_ctx=512, n_seq_max=2, n_rs_seq=4, n_threads=1, n_threads_batch=1)
    batch = engine.Batch(40)
    context.decode(batch.set(TEXT[:40], 0, 0))
    context.decode(batch.set(TEXT[200:230], 0, 1))
    llama_cpp.llama_memory_seq_cp(int(engine.ffi.cast("uintptr_t", context._memory)), 0, 1, -1, -1)
    assert context.seq_pos_max(1) == 39
    assert not context.seq_rm(1, 39)
    assert context.seq_rm(0, 39)
    for seq_id, p in enumerate((39, 40)):
        context.decode(batch.set(TEXT[p : p + 1], p, seq_id))
    assert context.seq_rm(1, 40)
    context.close()
