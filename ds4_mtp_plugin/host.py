"""The seam to llama-cpp-python: with session.py the only file that knows its internals (of version 0.3.36).

``adopt`` wraps a few methods of ``llama_cpp.Llama`` and its context. A Llama that was given no MtpDraft runs the host's
code as it is; one that was gets a session, which its methods go through.
"""

from __future__ import annotations

import contextlib as _contextlib
import contextvars as _contextvars
import copy as _copy
import ctypes as _ctypes
import functools as _functools
import os as _os
import pathlib as _pathlib
import platform as _platform
import typing as _t
import warnings as _warnings

import llama_cpp as _llama_cpp
import llama_cpp._ctypes_extensions as _ctypes_extensions
import llama_cpp._internals as _internals

from . import engine as _engine
from .draft import MAX_PRED_TOKENS as _MAX_PRED_TOKENS
from .draft import MtpDraft as _MtpDraft
from .gguf_file import check_pair as _check_pair
from .mtp import MtpDrafter as _MtpDrafter
from .session import Session as _Session
from .settings import current as _current
from .speculative import CommonSpeculative as _CommonSpeculative

_CAUSAL = (_llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED, _llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL)

# Architectures whose rows are several streams wide. Embeddings are one wide, but src/llama-context.cpp copies the width
# of all: an assertion ends the process.
_STREAMS = ("deepseek4", "qwen4exp")

# The draft of the Llama that is being constructed, for the contexts that its constructor creates.
_draft_in_scope: _contextvars.ContextVar[_MtpDraft | None] = _contextvars.ContextVar("draft", default=None)


def library_path() -> str:
    """The name by which the host opened its llama.cpp library."""
    return str(_llama_cpp.llama_cpp._lib._name)


