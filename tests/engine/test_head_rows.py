"""A head computes keys and values of every row that it is shown, and the rest of its block for the output row alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import llama_cpp

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from ds4_mtp_plugin.engine import ffi
from tests.fixtures import GPU_LAYERS
from tests.fixtures.mtp_gguf import FAMILIES
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import Planted

# Nodes of a feed-forward network, or of what chooses experts, with a row for each token.
_BY_TOKEN = ("ffn_moe_logits", "ffn_gate-", "ffn_up-")


@pytest.mark.parametrize("architecture", ["deepseek4", *FAMILIES])
def test_the_network_is_computed_for_outputs_alone(
    tmp_path_factory: pytest.TempPathFactory, plant: Callable[..., Planted], architecture: str
) -> None:
    if architecture == "deepseek4":
        path: Path | None = plant().mtp
    else:
        path = plant_family(tmp_path_factory.mktemp("rows"), architecture, beside=True).head
    ggml = ctypes.CDLL(str(next(Path(host.library_path()).parent.glob("*ggml-base.*"))))
    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_nrows.restype = ctypes.c_int64
    rows: dict[str, int] = {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def seen(tensor: int, ask: bool, user_data: object) -> bool:
        if ask:
            name = ggml.ggml_get_name(ctypes.c_void_p(tensor)).decode()
            rows[name] = ggml.ggml_nrows(ctypes.c_void_p(tensor))
        return False

    model = engine.Model(engine.Library(host.library_path()), str(path), load_mtp=True, n_gpu_layers=GPU_LAYERS)
    context = model.new_context(
        mtp=True,
        n_ctx=256,
        n_batch=64,
        n_ubatch=64,
        cb_eval=ffi.cast("void *", ctypes.cast(seen, ctypes.c_void_p).value),
    )
    context.set_hidden(engine.HIDDEN_OUTPUTS)
    batch = engine.Batch(4, n_embd_out=context.n_embd_out)
    batch.embd[:] = np.random.default_rng(0).normal(size=batch.embd.shape)
    context.decode(batch.set([300, 301, 302, 303], 1, 0))
    context.close()
    model.close()

    of_network = {name: n for name, n in rows.items() if name.startswith(_BY_TOKEN)}
    assert of_network and set(of_network.values()) == {1}, of_network
    assert any(n == 4 for n in rows.values())
