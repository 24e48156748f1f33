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

from ..draft import MAX_PRED_TOKENS, Draft, MtpDraft, gate, in_use
from ..engine import (
    ANY_ROWS,
    HIDDEN_OFF,
    ROLLBACK_COPIES,
    ROLLBACK_RECENT,
    ROLLBACK_SAVED,
    Context,
    EngineError,
    Model,
    ffi,
)
from ..gguf import check_inside, check_pair, read_header, same_tensors
from ..settings import current as settings
from ..speculation import (
    CPU_COSTS,
    GPU_COSTS,
    AdaptiveDepth,
    ChainDrafter,
    CommonSpeculative,
    Drafter,
    DsparkDrafter,
    MtpDrafter,
    MtpHeadsDrafter,
    NgramDrafter,
    NoDrafter,
    NominalDepth,
)
from . import servers
from .checkpoints import Checkpoints
from .contract import ContextParams, Llama
from .library import current as library
from .session import SINGLE_ROWS, Session

__all__ = ["Admission", "admit", "depth_in_scope", "head_in_scope", "refuse_embeddings"]

_CAUSAL = (llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL)

# Architectures whose rows are several streams wide. Embeddings are one wide, but src/llama-context.cpp copies the width
# of all: an assertion ends the process.
_STREAMS = ("deepseek4", "qwen4exp")

# By how many positions the engine enlarges what it reads of a cache (src/llama-kv-cache.cpp, get_n_kv). A GPU divides
# the work on a row by that size, so rows on two sides of such a mark are not verified together there.
GPU_BLOCK = 256

# Architectures whose rows were compared on a GPU, alone and in a verify.
_GPU_TESTED = ("deepseek4",)

# Rows that a draft looks back on where the head attends over everything. What a head makes of more was not measured.
_LOOKS_BACK = 1024

# Windows of rows that several heads have room for: without room they start over with one.
_WINDOWS_OF_HEADS = 8

# Drafts from the text where each costs a copy of the running states in every decode.
_OF_TEXT_BY_COPIES = 3

# Of the Llama that is being constructed, for the contexts that its constructor creates.
_scope: ContextVar[Draft | None] = ContextVar("draft", default=None)


class _NoSpeculation(Exception):
    """The Llama is as good as without a draft, and stays so."""


@dataclass
class Admission:
    """A Llama that is about to be constructed with a draft.

    Attributes:
        why_off: why it will not draft, for a warning; None where it will, or where nobody has to be told.
        drafts: whether a session is to be opened.
        tested: its rows were tested to have the same bits alone and in a verify, on some machines.
        n_heads: MTP heads; of several each makes one draft.
    """

    draft: Draft
    why_off: str | None
    drafts: bool
    tested: bool
    n_heads: int

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
                session = _open(llama, self.draft, tested=self.tested, n_heads=self.n_heads)
                if _recurrent(llama) and self.draft.num_pred_tokens > 0:
                    self.why_off = "the memory of this model (recurrent or hybrid) cannot take back rejected drafts"
                    if session is not None:
                        self.why_off += "; prompts that begin as the one before go on from checkpoints"
            except _NoSpeculation as err:
                self.why_off = str(err)
            except BaseException:
                llama.close()
                raise
        if self.why_off:
            warnings.warn(f"{type(self.draft).__name__}: no speculation: {self.why_off}", RuntimeWarning, stacklevel=4)
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
    if not isinstance(draft, Draft) or model_path is None:
        return None
    for name in ("n_batch", "type_k", "type_v"):
        value = arguments.get(name)
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more")
    why_off = _why_off(arguments)
    drafts = not (why_off or settings().disable)
    tested, n_heads = True, 1
    if drafts and os.path.exists(model_path):
        name = type(draft).__name__
        # Before the host loads the model: a pair that does not fit may cost minutes, or end the process.
        if in_use(draft):
            raise ValueError(f"{name}: this draft is in use by another Llama; give each Llama one of its own")
        if isinstance(draft, MtpDraft):
            overrides = arguments.get("kv_overrides") or {}
            if draft.model_path is None:
                n_heads = check_inside(model_path, overrides).n_nextn
            else:
                n_heads = check_pair(model_path, draft.model_path, overrides)[1].n_nextn
        on_gpu = _on_gpu(arguments.get("n_gpu_layers", 0))
        tested = _rows_tested(
            model_path,
            flash=bool(arguments.get("flash_attn")),
            ring=arguments.get("swa_full") is False,
            on_gpu=on_gpu,
        )
        caches = {kind for name in ("type_k", "type_v") if (kind := arguments.get(name)) is not None}
        n_rows = 1 + min(draft.num_pred_tokens, MAX_PRED_TOKENS)
        if _asks_for_exact(draft) and (
            why := _why_not_exact(arguments.get("n_gpu_layers", 0), n_rows, caches, tested=tested)
        ):
            raise ValueError(
                f"{name}: exact=True (or DS4_MTP_STRICT) cannot be promised here: {why}. Without it the text is "
                "near-greedy there"
            )
    return Admission(draft, why_off, drafts, tested, n_heads)