def adopt(library: _engine.Library) -> None:
    """Make ``llama_cpp.Llama`` take an MtpDraft. Safe to call again."""
    llama: _t.Any = _llama_cpp.Llama
    if hasattr(llama, "_ds4_mtp_adopted"):
        return
    llama._ds4_mtp_adopted = True
    _find_libraries_here_too()

    context_type: _t.Any = _internals.LlamaContext
    original_context_init = context_type.__init__

    @_functools.wraps(original_context_init)
    def context_init(self: _t.Any, *, model: _t.Any, params: _t.Any, verbose: bool = True) -> None:
        draft = _draft_in_scope.get()
        if draft is not None:
            params.n_rs_seq = _depth(draft, params)
            try:
                original_context_init(self, model=model, params=params, verbose=verbose)
            except ValueError:
                if not params.n_rs_seq:
                    raise
                params.n_rs_seq = 0  # perhaps there is memory for the context, if not for its snapshots
                original_context_init(self, model=model, params=params, verbose=verbose)
            self._ds4_mtp_snapshots = True
        else:
            original_context_init(self, model=model, params=params, verbose=verbose)
        if params.embeddings and _architecture(model) in _STREAMS:
            self.decode = _refuse_embeddings

    context_type.__init__ = context_init

    original_decode = context_type.decode

    @_functools.wraps(original_decode)
    def decode(self: _t.Any, batch: _t.Any) -> None:
        if (session := self.__dict__.get("_ds4_mtp")) is not None:
            session.overtake()
        original_decode(self, batch)

    context_type.decode = decode

    original_clear = context_type.kv_cache_clear

    @_functools.wraps(original_clear)
    def kv_cache_clear(self: _t.Any) -> None:
        if (session := self.__dict__.get("_ds4_mtp")) is not None:
            session.settle()
        original_clear(self)

    context_type.kv_cache_clear = kv_cache_clear

    original_get_logits = context_type.get_logits

    @_functools.wraps(original_get_logits)
    def get_logits(self: _t.Any) -> _t.Any:
        session = self.__dict__.get("_ds4_mtp")
        if session is None or session.row is None:
            return original_get_logits(self)
        return self.get_logits_ith(session.row[0])

    context_type.get_logits = get_logits

    original_seq_rm = context_type.kv_cache_seq_rm

    @_functools.wraps(original_seq_rm)
    def kv_cache_seq_rm(self: _t.Any, seq_id: int, p0: int, p1: int) -> bool:
        # Snapshots are for our own rollbacks. The host asks in order to keep a prompt's beginning; without a draft
        # the engine refuses that, and evaluating less than a plain run does would round otherwise than it.
        if (session := self.__dict__.get("_ds4_mtp")) is not None:
            session.settle()
        if "_ds4_mtp_snapshots" in self.__dict__ and 0 < p0 <= _pos_max(self, seq_id):
            return False
        return bool(original_seq_rm(self, seq_id, p0, p1))

    context_type.kv_cache_seq_rm = kv_cache_seq_rm

    original_init = llama.__init__

    @_functools.wraps(original_init)
    def init(self: _t.Any, *args: _t.Any, **kwargs: _t.Any) -> None:
        if (before := self.__dict__.pop("_ds4_mtp", None)) is not None:  # a second __init__
            before.close()
        draft = kwargs.get("draft_model")
        model_path = args[0] if args else kwargs.get("model_path")
        if not isinstance(draft, _MtpDraft) or model_path is None:
            original_init(self, *args, **kwargs)
            return
        self.__dict__.setdefault("_stack", _contextlib.ExitStack())  # the host's __del__ closes it
        _check_arguments(kwargs)
        why_off = _why_off(kwargs)
        disabled = _current().disable
        if not (why_off or disabled) and _os.path.exists(model_path):
            # Before the host loads the model: a pair that does not fit may cost minutes, or end the process.
            if draft._spec is not None:
                raise ValueError(
                    "MtpDraft: this draft is in use by another Llama; give each Llama an MtpDraft of its own"
                )
            _check_pair(model_path, draft.model_path, kwargs.get("kv_overrides") or {})
            if (draft.exact or _current().strict) and (why := _why_not_exact(kwargs.get("n_gpu_layers", 0))):
                raise ValueError(
                    f"MtpDraft: exact=True (or DS4_MTP_STRICT) cannot be promised here: {why}. Without it the text is "
                    "near-greedy there"
                )
        token = _draft_in_scope.set(None if why_off or disabled else draft)
        try:
            # Without a draft the host leaves logits_all as the app set it.
            original_init(self, *args, **{**kwargs, "draft_model": None})
        finally:
            _draft_in_scope.reset(token)
        if self.lora_path and not self._lora_adapter:
            # The host takes the engine's null for an adapter, and the first decode would end the process.
            self.close()
            raise RuntimeError(f"Failed to initialize LoRA adapter from lora path: {self.lora_path}")
        self.draft_model = draft
        if disabled:
            return
        if not why_off:
            try:
                session = _open_session(library, self, draft)
            except _NoSpeculation as err:
                why_off = str(err)
            except BaseException:
                self.close()
                raise
        if why_off:
            _warnings.warn(f"MtpDraft: no speculation: {why_off}", RuntimeWarning, stacklevel=2)
        elif session is not None:
            self._ds4_mtp = self._ctx._ds4_mtp = session

    llama.__init__ = init

    original_getstate = llama.__getstate__

    @_functools.wraps(original_getstate)
    def getstate(self: _t.Any) -> dict[str, _t.Any]:
        state: dict[str, _t.Any] = original_getstate(self)
        if isinstance(draft := state.get("draft_model"), _MtpDraft):
            state["draft_model"] = _copy.copy(draft)  # what is made of the state cannot share a head with this Llama
        return state

    llama.__getstate__ = getstate

    def wrap(name: str) -> None:
        original = getattr(llama, name)
        in_session = getattr(_Session, name)

        @_functools.wraps(original)
        def method(self: _t.Any, *args: _t.Any, **kwargs: _t.Any) -> _t.Any:
            session = self.__dict__.get("_ds4_mtp")
            if session is None:
                return original(self, *args, **kwargs)
            return in_session(session, _functools.partial(original, self), *args, **kwargs)

        setattr(llama, name, method)

    for name in ("_create_completion", "generate", "eval", "sample", "reset", "save_state", "load_state"):
        wrap(name)


def _pos_max(context: _t.Any, seq_id: int) -> int:
    return int(_llama_cpp.llama_memory_seq_pos_max(context.memory, max(seq_id, 0)))


def _find_libraries_here_too() -> None:
    """The host's modules that load a library of their own (libggml, libmtmd) find ours where the host has none."""
    original = _ctypes_extensions.load_shared_library

    @_functools.wraps(original)
    def load_shared_library(lib_base_name: str, base_path: _pathlib.Path) -> _t.Any:
        try:
            return original(lib_base_name, base_path)
        except FileNotFoundError:
            return original(lib_base_name, _pathlib.Path(library_path()).parent)

    _ctypes_extensions.load_shared_library = load_shared_library


class _NoSpeculation(Exception):
    """The Llama is as good as without a draft, and stays so."""


def _architecture(model: _t.Any) -> str:
    value = _ctypes.create_string_buffer(64)
    _llama_cpp.llama_model_meta_val_str(model.model, b"general.architecture", value, len(value))
    return value.value.decode()


def _refuse_embeddings(batch: _t.Any) -> None:
    raise RuntimeError(
        "the engine gives no embeddings of a model with hyper-connection streams. Use another model for embeddings, "
        "and embedding=False to generate with this one"
    )


