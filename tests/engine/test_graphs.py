"""A context that speculates keeps its graphs: batches of few rows, of whatever sizes in turn, are built once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from llama_cpp import llama_cpp

from ds4_mtp_plugin import engine, host
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, Planted

Plant = Callable[..., Planted]

# Above the mark of 8 rows up to which graphs are kept, and back.
IN_TURN = [1, 3, 1, 5, 3, 12, 1, 3, 12, 5, 2, 1]


def decode(context: engine.Context, batch: engine.Batch, sizes: Sequence[int]) -> tuple[int, np.ndarray]:
    """(decodes that took a graph that was there, logits of all rows) of so many rows after the other."""
    pointer = int(engine.ffi.cast("uintptr_t", context._ptr))
    before, rows, n_past = llama_cpp.llama_perf_context(pointer).n_reused, [], 0
    for n in sizes:
        tokens = [300 + (n_past + i) % 100 for i in range(n)]
        context.decode(batch.set(tokens, n_past, 0, outputs="all"))
        rows += [context.logits(i).copy() for i in range(n)]
        n_past += n
    return llama_cpp.llama_perf_context(pointer).n_reused - before, np.stack(rows)


@pytest.fixture(params=[False, True], ids=["target", "head"])
def context(request: pytest.FixtureRequest, plant: Plant) -> Callable[..., tuple[engine.Context, engine.Batch]]:
    """Makes a context and its batch."""
    mtp, files = request.param, plant(**BY_CONTEXT)
    path = str(files.mtp if mtp else files.trunk)
    model = engine.Model(engine.Library(host.library_path()), path, load_mtp=mtp, n_gpu_layers=GPU_LAYERS)
    request.addfinalizer(model.close)

    def make(n_rs_seq: int = 4) -> tuple[engine.Context, engine.Batch]:
        sizes = {"n_ctx": 256, "n_batch": 16, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1}
        made = model.new_context(mtp=mtp, n_rs_seq=0 if mtp else n_rs_seq, **sizes)
        request.addfinalizer(made.close)
        batch = engine.Batch(16, n_embd_out=made.n_embd_out if mtp else 0)
        if mtp:
            batch.embd[:] = np.random.default_rng(0).standard_normal(batch.embd.shape)
        return made, batch

    make.mtp = mtp  # type: ignore[attr-defined]
    return make


def test_sizes_in_turn_take_their_graphs(context: Callable[..., tuple[engine.Context, engine.Batch]]) -> None:
    reused, _ = decode(*context(), IN_TURN)
    assert reused == len(IN_TURN) - len(set(IN_TURN))


def test_a_context_without_snapshots_is_as_it_was(
    context: Callable[..., tuple[engine.Context, engine.Batch]],
) -> None:
    if context.mtp:  # type: ignore[attr-defined]
        pytest.skip("a head speculates without them")
    reused, _ = decode(*context(n_rs_seq=0), IN_TURN)
    assert reused == 0


def test_a_graph_that_was_kept_computes_what_a_new_one_does(
    context: Callable[..., tuple[engine.Context, engine.Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kept = decode(*context(), IN_TURN)
    monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
    reused, built = decode(*context(), IN_TURN)
    assert reused == 0
    assert (kept == built).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_one_size_takes_one_graph_wherever_its_rows_lie(plant: Plant, n: int) -> None:
    """A compressor's block of 4 positions ends once or twice in 5 rows: the graph is for both."""
    model = engine.Model(engine.Library(host.library_path()), str(plant(**BY_CONTEXT).trunk), n_gpu_layers=GPU_LAYERS)
    made = model.new_context(n_ctx=256, n_batch=8, n_ubatch=8, n_rs_seq=6, n_threads=1, n_threads_batch=1)
    reused, _ = decode(made, engine.Batch(8), [n] * 20)
    made.close()
    model.close()
    assert reused == 19
