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
Make = Callable[..., tuple[engine.Context, engine.Batch]]

# Above the mark of 8 rows up to which graphs are kept, and back.
IN_TURN = [1, 3, 1, 5, 3, 12, 1, 3, 12, 5, 2, 1]


def decode(
    context: engine.Context, batch: engine.Batch, sizes: Sequence[int], n_past: int = 0
) -> tuple[int, np.ndarray]:
    """(decodes that took a graph that was there, logits of all rows) of so many rows after the other."""
    pointer = int(engine.ffi.cast("uintptr_t", context._ptr))
    before, rows = llama_cpp.llama_perf_context(pointer).n_reused, []
    for n in sizes:
        tokens = [300 + (n_past + i) % 100 for i in range(n)]
        context.decode(batch.set(tokens, n_past, 0, outputs="all"))
        rows += [context.logits(i).copy() for i in range(n)]
        n_past += n
    return llama_cpp.llama_perf_context(pointer).n_reused - before, np.stack(rows)


@pytest.fixture
def make(request: pytest.FixtureRequest, plant: Plant) -> Make:
    """Makes a context, of the target or of its head, and its batch."""
    library, files = engine.Library(host.library_path()), plant(**BY_CONTEXT)

    def make(mtp: bool = False, n_rs_seq: int = 6) -> tuple[engine.Context, engine.Batch]:
        path = str(files.mtp if mtp else files.trunk)
        model = engine.Model(library, path, load_mtp=mtp, n_gpu_layers=GPU_LAYERS)
        request.addfinalizer(model.close)
        sizes = {"n_ctx": 256, "n_batch": 16, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1}
        context = model.new_context(mtp=mtp, n_rs_seq=0 if mtp else n_rs_seq, **sizes)
        request.addfinalizer(context.close)
        batch = engine.Batch(16, n_embd_out=context.n_embd_out if mtp else 0)
        if mtp:
            batch.embd[:] = np.random.default_rng(0).standard_normal(batch.embd.shape)
        return context, batch

    return make


@pytest.mark.parametrize("mtp", [False, True], ids=["target", "head"])
def test_sizes_in_turn_take_their_graphs(make: Make, mtp: bool) -> None:
    reused, _ = decode(*make(mtp), IN_TURN)
    assert reused == len(IN_TURN) - len(set(IN_TURN))


def test_a_target_without_rollback_is_as_it_was(make: Make) -> None:
    reused, _ = decode(*make(n_rs_seq=0), IN_TURN)
    assert reused == 0


@pytest.mark.parametrize("mtp", [False, True], ids=["target", "head"])
def test_a_graph_that_was_kept_computes_what_a_new_one_does(
    make: Make, mtp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kept = decode(*make(mtp), IN_TURN)
    monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
    reused, built = decode(*make(mtp), IN_TURN)
    assert reused == 0
    assert (kept == built).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_one_size_takes_one_graph_wherever_its_rows_lie(make: Make, n: int) -> None:
    """A compressor's block of 4 positions ends once or twice in 5 rows: the graph is for both."""
    reused, _ = decode(*make(), [n] * 20)
    assert reused == 19


def test_inputs_of_layers_may_come_and_go(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is of this decode, and a graph is taken again where it keeps the same."""
    sizes = [(2, True), (2, False), (2, True), (12, False), (2, True), (3, False), (3, False), (2, True)]

    def run(toggled: bool) -> tuple[int, np.ndarray]:
        context, batch = make()
        context.keep_layers([1, 3])
        rows, n_past, reused = [], 0, 0
        for n, on in sizes:
            context.set_hidden(engine.HIDDEN_ALL if on or not toggled else engine.HIDDEN_OFF)
            reused += decode(context, batch, [n], n_past)[0]
            if on:
                rows.append(context.hidden_rows(0, n).copy())
            elif toggled:
                with pytest.raises(engine.EngineError):
                    context.hidden_rows(0, n)
            n_past += n
        return reused, np.concatenate(rows)

    reused, found = run(toggled=True)
    assert reused == 3  # rows 2 twice behind others with the same inputs, and rows 3
    monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
    _, expected = run(toggled=False)
    assert (found == expected).all()
