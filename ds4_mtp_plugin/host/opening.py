"""How a Llama and its draft become a session: admitted before anything is loaded, opened after, reported."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import llama_cpp

from ..draft import MAX_PRED_TOKENS, MtpDraft, gate, in_use
from ..engine import Context, EngineError, Model, ffi
from ..gguf import check_pair
from ..settings import current as settings
from ..speculation import AdaptiveDepth, CommonSpeculative, MtpDrafter
from .checkpoints import Checkpoints
from .contract import ContextParams, Llama
from .library import current as library
from .session import SINGLE_ROWS, Session

__all__ = ["Admission", "admit", "depth_in_scope", "refuse_embeddings"]

_CAUSAL = (llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL)

# Architectures whose rows are several streams wide. Embeddings are one wide, but src/llama-context.cpp copies the width
# of all: an assertion ends the process.
_STREAMS = ("deepseek4", "qwen4exp")

# By how many positions the engine enlarges what it reads of a cache (src/llama-kv-cache.cpp, get_n_kv). A GPU divides
# the work on a row by that size, so rows on two sides of such a mark are not verified together there.
GPU_BLOCK = 256

# Of the Llama that is being constructed, for the contexts that its constructor creates.
_scope: ContextVar[MtpDraft | None] = ContextVar("draft", default=None)


class _NoSpeculation(Exception):
    """The Llama is as good as without a draft, and stays so."""


@dataclass
class Admission:
    """A Llama that is about to be constructed with a draft.

    Attributes:
        why_off: why it will not draft, for a warning; None where it will, or where nobody has to be told.
        drafts: whether a session is to be opened.
    """

    draft: MtpDraft
    why_off: str | None
    drafts: bool

    @contextlib.contextmanager
    def in_scope(self) -> Iterator[None]:
        """While the host constructs: its contexts get what speculation needs."""
        token = _scope.set(self.draft if self.drafts else None)
        try:
            yield
        finally:
            _scope.reset(token)

    def open(self, llama: Llama) -> Session | None:
        """The session of the constructed Llama; None where it does not draft, which a warning explains.

        Raises:
            ValueError: the files do not fit together. The Llama is closed.
        """
        session = None
        if self.drafts:
            try:
                session = _open(llama, self.draft)
            except _NoSpeculation as err:
                self.why_off = str(err)
            except BaseException:
                llama.close()
                raise
        if self.why_off:
            warnings.warn(f"MtpDraft: no speculation: {self.why_off}", RuntimeWarning, stacklevel=4)
        return session


def admit(arguments: Mapping[str, Any]) -> Admission | None:
    """Whether a Llama that is constructed with `arguments` drafts. Nothing is loaded.

    None where it has no draft of ours, or no model file, which the host complains about.

    Raises:
        TypeError: the draft is a path.
        ValueError: an argument would end the process, the files do not fit together, the draft is another Llama's, or
            an exact text cannot be promised.
    """
    draft, model_path = arguments.get("draft_model"), arguments.get("model_path")
    if isinstance(draft, (str, bytes, os.PathLike)):
        raise TypeError(f"draft_model is {draft!r}; expected a draft: draft_model=MtpDraft({draft!r})")
    if not isinstance(draft, MtpDraft) or model_path is None:
        return None
    for name in ("n_batch", "type_k", "type_v"):
        value = arguments.get(name)
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more")
    why_off = _why_off(arguments)
    drafts = not (why_off or settings().disable)
    if drafts and os.path.exists(model_path):
        # Before the host loads the model: a pair that does not fit may cost minutes, or end the process.
        if in_use(draft):
            raise ValueError("MtpDraft: this draft is in use by another Llama; give each Llama an MtpDraft of its own")
        check_pair(model_path, draft.model_path, arguments.get("kv_overrides") or {})
        caches = {kind for name in ("type_k", "type_v") if (kind := arguments.get(name)) is not None}
        n_rows = 1 + min(draft.num_pred_tokens, MAX_PRED_TOKENS)
        if _asks_for_exact(draft) and (why := _why_not_exact(arguments.get("n_gpu_layers", 0), n_rows, caches)):
            raise ValueError(
                f"MtpDraft: exact=True (or DS4_MTP_STRICT) cannot be promised here: {why}. Without it the text is "
                "near-greedy there"
            )
    return Admission(draft, why_off, drafts)


def depth_in_scope(params: ContextParams) -> int | None:
    """Rows that a context has to roll back which is being created now; None where no Llama with a draft creates it."""
    draft = _scope.get()
    return None if draft is None else _depth(draft, params)


def refuse_embeddings(model: int | None) -> str | None:
    """Why the engine can give no embeddings of a model; None where it can."""
    value = ctypes.create_string_buffer(64)
    llama_cpp.llama_model_meta_val_str(model, b"general.architecture", value, len(value))
    if value.value.decode() not in _STREAMS:
        return None
    return (
        "the engine gives no embeddings of a model with hyper-connection streams. Use another model for embeddings, "
        "and embedding=False to generate with this one"
    )


def _why_off(arguments: Mapping[str, Any]) -> str | None:
    if arguments.get("vocab_only"):
        return "the Llama loads the vocabulary only (vocab_only=True)"
    if arguments.get("embedding"):
        return "the Llama is for embeddings (embedding=True)"
    if arguments.get("attention_type", _CAUSAL[0]) not in _CAUSAL:
        return "a row would see the drafts behind it (attention_type is not causal)"
    return None


def _asks_for_exact(draft: MtpDraft) -> bool:
    return bool(draft.exact or settings().strict)


def _why_not_exact(n_gpu_layers: int, n_rows: int, caches: AbstractSet[int]) -> str | None:
    """Why a row may round otherwise in a verify of `n_rows` than alone, None where it need not. `caches`: GGML types"""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return f"it was tested on no CPU of this kind ({machine}), on x86-64 alone"
    if not llama_cpp.llama_supports_gpu_offload():
        return None
    if _on_gpu(n_gpu_layers):
        where = f"layers are on a GPU (n_gpu_layers={n_gpu_layers})"
        rows = library().gpu_rows
        if rows == 0:
            return f"{where} of a kind on which it was not tested"
        if n_rows > rows:
            return f"{where}, where {rows} rows are computed as if each were alone: num_pred_tokens={rows - 1} at most"
        if caches - {llama_cpp.GGML_TYPE_F16}:
            return f"{where}, where it holds for a cache of F16 alone (type_k, type_v)"
    if "GGML_OP_OFFLOAD_MIN_BATCH" in os.environ:
        return "GGML_OP_OFFLOAD_MIN_BATCH is set, by which a verify may go to a GPU where a single row does not"
    return None


def _depth(draft: MtpDraft, params: ContextParams) -> int:
    """Drafts per cycle. A verify takes one row more, and has to fit a micro-batch for its rows to be rolled back."""
    room = min(int(params.n_batch), int(params.n_ubatch)) - 1
    return max(0, min(draft.num_pred_tokens, MAX_PRED_TOKENS, room))


def _open(llama: Llama, draft: MtpDraft) -> Session | None:
    """Load the head and join it with `llama`; None where there is nothing to draft (a depth of 0).

    Raises:
        ValueError: the files do not fit together.
        _NoSpeculation: the engine cannot draft, most likely for want of memory.
    """
    depth = _depth(draft, llama.context_params)
    if depth == 0:
        return None
    if llama.pooling_type() != llama_cpp.LLAMA_POOLING_TYPE_NONE:
        raise _NoSpeculation(f"the engine gives no hidden rows where it pools (pooling_type={llama.pooling_type()})")
    target = Context(library(), llama._ctx.ctx, owned=False)
    if target.n_rs_seq < depth:
        raise _NoSpeculation("the engine could not create a context that can roll back (its log on stderr says why)")
    on_gpu, params = _on_gpu(llama.model_params.n_gpu_layers), llama.context_params
    why_not = _why_not_exact(llama.model_params.n_gpu_layers, depth + 1, {params.type_k, params.type_v})
    # A GPU's kernels that give the bits of single rows are slower, so they are for those who ask for them.
    alone = on_gpu and _asks_for_exact(draft) and why_not is None
    with ExitStack() as on_error:
        try:
            drafter = _open_drafter(llama, draft, target, on_error, alone=alone)
        except EngineError as err:
            raise _NoSpeculation(str(err)) from None
        spec = CommonSpeculative(target, drafter, n_draft=depth, within=GPU_BLOCK if alone else None)
        spec.counters.exact = alone or (not on_gpu and why_not is None)
        depth_of = AdaptiveDepth(depth) if draft.adaptive and spec.counters.exact else None
        session = Session(
            llama,
            draft,
            spec,
            depth=depth_of,
            checkpoints=Checkpoints(draft.checkpoints_mb * 10**6) if _takes_checkpoints(llama, on_gpu) else None,
            single_rows=1 if alone else SINGLE_ROWS,
        )
        on_error.pop_all()
    # The host's stack runs backwards: the head goes before the target.
    llama._stack.callback(session.close)
    return session


def _takes_checkpoints(llama: Llama, on_gpu: bool) -> bool:
    """Whether a text that goes on behind a checkpoint rounds as one that was evaluated from its beginning.

    Loading puts a window's rows at the beginning of the cache. Where they were a multiple of 128 further on, every
    kernel of the CPU sums them in the same order. And the host must want no row of logits of what is not evaluated.
    """
    return not on_gpu and llama.n_batch % 256 == 0 and not llama._logits_all


def _open_drafter(llama: Llama, draft: MtpDraft, target: Context, on_error: ExitStack, *, alone: bool) -> MtpDrafter:
    """
    Args:
        alone: as long as the drafter is open GPUs are to compute few rows as if each were alone.

    Raises:
        EngineError: the engine could not load the head, or create its context.
        ValueError: the head is of another shape than the target.
    """
    placed = {} if draft.n_gpu_layers is None else {"n_gpu_layers": _n_gpu_layers(draft.n_gpu_layers)}
    # The Llama's overrides of metadata are the head's too: what it is told of its trunk's shape.
    overrides = ctypes.cast(llama.model_params.kv_overrides, ctypes.c_void_p).value or 0
    model = Model(
        library(),
        draft.model_path,
        like=_bytes(llama.model_params),
        load_mtp=True,
        kv_overrides=ffi.cast("struct llama_model_kv_override *", overrides),
        **placed,
    )
    resources = ExitStack()
    on_error.callback(resources.close)
    resources.callback(model.close)
    if alone:
        library().ask_rows_alone(True)
        resources.callback(library().ask_rows_alone, False)
    # A window of rows per decode, and room for three windows, whatever the target's context length is.
    context = model.new_context(
        like=_bytes(llama.context_params),
        mtp=True,
        n_ctx=3 * target.window,
        n_batch=target.window,
        n_ubatch=target.window,
        n_seq_max=1,
        n_rs_seq=0,
        n_outputs_max=1,
        n_outputs_max_per_seq=1,
        swa_full=False,
        embeddings=False,
        n_threads=draft.n_threads or llama.n_threads,
        n_threads_batch=draft.n_threads_batch or llama.n_threads_batch,
    )
    on_error.callback(context.close)
    if (context.n_embd_out, context.n_vocab) != (target.n_embd_out, target.n_vocab):
        raise ValueError(
            f"{draft.model_path} does not belong to {llama.model_path} as the engine loaded it; take the "
            "MTP GGUF that was converted from the same checkpoint"
        )
    chosen = gate(draft)
    if chosen.open and _on_gpu(placed.get("n_gpu_layers", llama.model_params.n_gpu_layers)):
        context.pick_in_graph()
    return MtpDrafter(context, gate=chosen, on_close=resources.close)


def _on_gpu(n_gpu_layers: int) -> bool:
    return n_gpu_layers != 0 and bool(llama_cpp.llama_supports_gpu_offload())


def _bytes(structure: Any) -> bytes:
    return bytes(structure)


def _n_gpu_layers(n: int) -> int:
    return 0x7FFFFFFF if n == -1 else n  # the host's own reading of -1
