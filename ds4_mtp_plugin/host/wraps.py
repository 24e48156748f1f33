"""What is wrapped of llama_cpp: one table, applied once, undoable.

A function here stands for the method of its name. It gets the host's own as first argument and the object as second;
an object without a session goes straight to the host's own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import llama_cpp
from llama_cpp import _ctypes_extensions, _internals
from llama_cpp.llama_cpp import llama_get_model, llama_memory_seq_pos_max

from ..draft import Draft
from ..engine import ServerLost, naming_servers
from . import library, servers
from .contract import Context, Llama, Model
from .opening import admit, depth_in_scope, head_in_scope, refuse_embeddings
from .session import Session

__all__ = ["apply", "session_of", "undo"]

_Host = Callable[..., Any]

# Where a Llama, and its context, keep their session.
_SESSION = "_ds4_mtp"

# On a context: that it was made for drafts, and why it refuses to decode.
_ROLLS_BACK, _REFUSAL = "_ds4_mtp_rolls_back", "_ds4_mtp_refusal"

# Behind the last row of any batch: the engine finds no row there.
_NO_ROW = 1 << 30


def session_of(owner: object) -> Session | None:
    """The session of a Llama or of its context; None where it does not draft."""
    found: Session | None = _fields(owner).get(_SESSION)
    return found


def _fields(owner: object) -> dict[str, Any]:
    """The attributes of an object itself, to read and write past its class."""
    return owner.__dict__


# -- Llama --


def init(host: _Host, llama: Llama, *args: object, **kwargs: object) -> None:
    if (before := _fields(llama).pop(_SESSION, None)) is not None:  # a second __init__
        before.close()
    _fields(llama).setdefault("_stack", ExitStack())  # the host's __del__ closes it, even where this raises
    admission = admit({**dict(zip(("model_path",), args)), **kwargs})
    if admission is None:
        host(llama, *args, **kwargs)
        return
    with admission.in_scope():
        # Without a draft the host leaves logits_all as the app set it.
        host(llama, *args, **{**kwargs, "draft_model": None})
    if llama.lora_path and not llama._lora_adapter:
        # The host takes the engine's null for an adapter, and the first decode would end the process.
        llama.close()
        raise RuntimeError(f"Failed to initialize LoRA adapter from lora path: {llama.lora_path}")
    _fields(llama)["draft_model"] = admission.draft
    session = admission.open(llama)
    if session is not None:
        _fields(llama)[_SESSION] = _fields(llama._ctx)[_SESSION] = session


def getstate(host: _Host, llama: Llama) -> dict[str, Any]:
    state: dict[str, Any] = host(llama)
    if isinstance(draft := state.get("draft_model"), Draft):
        state["draft_model"] = copy.copy(draft)  # what is made of the state cannot share a head with this Llama
    return state


def reduce_ex(host: _Host, llama: Llama, protocol: object) -> Any:
    """Pickles name this package before the host: where they are loaded, the host has to find our library."""
    reduced = host(llama, protocol)
    if not isinstance(reduced, tuple) or not isinstance(_fields(llama).get("draft_model"), Draft):
        return reduced
    return new_llama, (type(llama),), *reduced[2:]


def new_llama(kind: type[Any]) -> Any:
    """An empty Llama, for unpickling."""
    return object.__new__(kind)


def completion(host: _Host, llama: Llama, *args: object, **kwargs: object) -> Any:
    chunks = host(llama, *args, **kwargs)
    session = session_of(llama)
    if session is None:
        return chunks
    wanted = kwargs.get("max_tokens")
    return session.completion(chunks, wanted if isinstance(wanted, int) and wanted > 0 else None)


def generate(host: _Host, llama: Llama, *args: object, **kwargs: object) -> Any:
    session = session_of(llama)
    if session is None:
        return host(llama, *args, **kwargs)
    # The loop asks the draft_model for tokens, as the host's protocol has it, and ours have none to give.
    return session.generate(llama, host(llama, *args, **kwargs))


def evaluate(host: _Host, llama: Llama, *args: object, **kwargs: object) -> None:
    session = session_of(llama)
    tokens = _only("tokens", args, kwargs)
    if session is None or tokens is _NOT_ONE:
        host(llama, *args, **kwargs)
    else:
        session.eval(llama, functools.partial(host, llama), tokens)


def reset(host: _Host, llama: Llama) -> None:
    session = session_of(llama)
    if session is None:
        host(llama)
    else:
        session.reset(llama, functools.partial(host, llama))


def save_state(host: _Host, llama: Llama) -> Any:
    session = session_of(llama)
    state = host(llama) if session is None else session.save_state(functools.partial(host, llama))
    _check_servers(llama._ctx)  # the host takes an empty state for one
    return state


def load_state(host: _Host, llama: Llama, *args: object, **kwargs: object) -> None:
    session = session_of(llama)
    state = _only("state", args, kwargs)
    try:
        if session is None or state is _NOT_ONE:
            host(llama, *args, **kwargs)
        else:
            session.load_state(llama, functools.partial(host, llama), state)
    except RuntimeError:
        _check_servers(llama._ctx)
        raise


_NOT_ONE: Any = object()


def _only(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
    """The one argument of a call, `name`; _NOT_ONE where there are others, so that the host raises as without us."""
    return (args[0] if args else kwargs.get(name, _NOT_ONE)) if len(args) + len(kwargs) == 1 else _NOT_ONE


class DraftModel:
    """``Llama.draft_model``: a draft that would do nothing is refused, where the host would take it silently."""

    def __get__(self, llama: Llama | None, owner: type | None = None) -> Any:
        if llama is None:
            return self
        try:
            return _fields(llama)["draft_model"]
        except KeyError:
            raise AttributeError("draft_model") from None

    def __set__(self, llama: Llama, value: object) -> None:
        session = session_of(llama)
        if session is not None and value is not None and not session.drafts_with(value):
            raise ValueError(
                f"draft_model is {value!r}: this Llama was made for its own draft; that, or None to draft nothing, "
                "is all that it takes. Make another Llama for another draft"
            )
        if session is None and isinstance(value, Draft) and value is not _fields(llama).get("draft_model"):
            raise ValueError(
                f"draft_model is {value!r}: this Llama was made without it and has no memory for drafts; pass it to "
                f"the constructor, Llama(..., draft_model={type(value).__name__}(...))"
            )
        _fields(llama)["draft_model"] = value


# -- LlamaModel, LlamaContext, LlamaSampler --


def model_init(host: _Host, model: Model, *, path_model: str, params: Any, verbose: bool = True) -> None:
    if head_in_scope():
        params.load_mtp = True
    with servers.place(params), naming_servers(library.current()):
        host(model, path_model=path_model, params=params, verbose=verbose)


def context_init(host: _Host, context: Context, *, model: Model, params: Any, verbose: bool = True) -> None:
    n_rs_seq = depth_in_scope(model.model, params)
    with naming_servers(library.current()):
        if n_rs_seq is None:
            host(context, model=model, params=params, verbose=verbose)
        else:
            params.n_rs_seq = n_rs_seq
            try:
                host(context, model=model, params=params, verbose=verbose)
            except ValueError:
                if not params.n_rs_seq:
                    raise
                params.n_rs_seq = 0  # perhaps there is memory for the context, if not for longer rings
                host(context, model=model, params=params, verbose=verbose)
            _fields(context)[_ROLLS_BACK] = True
    if params.embeddings and (why := refuse_embeddings(model.model)):
        _fields(context)[_REFUSAL] = why


def decode(host: _Host, context: Context, batch: object) -> None:
    if (why := _fields(context).get(_REFUSAL)) is not None:
        raise RuntimeError(why)
    if (session := session_of(context)) is not None:
        session.overtake()
    try:
        host(context, batch)
    except RuntimeError:
        _check_servers(context)
        raise


def encode(host: _Host, context: Context, batch: object) -> None:
    try:
        settled(host, context, batch)
    except RuntimeError:
        _check_servers(context)
        raise


def _check_servers(context: Context) -> None:
    """
    Raises:
        ServerLost: one that holds a part of the context's model is lost.
    """
    if context.ctx is not None and (why := library.current().lost(llama_get_model(context.ctx))) is not None:
        raise ServerLost(why)


def settled(host: _Host, context: Context, *args: object, **kwargs: object) -> Any:
    """A method that sees or changes the engine's memory, which holds the Llama's tokens and no more before it."""
    if (session := session_of(context)) is not None:
        session.settle()
    return host(context, *args, **kwargs)


def changed(host: _Host, context: Context, *args: object, **kwargs: object) -> Any:
    """A method that changes what the engine's memory holds."""
    if (session := session_of(context)) is not None:
        session.disturbed()
    return settled(host, context, *args, **kwargs)


