"""The C interface that the patches add, through the binding, against what can be computed from the logits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, Planted


@pytest.fixture(scope="module")
def library() -> engine.Library:
    return engine.Library(host.library_path())


@pytest.fixture
def trunk(library: engine.Library, plant: Callable[..., Planted]) -> Iterator[engine.Context]:
    model = engine.Model(library, str(plant(**BY_CONTEXT).trunk), n_gpu_layers=GPU_LAYERS)
    context = model.new_context(n_ctx=512, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1)
    yield context
    context.close()
    model.close()


def test_structs_have_the_librarys_size(library: engine.Library) -> None:
    names = ("struct llama_model_params", "struct llama_context_params", "llama_batch")
    sizes = [library.lib.ds4_mtp_sizeof(i) for i in range(4)]
    assert sizes == [engine.ffi.sizeof(name) for name in names] + [0]


def test_opening_the_hosts_library_shares_it(library: engine.Library) -> None:
    import llama_cpp

    theirs = engine.ffi.cast("uintptr_t", int(ctypes_address(llama_cpp.llama_cpp._lib.ds4_mtp_abi)))
    assert engine.ffi.cast("uintptr_t", engine.ffi.addressof(library.lib, "ds4_mtp_abi")) == theirs


def ctypes_address(function: object) -> int:
    import ctypes

    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def test_best_is_the_rows_argmax_probability_and_margin(trunk: engine.Context) -> None:
    trunk.decode(engine.Batch(8).set([300, 301, 302, 303, 304], 0, 0, outputs="all"))
    for i in range(5):
        logits = trunk.logits(i).astype(np.float64)
        first, second = np.sort(logits)[[-1, -2]]
        best = trunk.best(i, with_prob=True)
        assert best.id == int(logits.argmax())
        assert best.margin == pytest.approx(first - second, rel=1e-5)
        assert best.prob == pytest.approx(1 / np.exp(logits - first).sum(), rel=1e-4)
    assert trunk.best(-1) == trunk.best(4)
    assert trunk.best(4).prob == 1.0  # not asked for


def test_rows_that_are_no_outputs_have_none(trunk: engine.Context) -> None:
    trunk.set_hidden(engine.HIDDEN_OUTPUTS)
    trunk.decode(engine.Batch(8).set([300, 301, 302], 0, 0, outputs="last"))
    row = np.empty(trunk.n_embd_out, np.float32)
    for i in (0, 1, 3, 100_000, -2):
        with pytest.raises(IndexError):
            trunk.best(i)
        with pytest.raises(IndexError):
            trunk.logits(i)
        with pytest.raises(IndexError):
            trunk.hidden(i, row)
    trunk.set_hidden(engine.HIDDEN_OFF)
    trunk.decode(engine.Batch(8).set([303], 3, 0))
    with pytest.raises(IndexError):
        trunk.hidden(-1, row)


@pytest.mark.parametrize("n", [1, 3])
def test_hidden_rows_are_the_same_in_every_mode(trunk: engine.Context, n: int) -> None:
    tokens, rows = [300, 301, 302][:n], {}
    for mode in (engine.HIDDEN_OUTPUTS, engine.HIDDEN_ALL):
        trunk.seq_rm(0, -1)
        trunk.set_hidden(mode)
        trunk.decode(engine.Batch(8).set(tokens, 0, 0, outputs="all"))
        rows[mode] = np.empty((n, trunk.n_embd_out), np.float32)
        for i in range(n):
            trunk.hidden(i, rows[mode][i])
        # The planted trunk marks its rows with ones; were these logits, they would not be.
        np.testing.assert_allclose(rows[mode].reshape(n, 4, -1)[:, :, :2].mean(1), 1, atol=0.1)
    np.testing.assert_array_equal(rows[engine.HIDDEN_OUTPUTS], rows[engine.HIDDEN_ALL])


def test_hidden_rows_go_to_their_places(trunk: engine.Context) -> None:
    trunk.set_hidden(engine.HIDDEN_OUTPUTS)
    room = engine.HiddenRows(4, trunk.n_hidden)
    trunk.decode(engine.Batch(3).set([300, 301, 302], 0, 0, outputs="all"))
    own = trunk.hidden_rows(0, 3)
    np.testing.assert_array_equal(trunk.hidden_rows(1, 2, room, 2), own[1:])
    np.testing.assert_array_equal(room.array, [0 * own[0], 0 * own[0], own[1], own[2]])
    assert not np.array_equal(own[1], own[2])
    with pytest.raises(IndexError):
        trunk.hidden_rows(0, 3, room, 2)
    with pytest.raises(engine.NoSuchRow, match="row 3"):
        trunk.hidden_rows(3, 1, room)


def test_a_batch_that_is_used_again_has_the_outputs_that_are_asked_for(trunk: engine.Context) -> None:
    batch = engine.Batch(4)
    for n, outputs in ((3, "all"), (3, "last"), (2, "last"), (3, "last"), (1, "last"), (4, "all"), (3, "all")):
        trunk.seq_rm(0, -1)
        trunk.decode(batch.set(list(range(300, 300 + n)), 0, 0, outputs=outputs))
        for i in range(n):
            if outputs == "all" or i == n - 1:
                trunk.logits(i)
            else:
                with pytest.raises(IndexError):
                    trunk.logits(i)
        assert trunk.seq_pos_max(0) == n - 1


def test_a_head_that_is_not_there_is_refused(trunk: engine.Context, library: engine.Library) -> None:
    assert not library.lib.ds4_mtp_set_head_offset(trunk._ptr, 0)
    assert not library.lib.ds4_mtp_set_head_offset(trunk._ptr, -1)


def test_the_window_is_the_models(trunk: engine.Context) -> None:
    assert trunk.window == 128


def test_a_refused_decode_raises_with_the_engines_code(trunk: engine.Context) -> None:
    with pytest.raises(engine.DecodeError) as caught:
        trunk.decode(engine.Batch(8).set([300, 10**6], 0, 0))  # no such token
    assert caught.value.code == -1
    with pytest.raises(ValueError, match="9 rows in a batch of 8"):
        engine.Batch(8).set([300] * 9, 0, 0)


def test_a_file_that_is_no_model_is_an_error(library: engine.Library, tmp_path: object) -> None:
    path = f"{tmp_path}/no.gguf"
    with open(path, "wb") as file:
        file.write(b"GGUF and nothing else")
    with pytest.raises(engine.EngineError, match="no.gguf"):
        engine.Model(library, path)


@pytest.mark.parametrize("mtp", [False, True])
def test_the_graph_picks_the_token_that_best_finds(
    library: engine.Library, plant: Callable[..., Planted], mtp: bool
) -> None:
    files = plant(**BY_CONTEXT)
    model = engine.Model(library, str(files.mtp if mtp else files.trunk), load_mtp=mtp, n_gpu_layers=GPU_LAYERS)
    contexts = [model.new_context(mtp=mtp, n_ctx=256, n_batch=8, n_ubatch=8, n_outputs_max=1) for _ in range(2)]
    batch = engine.Batch(8, n_embd_out=contexts[0].n_embd_out if mtp else 0)
    if mtp:
        batch.embd[:] = np.random.default_rng(0).standard_normal(batch.embd.shape)
    assert contexts[1].pick_in_graph() and contexts[1].pick_in_graph()
    n_past = 0
    for part in [300, 301, 302], [303], [304, 305], [306]:
        ids = []
        for context in contexts:
            context.decode(batch.set(part, n_past, 0))
            ids.append(context.best(-1).id)
        assert ids[0] == ids[1]
        n_past += len(part)
        with pytest.raises(IndexError):
            contexts[1].best(100_000)
    for context in contexts:
        context.close()
        context.close()
    model.close()


def test_a_module_is_named_as_its_file_is(library: engine.Library, tmp_path: Path) -> None:
    """Those for ARM have a point in their names: armv8.6_2."""
    folder = shutil.copytree(Path(library.path).parent, tmp_path / "lib", ignore=shutil.ignore_patterns("converter"))
    shutil.copy(next(folder.glob("libggml-base.*")), folder / f"libggml-cpu-armv8.6_2{Path(library.path).suffix}")
    code = "from ds4_mtp_plugin import engine, host; print(engine.Library(host.library_path()).modules())"
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "'cpu-armv8.6_2': False" in done.stdout, done.stderr