def depth_in_scope(model: int | None, params: ContextParams) -> int | None:
    """Rows that a context of `model` has to be made for to roll back, which is created now.

    None where no Llama with a draft creates it, or where nothing has to be done for that.
    """
    draft = _scope.get()
    if draft is None or model is None or (kind := library().rollback(model)) not in (ROLLBACK_RECENT, ROLLBACK_COPIES):
        return None
    # Checkpoints of DeepSeek-V4 need one, to cut memory where they are loaded.
    least = int(kind == ROLLBACK_RECENT and draft.checkpoints_mb > 0 and params.n_ubatch > 1)
    return max(*_depths(draft, params, kind), least)


def head_in_scope() -> bool:
    """Whether the model that is loaded now needs the MTP block that is in its file."""
    draft = _scope.get()
    return isinstance(draft, MtpDraft) and draft.model_path is None and draft.num_pred_tokens > 0


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


def _asks_for_exact(draft: Draft) -> bool:
    return bool(draft.exact or settings().strict)


def _rows_tested(model_path: str, *, flash: bool, ring: bool, on_gpu: bool) -> bool:
    """Whether a row of the model rounds alike alone and among few, as far as its attention is concerned.

    Flash attention on the CPU divides the work on a single row by the length of the text, except where there are sinks
    (ggml/src/ggml-cpu/ops.cpp). In a cache of a window's size (`ring`, swa_full=False) rows that were taken back leave
    the next ones in other cells than without a draft, and the order of cells is that of sums.
    """
    if not flash and not ring and not on_gpu:
        return True
    try:
        header = read_header(model_path)
    except (OSError, ValueError):
        return False  # the host says what is wrong with the file
    sinks = any(name.endswith("attn_sinks.weight") for name in header.tensors)
    windowed = any(key.endswith(".attention.sliding_window") for key in header.metadata)
    known = header.metadata.get("general.architecture") in _GPU_TESTED
    return not (ring and windowed) and (sinks or not flash) and (known or not on_gpu)


def _why_not_exact(n_gpu_layers: int, n_rows: int, caches: AbstractSet[int], *, tested: bool) -> str | None:
    """Why a row may round otherwise in a verify of `n_rows` than alone, None where it need not. `caches`: GGML types"""
    if not tested:
        return (
            "the attention of this model computes a single row in another order than several (flash_attn, "
            "swa_full=False, or a GPU)"
        )
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return f"it was tested on no CPU of this kind ({machine}), on x86-64 alone"
    rows = servers.rows(n_gpu_layers)
    if rows != ANY_ROWS:
        where = f"layers are on {'a server' if servers.current() else 'a GPU'} (n_gpu_layers={n_gpu_layers})"
        if rows == 0:
            return f"{where} of a kind on which it was not tested"
        if n_rows > rows:
            return f"{where}, where {rows} rows are computed as if each were alone: num_pred_tokens={rows - 1} at most"
        if caches - {llama_cpp.GGML_TYPE_F16}:
            return f"{where}, where it holds for a cache of F16 alone (type_k, type_v)"
    if library().has_gpu and "GGML_OP_OFFLOAD_MIN_BATCH" in os.environ:
        return "GGML_OP_OFFLOAD_MIN_BATCH is set, by which a verify may go to a GPU where a single row does not"
    return None


def _depths(draft: Draft, params: ContextParams, rollback: int) -> tuple[int, int]:
    """Drafts per cycle by the head, and from the text, of a model that takes rows back by `rollback`.

    A verify takes one row more, and has to fit a micro-batch for its rows to be rolled back.
    """
    room = max(0, min(int(params.n_batch), int(params.n_ubatch)) - 1)
    most = min(draft.num_pred_tokens, MAX_PRED_TOKENS, room, _of_block(draft) or MAX_PRED_TOKENS)
    of_text = min(room, _OF_TEXT_BY_COPIES if rollback == ROLLBACK_COPIES else MAX_PRED_TOKENS)
    if not isinstance(draft, MtpDraft):
        return 0, min(most, of_text)
    ngram = draft.adaptive if draft.ngram is None else draft.ngram
    return most, of_text if ngram else 0


def _of_block(draft: Draft) -> int:
    """Tokens that the head drafts at once, 0 where it makes one after the other or there is none."""
    return draft.of_block if isinstance(draft, MtpDraft) else 0