def kv_cache_seq_rm(host: _Host, context: Context, seq_id: int, p0: int, p1: int) -> bool:
    # Rows can be taken back for our own sake. The host asks in order to keep a prompt's beginning; without a draft
    # the engine refuses that, and evaluating less than a plain run does would round otherwise than it.
    if (session := session_of(context)) is not None:
        session.settle()
    if _ROLLS_BACK in _fields(context):
        last = int(llama_memory_seq_pos_max(context.memory, max(seq_id, 0)))
        if 0 < p0 <= last:
            return False
        if session is not None and p0 <= 0:
            session.disturbed()
    return bool(host(context, seq_id, p0, p1))


def get_logits(host: _Host, context: Context) -> Any:
    session = session_of(context)
    row = -1 if session is None else session.output(-1)
    return host(context) if row == -1 else context.get_logits_ith(-1)


def get_logits_ith(host: _Host, context: Context, i: int) -> Any:
    session = session_of(context)
    row = i if session is None else session.output(i)
    return host(context, _NO_ROW if row is None else row)


def sampler_sample(host: _Host, sampler: object, ctx: Context, idx: int = -1) -> int:
    _check_servers(ctx)  # without a row the engine asserts
    session = session_of(ctx)
    if session is None:
        return int(host(sampler, ctx, idx))
    session.check_open()
    row = session.output(idx)
    if row is None:  # the engine asserts here too
        raise IndexError(f"there is no row {idx}: the last token's is 0, or -1")
    return int(host(sampler, ctx, row))


