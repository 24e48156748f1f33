"""What we rely on in llama-cpp-python: the checklist for its next version.

The names are the host's (``llama_cpp/llama.py`` and ``_internals.py``), private ones included; tests/host/test_seam.py
holds a real Llama to them. Its methods that are wrapped are listed in wraps.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

#: The version whose internals are described here. The engine's source is that of its sdist (vendor/engine.toml).
HOST_VERSION = "0.3.36"

#: Without its own engine, and without leaving such a wheel in pip's cache for projects that want one with it.
INSTALL_HOST = f"pip install --no-cache-dir llama-cpp-python=={HOST_VERSION} -C wheel.cmake=false"


class ContextParams(Protocol):
    """``llama_context_params``, a ctypes structure: its bytes are the engine's."""

    type_k: int
    type_v: int
    n_batch: int
    n_ubatch: int
    n_rs_seq: int
    embeddings: bool
    swa_full: bool


class ModelParams(Protocol):
    """``llama_model_params``, likewise."""

    n_gpu_layers: int
    load_mtp: bool
    devices: int | None  # an address
    kv_overrides: Any  # a ctypes pointer


class Model(Protocol):
    """``llama_cpp._internals.LlamaModel``."""

    model: int | None


class Context(Protocol):
    """``llama_cpp._internals.LlamaContext``. `ctx` and `memory` are addresses; `ctx` is None once it is closed."""

    ctx: int | None
    memory: int | None

    def get_logits_ith(self, i: int) -> object: ...


class State(Protocol):
    """``llama_cpp.llama.LlamaState``, on which we leave what `Ledger.save` says of it."""

    ds4_mtp_batches: list[tuple[int, int]]
    ds4_mtp_known: int


class Llama(Protocol):
    """``llama_cpp.Llama``.

    Attributes:
        n_tokens: tokens evaluated, of which input_ids holds the ids.
        input_ids: shape (n_ctx,).
        scores: logits, shape (n_ctx or n_batch, n_vocab): of each token where `_logits_all`, else not written.
        _requires_eval: whether a token has to be evaluated before one is sampled.
        _stack: closes what the Llama owns, the last first.
    """

    model_path: str
    context_params: ContextParams
    model_params: ModelParams
    n_tokens: int
    n_batch: int
    n_threads: int
    n_threads_batch: int
    input_ids: npt.NDArray[np.intc]
    scores: npt.NDArray[np.single]
    draft_model: object
    lora_path: str | None
    _model: Model
    _lora_adapter: object
    _ctx: Context
    _logits_all: bool
    _requires_eval: bool
    _stack: ExitStack

    def eval(self, tokens: Sequence[int]) -> None: ...
    def pooling_type(self) -> int: ...
    def close(self) -> None: ...