def _open(llama: Llama, draft: Draft, *, tested: bool, n_heads: int) -> Session | None:
    """Load the head, if there is one, and join it with `llama`; None where there is nothing to do.

    Raises:
        ValueError: the files do not fit together.
        _NoSpeculation: the engine cannot draft, most likely for want of memory.
    """
    kind = library().rollback(llama._model.model)
    of_head, of_text = (0, 0) if kind == ROLLBACK_SAVED else _depths(draft, llama.context_params, kind)
    if n_heads > 1:
        of_head = min(of_head, n_heads)
    checkpoints = _checkpoints(llama, draft)
    if of_head == of_text == 0 and checkpoints is None:
        return None
    if llama.pooling_type() != llama_cpp.LLAMA_POOLING_TYPE_NONE:
        raise _NoSpeculation(f"the engine gives no hidden rows where it pools (pooling_type={llama.pooling_type()})")
    target = Context(library(), llama._ctx.ctx, owned=False)
    if target.n_rollback < max(of_head, of_text):
        raise _NoSpeculation(
            "the engine could not create a context that can roll back (its log on stderr says why)"
            if kind in (ROLLBACK_RECENT, ROLLBACK_COPIES)
            else "a row of this model sees those behind it"
        )
    n_gpu_layers, params = llama.model_params.n_gpu_layers, llama.context_params
    on_gpu, caches = _on_gpu(n_gpu_layers), {params.type_k, params.type_v}
    n_rows = 1 + (of_head if isinstance(draft, MtpDraft) else of_text)  # as admitted; beside a head the text has fewer
    why_not = _why_not_exact(n_gpu_layers, n_rows, caches, tested=tested)
    exact = why_not is None
    if on_gpu and exact:
        of_text = min(of_text, servers.rows(n_gpu_layers) - 1)
    with ExitStack() as on_error:
        try:
            drafter = _open_drafter(llama, draft, target, on_error, of_head=of_head, of_text=of_text, n_heads=n_heads)
        except EngineError as err:
            raise _NoSpeculation(str(err)) from None
        spec = CommonSpeculative(
            target,
            drafter,
            n_draft=max(of_head, of_text),
            n_asked=of_head,
            within=GPU_BLOCK if on_gpu and exact else None,
        )
        spec.counters.exact = exact
        session = Session(
            llama,
            draft,
            spec,
            depth=_depth(llama, of_head, exact=exact, at_once=_of_block(draft) > 0) if draft.adaptive else None,
            checkpoints=checkpoints,
            inexact=draft.exact is False and not settings().strict,
            single_rows=1 if on_gpu and exact else SINGLE_ROWS,
        )
        on_error.pop_all()
    # The host's stack runs backwards: the head goes before the target.
    llama._stack.callback(session.close)
    return session


def _depth(llama: Llama, n_max: int, *, exact: bool, at_once: bool) -> AdaptiveDepth:
    """What chooses each cycle's drafts: by the clock where that cannot change the text."""
    if exact:
        return AdaptiveDepth(n_max, at_once=at_once)
    n_gpu_layers = _n_gpu_layers(llama.model_params.n_gpu_layers)
    whole = _on_gpu(n_gpu_layers) and n_gpu_layers > llama_cpp.llama_model_n_layer(llama._model.model)
    return NominalDepth(n_max, GPU_COSTS if whole else CPU_COSTS, at_once=at_once)


def _recurrent(llama: Llama) -> bool:
    return library().rollback(llama._model.model) == ROLLBACK_SAVED


def _checkpoints(llama: Llama, draft: Draft) -> Checkpoints | None:
    """For memory that cannot be cut, where a text that goes on behind a checkpoint rounds as one from its beginning.

    Loading puts a window's rows at the beginning of the cache. Where they were a multiple of 128 further on, every
    kernel of the CPU sums them in the same order; in a cache of a window's size (swa_full=False) they lie in a ring,
    which turns otherwise then. And the host must want no row of logits of what is not evaluated.
    """
    kind = library().rollback(llama._model.model)
    if kind not in (ROLLBACK_RECENT, ROLLBACK_SAVED, ROLLBACK_COPIES) or _on_gpu(llama.model_params.n_gpu_layers):
        return None
    params = llama.context_params
    if draft.checkpoints_mb == 0 or not params.swa_full or params.n_batch % 256 != 0 or llama._logits_all:
        return None
    return Checkpoints(draft.checkpoints_mb * 10**6)


def _open_drafter(
    llama: Llama, draft: Draft, target: Context, on_error: ExitStack, *, of_head: int, of_text: int, n_heads: int
) -> Drafter:
    """As `_open_head`, and before it what drafts from the text."""
    if of_head == of_text == 0:
        return NoDrafter()
    if of_head == 0 or not isinstance(draft, MtpDraft):
        return NgramDrafter()
    head = _open_head(llama, draft, target, on_error, n_heads=n_heads)
    return ChainDrafter(NgramDrafter(), head) if of_text else head