# -- modules --


def load_shared_library(host: _Host, lib_base_name: str, base_path: Path) -> Any:
    """The host's modules that load a library of their own (libggml, libmtmd) find the one that goes with our libllama.

    A folder that the app named (MTMD_CPP_LIB) comes first.
    """
    hosts, ours = Path(llama_cpp.__file__).parent / "lib", library.folder()
    folders = (ours, base_path) if base_path == hosts else (base_path, ours)
    try:
        return host(lib_base_name, folders[0])
    except FileNotFoundError:
        return host(lib_base_name, folders[1])


class _Wrap(NamedTuple):
    owner: type | ModuleType
    name: str
    ours: _Host


_Model, _Context, _Sampler = _internals.LlamaModel, _internals.LlamaContext, _internals.LlamaSampler

_TABLE = (
    _Wrap(llama_cpp.Llama, "__init__", init),
    _Wrap(llama_cpp.Llama, "__getstate__", getstate),
    _Wrap(llama_cpp.Llama, "__reduce_ex__", reduce_ex),
    _Wrap(llama_cpp.Llama, "_create_completion", completion),
    _Wrap(llama_cpp.Llama, "generate", generate),
    _Wrap(llama_cpp.Llama, "eval", evaluate),
    _Wrap(llama_cpp.Llama, "reset", reset),
    _Wrap(llama_cpp.Llama, "save_state", save_state),
    _Wrap(llama_cpp.Llama, "load_state", load_state),
    _Wrap(_Model, "__init__", model_init),
    _Wrap(_Context, "__init__", context_init),
    _Wrap(_Context, "decode", decode),
    _Wrap(_Context, "encode", encode),
    _Wrap(_Context, "kv_cache_clear", changed),
    _Wrap(_Context, "kv_cache_seq_rm", kv_cache_seq_rm),
    _Wrap(_Context, "kv_cache_seq_cp", changed),
    _Wrap(_Context, "kv_cache_seq_keep", changed),
    _Wrap(_Context, "kv_cache_seq_shift", changed),
    _Wrap(_Context, "get_state_size", settled),
    _Wrap(_Context, "get_logits", get_logits),
    _Wrap(_Context, "get_logits_ith", get_logits_ith),
    _Wrap(_Sampler, "sample", sampler_sample),
    _Wrap(_ctypes_extensions, "load_shared_library", load_shared_library),
)

# Of the host an attribute of each Llama, of ours a descriptor of the class.
_DRAFT_MODEL = "draft_model"

# What was there before, while the table is applied. Names that the owner only inherited are deleted again.
_INHERITED = object()
_originals: dict[_Wrap, Any] = {}


def apply() -> None:
    """Wrap the host. Safe to call again."""
    if _originals:
        return
    for wrap in _TABLE:
        _originals[wrap] = vars(wrap.owner).get(wrap.name, _INHERITED)
        setattr(wrap.owner, wrap.name, _bound(getattr(wrap.owner, wrap.name), wrap.ours))
    setattr(llama_cpp.Llama, _DRAFT_MODEL, DraftModel())


def undo() -> None:
    """Leave the host as it was. Llamas that draft go on without drafts."""
    if not _originals:
        return
    for wrap, original in _originals.items():
        if original is _INHERITED:
            delattr(wrap.owner, wrap.name)
        else:
            setattr(wrap.owner, wrap.name, original)
    delattr(llama_cpp.Llama, _DRAFT_MODEL)
    _originals.clear()


def _bound(original: _Host, ours: _Host) -> _Host:
    @functools.wraps(original)
    def wrapped(*args: object, **kwargs: object) -> Any:
        return ours(original, *args, **kwargs)

    return wrapped
