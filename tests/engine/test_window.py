"""Attention over the rows of a window reads no cell before it, and gives the bits that it gave over all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, Planted

TEXT = np.random.default_rng(3).integers(260, 500, 1600).tolist()

pytestmark = pytest.mark.skipif(GPU_LAYERS != 0, reason="the view is for memory on the CPU")


@pytest.fixture(scope="module")
def model(plant: Callable[..., Planted]) -> Iterator[engine.Model]:
    model = engine.Model(engine.Library(host.library_path()), str(plant(**BY_CONTEXT).trunk))
    yield model
    model.close()


def contexts(model: engine.Model, **options: Any) -> tuple[engine.Context, engine.Context]:
    """One with the view, and one of two sequences, which reads all cells of each."""
    options = {"n_ctx": 2048, "n_rs_seq": 4, "n_threads": 1, "n_threads_batch": 1, **options}
    return model.new_context(**options), model.new_context(**{**options, "n_ctx": 2 * options["n_ctx"], "n_seq_max": 2})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_threads": 2, "n_threads_batch": 3},
        {"flash_attn_type": 1},
        {"flash_attn_type": 1, "type_k": 8, "type_v": 8},
    ],
    ids=["plain attention", "on threads", "flash attention", "a cache of Q8_0"],
)
@pytest.mark.parametrize("n_batch", [512, 100, 64])
def test_the_bits_are_those_of_all_cells(model: engine.Model, options: dict[str, int], n_batch: int) -> None:
    ours, all_cells = contexts(model, n_batch=n_batch, n_ubatch=n_batch, **options)
    batch = engine.Batch(n_batch)
    p = 0
    sizes = [n_batch] * (600 // n_batch) + [3, 1, 4, 2, 5] * 20 + [n_batch] * (512 // n_batch) + [1] * 30
    for n in sizes:
        for context in (ours, all_cells):
            context.decode(batch.set(TEXT[p : p + n], p, 0, outputs="all"))
        for row in range(n):
            np.testing.assert_array_equal(ours.logits(row), all_cells.logits(row))
        p += n
        if n == 5:  # two of them were wrong
            assert ours.seq_rm(0, p - 2) and all_cells.seq_rm(0, p - 2)
            p -= 2
    assert p > 1100
    for context in (ours, all_cells):
        context.close()


def test_cells_before_the_window_are_not_read(model: engine.Model) -> None:
    base = ctypes.CDLL(str(next(Path(host.library_path()).parent.glob("libggml-base.*"))))
    base.ggml_get_name.restype = ctypes.c_char_p
    base.ggml_get_name.argtypes = [ctypes.c_void_p]
    seen: set[int] = set()

    @engine.ffi.callback("bool(void *, bool, void *)")  # type: ignore[untyped-decorator]
    def look(tensor: Any, ask: bool, _: Any) -> bool:
        if ask and b"kq_mask" in base.ggml_get_name(int(engine.ffi.cast("uintptr_t", tensor))):
            seen.add(engine.ffi.cast("int64_t *", engine.ffi.cast("char *", tensor) + 16)[0])  # ggml_tensor.ne
        return False

    context = model.new_context(
        n_ctx=2048, n_threads=1, n_threads_batch=1, cb_eval=engine.ffi.cast("void *", look), n_rs_seq=4
    )
    batch = engine.Batch(1600)
    context.decode(batch.set(TEXT[:1500], 0, 0))
    widest = []
    for p in range(1500, 1600):
        seen.clear()
        context.decode(batch.set([TEXT[p]], p, 0))
        widest.append(max(seen))
    # 128 rows, wherever they lie among blocks of 256, and the compressed ones
    assert max(widest) <= 2 * 256 + 512, widest
    context.close()