def _open_head(llama: Llama, draft: MtpDraft, target: Context, on_error: ExitStack, *, n_heads: int) -> Drafter:
    """
    Raises:
        EngineError: the engine could not load the head, or create its context.
        ValueError: the head is of another shape than the target.
    """
    model = _model_of_head(llama, draft)
    resources = ExitStack()
    on_error.callback(resources.close)
    resources.callback(model.close)
    at_once = draft.of_block
    window = target.window or _LOOKS_BACK
    n_rows = max(window + max(n_heads, 1) - 1, at_once)
    # A window of rows per decode, and room for some windows, whatever the target's context length is.
    context = model.new_context(
        like=_bytes(llama.context_params),
        mtp=not at_once,
        n_ctx=(3 if n_heads <= 1 else _WINDOWS_OF_HEADS) * window,
        n_batch=n_rows,
        n_ubatch=n_rows,
        n_seq_max=1,
        n_rs_seq=0,
        n_outputs_max=max(1, at_once),
        n_outputs_max_per_seq=max(1, at_once),
        swa_full=n_heads > 1,
        embeddings=False,
        n_threads=draft.n_threads or llama.n_threads,
        n_threads_batch=draft.n_threads_batch or llama.n_threads_batch,
        # A DSpark head has the target's embeddings and output.
        **({"ctx_other": ffi.cast("struct llama_context *", llama._ctx.ctx)} if at_once else {}),
    )
    on_error.callback(context.close)
    chosen = gate(draft)
    if at_once:
        if context.n_vocab != target.n_vocab:
            raise ValueError(f"{draft.model_path} does not belong to {llama.model_path} as the engine loaded it")
        target.keep_layers(model.target_layers)
        on_error.callback(target.set_hidden, HIDDEN_OFF)
        return DsparkDrafter(
            context,
            width=target.n_hidden,
            n_block=at_once,
            mask=context.mask,
            confident="conf_proj.weight" in read_header(draft.model_path or "").tensors,
            window=window,
            gate=chosen,
            on_close=resources.close,
        )
    if (context.n_embd_out, context.n_vocab) != (target.n_embd_out, target.n_vocab):
        raise ValueError(
            f"{draft.model_path or 'its MTP block'} does not belong to {llama.model_path} as the engine loaded it; "
            "take the MTP GGUF that was converted from the same checkpoint"
        )
    if n_heads > 1:
        return MtpHeadsDrafter(context, n_heads=n_heads, window=window, gate=chosen, on_close=resources.close)
    n_gpu_layers = llama.model_params.n_gpu_layers if draft.n_gpu_layers is None else draft.n_gpu_layers
    if chosen.open and _on_gpu(n_gpu_layers) and target.window:  # of the others no graph was tried on a GPU
        context.pick_in_graph()
    return MtpDrafter(context, window=window, gate=chosen, on_close=resources.close)


def _model_of_head(llama: Llama, draft: MtpDraft) -> Model:
    """
    Raises:
        EngineError: the engine could not load it.
    """
    if draft.model_path is None:
        return Model.borrowed(library(), llama._model.model, llama.model_path)
    if draft.n_gpu_layers is None:
        # A DSpark head computes with its model's output, where that lies.
        placed = servers.for_head(llama.model_params.n_gpu_layers, there=draft.of_block > 0)
    else:
        placed = {"n_gpu_layers": _n_gpu_layers(draft.n_gpu_layers)} | servers.for_head(draft.n_gpu_layers, there=True)
    # The Llama's overrides of metadata are the head's too: what it is told of its trunk's shape.
    overrides = ctypes.cast(llama.model_params.kv_overrides, ctypes.c_void_p).value or 0
    return Model(
        library(),
        draft.model_path,
        like=_bytes(llama.model_params),
        load_mtp=True,
        target=Model.borrowed(library(), llama._model.model, llama.model_path),
        shared=same_tensors(
            read_header(draft.model_path), read_header(llama.model_path), ("token_embd.weight", "output.weight")
        ),
        kv_overrides=ffi.cast("void *", overrides),
        **placed,
    )


def _on_gpu(n_gpu_layers: int) -> bool:
    """Whether layers are computed otherwise than by this CPU's kernels: by a GPU, or by a server that has others."""
    return servers.rows(n_gpu_layers) != ANY_ROWS


def _bytes(structure: Any) -> bytes:
    return bytes(structure)


def _n_gpu_layers(n: int) -> int:
    return 0x7FFFFFFF if n == -1 else n  # the host's own reading of -1
