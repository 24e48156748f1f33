"""Which operations give a row other bits because other rows are decoded with it, found one node of the graph at a time.

The same tokens are decoded row by row and k at a time behind the same prompt, and every node's rows are compared. A
node that differs although none of its sources does is where the rows part. Looking at each keeps the backend from
fusing any: what fusion does shows in `bench.device.steps`, `bits`.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as engine

from ds4_mtp_plugin import host

N_PROMPT = 300


class _Tensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h)."""


_Pointer = ctypes.POINTER(_Tensor)
_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", _Pointer * 10),
    ("view_src", _Pointer),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]

# What computes nothing, and the types whose values can be compared.
_LAYOUT = {"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"}
_BITS: dict[str, Any] = {"f32": np.uint32, "i32": np.uint32, "f16": np.uint16, "bf16": np.uint16, "i64": np.uint64}


@dataclass
class _Node:
    """A computed node: its values' bits where they can be had, and in which tensors' memory it and its sources lie."""

    operation: str
    bits: npt.NDArray[Any] | None
    memory: int
    sources: list[int]
    is_view: bool


@dataclass
class Found:
    """Of k rows together: nodes compared, whether the logits differ, and by operation the nodes where it began."""

    compared: int = 0
    logits_differ: bool = False
    begun: dict[str, list[str]] = field(default_factory=dict)


class _Recorder:
    """Keeps every node of a decode, by name and how often the name came, while `nodes` is a dict."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[str, int], _Node] | None = None
        self._seen: Counter[str] = Counter()
        base = ctypes.CDLL(str(next(Path(host.library_path()).parent.glob("libggml-base.*"))))
        for name in ("ggml_op_name", "ggml_type_name"):
            getattr(base, name).restype = ctypes.c_char_p
        base.ggml_is_contiguous.restype = ctypes.c_bool
        base.ggml_is_contiguous.argtypes = [_Pointer]
        base.ggml_backend_tensor_get.argtypes = [_Pointer, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._base = base
        self.callback = engine.ggml_backend_sched_eval_callback(self._look)

    def start(self) -> dict[tuple[str, int], _Node]:
        self.nodes = {}
        self._seen.clear()
        return self.nodes

    def _look(self, tensor: int, ask: bool, _: Any) -> bool:
        pointer = ctypes.cast(tensor, _Pointer)
        node = pointer.contents
        operation = self._base.ggml_op_name(node.op).decode()
        if ask:
            return self.nodes is not None and operation not in _LAYOUT
        if self.nodes is not None:
            kind = _BITS.get(self._type(node))
            bits = None
            if kind is not None and self._base.ggml_is_contiguous(pointer):
                bits = np.empty(list(node.ne)[::-1], kind)
                self._base.ggml_backend_tensor_get(pointer, bits.ctypes.data, 0, bits.nbytes)
            sources = [source for source in node.src if source]
            shapes = " x ".join(f"{self._type(s.contents)}{list(s.contents.ne)}" for s in sources[:2])
            name = f"{operation} {node.name.decode()}"
            self._seen[name] += 1
            memory = [_memory(source) for source in sources]
            self.nodes[name, self._seen[name]] = _Node(
                f"{operation} {shapes}", bits, _memory(pointer), memory, bool(node.view_src)
            )
        return True

    def _type(self, node: Any) -> str:
        return str(self._base.ggml_type_name(node.type).decode())


def _memory(pointer: Any) -> int:
    while pointer.contents.view_src:
        pointer = pointer.contents.view_src
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def differing(path: Path, *, flash: bool, n_gpu_layers: int, rows: Sequence[int]) -> dict[int, Found]:
    """What differs in a model of `path` for each number of `rows` that are decoded together."""
    recorder = _Recorder()
    params = engine.llama_model_default_params()
    params.n_gpu_layers = 0x7FFFFFFF if n_gpu_layers < 0 else n_gpu_layers
    model = engine.llama_model_load_from_file(str(path).encode(), params)
    try:
        n_vocab = engine.llama_vocab_n_tokens(engine.llama_model_get_vocab(model))
        tokens = np.random.default_rng(0).integers(n_vocab // 2, n_vocab, N_PROMPT + max(rows)).tolist()

        def record(pieces: Sequence[int]) -> list[dict[tuple[str, int], _Node]]:
            given = engine.llama_context_default_params()
            given.n_ctx, given.n_batch, given.n_ubatch = 1024, N_PROMPT, N_PROMPT
            given.n_threads = given.n_threads_batch = 1
            given.flash_attn_type = int(flash)
            given.cb_eval = recorder.callback
            context = engine.llama_init_from_model(model, given)
            recorder.nodes = None
            _decode(context, tokens[:N_PROMPT], 0)
            found, n_past = [], N_PROMPT
            for n in pieces:
                found.append(recorder.start())
                _decode(context, tokens[n_past : n_past + n], n_past)
                n_past += n
            recorder.nodes = None
            engine.llama_free(context)
            return found

        alone = record([1] * max(rows))
        return {k: _compare(record([k])[0], alone[:k]) for k in rows}
    finally:
        engine.llama_model_free(model)


def _decode(context: Any, tokens: Sequence[int], n_past: int) -> None:
    batch = engine.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, n_past + i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    status = engine.llama_decode(context, batch)
    engine.llama_batch_free(batch)
    if status != 0:
        raise RuntimeError(f"llama_decode returned {status}")


def _compare(together: dict[tuple[str, int], _Node], alone: Sequence[dict[tuple[str, int], _Node]]) -> Found:
    found, dirty = Found(), set[int]()
    k = len(alone)
    for key, node in together.items():
        tainted = any(source in dirty for source in node.sources)
        singles = [each[key].bits if key in each else None for each in alone]
        differs = False
        if node.bits is not None and all(bits is not None for bits in singles):
            shapes = zip(node.bits.shape, singles[0].shape)  # type: ignore[union-attr]
            grown = [axis for axis, (of_k, of_one) in enumerate(shapes) if of_k != of_one]
            if len(grown) == 1 and node.bits.shape[grown[0]] == k * singles[0].shape[grown[0]]:  # type: ignore[union-attr]
                found.compared += 1
                parts = np.split(node.bits, k, axis=grown[0])
                differs = any((part != bits).any() for part, bits in zip(parts, singles))
        if differs and not tainted:
            found.begun.setdefault(node.operation, []).append(key[0])
        # A cache into which something differing was written is not compared: it stays suspect.
        if differs or (tainted and (node.bits is None or node.is_view)):
            dirty.add(node.memory)
        else:
            dirty.discard(node.memory)
        found.logits_differ = differs
    return found