def _check_arguments(arguments: _t.Mapping[str, _t.Any]) -> None:
    """What the host does not survive.

    Raises:
        ValueError: a value is out of range.
    """
    for name in ("n_batch", "type_k", "type_v"):
        value = arguments.get(name)
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more")


def _why_off(arguments: _t.Mapping[str, _t.Any]) -> str | None:
    if arguments.get("vocab_only"):
        return "the Llama loads the vocabulary only (vocab_only=True)"
    if arguments.get("embedding"):
        return "the Llama is for embeddings (embedding=True)"
    if arguments.get("attention_type", _CAUSAL[0]) not in _CAUSAL:
        return "a row would see the drafts behind it (attention_type is not causal)"
    return None


def _why_not_exact(n_gpu_layers: int) -> str | None:
    """Why a row may round otherwise in a verify than alone; None where it does not."""
    machine = _platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return f"it was tested on no CPU of this kind ({machine}), on x86-64 alone"
    if not _llama_cpp.llama_supports_gpu_offload():
        return None
    if n_gpu_layers:
        return f"layers are on a GPU (n_gpu_layers={n_gpu_layers}), whose kernels depend on the number of rows"
    if "GGML_OP_OFFLOAD_MIN_BATCH" in _os.environ:
        return "GGML_OP_OFFLOAD_MIN_BATCH is set, by which a verify may go to a GPU where a single row does not"
    return None


def _depth(draft: _MtpDraft, params: _t.Any) -> int:
    """Drafts a cycle. A verify takes one row more, and has to fit a micro-batch for its rows to be rolled back; one
    row beyond that, because with n_ubatch == n_rs_seq + 1 the engine aborts where a batch finds no room
    (src/llama-batch.cpp, split_equal) instead of refusing it."""
    room = min(int(params.n_batch), int(params.n_ubatch)) - 2
    return max(0, min(draft.num_pred_tokens, _MAX_PRED_TOKENS, room))


def _open_session(library: _engine.Library, llama: _t.Any, draft: _MtpDraft) -> _Session | None:
    """Load the head and join it with `llama`; None where there is nothing to draft (a depth of 0).

    Raises:
        ValueError: the files do not fit together.
        _NoSpeculation: the engine cannot draft, most likely for want of memory.
    """
    depth = _depth(draft, llama.context_params)
    if depth == 0:
        return None
    if llama.pooling_type() != _llama_cpp.LLAMA_POOLING_TYPE_NONE:
        raise _NoSpeculation(f"the engine gives no hidden rows where it pools (pooling_type={llama.pooling_type()})")
    target = _engine.Context(library, llama._ctx.ctx, owned=False)
    if target.n_rs_seq < depth:
        raise _NoSpeculation("the engine could not create a context with snapshots (its log on stderr says why)")
    with _contextlib.ExitStack() as on_error:
        try:
            model = _engine.Model(
                library,
                draft.model_path,
                like=bytes(llama.model_params),
                load_mtp=True,
                kv_overrides=_kv_overrides(llama),
                **({} if draft.n_gpu_layers is None else {"n_gpu_layers": _n_gpu_layers(draft.n_gpu_layers)}),
            )
            on_error.callback(model.close)
            context = _mtp_context(model, target, llama, draft)
            on_error.callback(context.close)
            drafter = _MtpDrafter(context, gate=draft._gate(), on_close=model.close)
        except ValueError as err:
            raise _NoSpeculation(str(err)) from None
        if (context.n_embd_out, context.n_vocab) != (target.n_embd_out, target.n_vocab):
            raise ValueError(
                f"{draft.model_path} does not belong to {llama.model_path} as the engine loaded it; take the "
                "MTP GGUF that was converted from the same checkpoint"
            )
        spec = _CommonSpeculative(target, drafter, n_draft=depth)
        spec.counters.exact = _why_not_exact(llama.model_params.n_gpu_layers) is None
        draft._attach(spec)
        on_error.pop_all()
    # The host's stack runs backwards: the head goes before the target.
    llama._stack.callback(draft._detach)
    return _Session(llama, draft)


def _kv_overrides(llama: _t.Any) -> _t.Any:
    """The Llama's overrides of metadata, which are the head's too: what it is told of its trunk's shape."""
    address = _ctypes.cast(llama.model_params.kv_overrides, _ctypes.c_void_p).value or 0
    return _engine.ffi.cast("struct llama_model_kv_override *", address)


def _n_gpu_layers(n: int) -> int:
    return 0x7FFFFFFF if n == -1 else n  # the host's own reading of -1


def _mtp_context(model: _engine.Model, target: _engine.Context, llama: _t.Any, draft: _MtpDraft) -> _engine.Context:
    """A window of rows a decode, and room for three windows, whatever the target's context length is."""
    return model.new_context(
        like=bytes(llama.context_params),
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
