"""The seam to llama-cpp-python: the only file that knows its internals (of version 0.3.36).

``adopt`` wraps a few methods of ``llama_cpp.Llama``. A Llama that was given no MtpDraft runs the host's code as it is.
One that was keeps the host's own generation loop too, which evaluates one token, samples one, and so on; what changes
is its ``eval``. Asked for one token, it evaluates the drafts that may follow in the same decode, and when the loop
later asks for a token that is already evaluated, there is nothing left to do. So samplers, grammars, logits processors,
stopping criteria, streaming and stop strings see what they see in a plain run, in the same order, and tokens that
nobody has asked for yet are never visible in the Llama's own state.
"""

from __future__ import annotations

import contextlib as _contextlib
import contextvars as _contextvars
import copy as _copy
import ctypes as _ctypes
import functools as _functools
import os as _os
import pathlib as _pathlib
import sys as _sys
import typing as _t
import warnings as _warnings
import weakref as _weakref

import llama_cpp as _llama_cpp
import llama_cpp._ctypes_extensions as _ctypes_extensions
import llama_cpp._internals as _internals
import numpy as _np

from . import engine as _engine
from .draft import MAX_PRED_TOKENS as _MAX_PRED_TOKENS
from .draft import MtpDraft as _MtpDraft
from .gguf_file import check_pair as _check_pair
from .mtp import MtpDrafter as _MtpDrafter
from .settings import current as _current
from .speculative import CommonSpeculative as _CommonSpeculative
from .speculative import RollbackRefused as _RollbackRefused

# The host drives one sequence.
_SEQ = 0

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
            raise ValueError(f"{draft.model_path} does not belong to {llama.model_path} as the engine loaded it")
        draft._attach(_CommonSpeculative(target, drafter, n_draft=depth))
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


class _Session:
    """Speculation in one Llama. Its public methods stand for the Llama's own of the same name; each gets the host's
    bound method as first argument."""

    def __init__(self, llama: _t.Any, draft: _MtpDraft) -> None:
        assert draft._spec is not None
        # The Llama holds its session: a strong reference back would keep a dropped Llama's memory until a collection.
        self._llama: _t.Any = _weakref.proxy(llama)
        self._draft = draft
        self._spec: _CommonSpeculative = draft._spec
        self._active = True
        self._warned = False
        # Of the last decode, the output row that is the Llama's last token, and how many there are; None while
        # that is the last one, as the host assumes.
        self.row: tuple[int, int] | None = None
        # Positions 0 <= p < known hold input_ids[p]; behind them an app may have decoded what that does not hold.
        self._known = 0
        # Tokens that the app wants of the generation that begins next, and still wants of the one that runs; None
        # where nobody has said.
        self._wanted: int | None = None
        self._remaining: int | None = None
        # The host's generator of the generation that ran last. Another one that is dropped meanwhile, perhaps by
        # another thread, has no say.
        self._generation: object = None
        # The host's generation loop is running, as opposed to the app, which may evaluate between two tokens.
        self._in_loop = False
        # Drafts of the verify whose rows the loop is asking for, None when all rows in memory are the Llama's own.
        self._drafts: list[int] | None = None
        # A step that changes both the engine's memory and our account of it was begun and not ended (an interrupt):
        # what the memory holds is not known.
        self._uncertain = False

    # -- the Llama's methods --

    def _create_completion(
        self, host_create_completion: _t.Callable[..., _t.Iterator[_t.Any]], *args: _t.Any, **kwargs: _t.Any
    ) -> _t.Iterator[_t.Any]:
        # Only here does the host say how many tokens are wanted: no draft goes beyond them.
        max_tokens = kwargs.get("max_tokens")
        self._wanted = max_tokens if max_tokens is not None and max_tokens > 0 else None
        try:
            yield from host_create_completion(*args, **kwargs)
        finally:
            self._wanted = None  # it may have ended before it generated anything

    def generate(
        self, host_generate: _t.Callable[..., _t.Any], *args: _t.Any, **kwargs: _t.Any
    ) -> _t.Generator[int, _t.Sequence[int] | None, None]:
        self.settle()
        self._active = self._llama.draft_model is self._draft  # an app may take the draft away, and put it back
        self._remaining, self._wanted = self._wanted, None
        tokens = host_generate(*args, **kwargs)
        sent: _t.Sequence[int] | None = None
        try:
            while True:
                self._generation = tokens
                with self._loop():
                    try:
                        token = tokens.send(sent)
                    except StopIteration:
                        return
                self._chosen(token)
                sent = yield token
        finally:
            tokens.close()
            if self._generation is tokens:
                self.settle()
                self._active = True

    def eval(self, host_eval: _t.Callable[..., None], tokens: _t.Sequence[int]) -> None:
        if self._closed():
            raise RuntimeError("the Llama is closed")  # the engine would not survive being asked
        if self._in_loop and len(tokens) == 1:
            token = int(tokens[0])
            if self._advance(token):
                return
            self.settle()
            if self._active and self._speculate(token):
                return
            self._spec.counters.plain += 1
        else:
            self.settle()
        if len(tokens):
            self._eval_plain(host_eval, tokens)
        # Nothing to evaluate: a prompt that is there to its last token, whose row of logits stays the one it is.

    def sample(self, host_sample: _t.Callable[..., int], *args: _t.Any, **kwargs: _t.Any) -> int:
        if self._closed():
            raise RuntimeError("the Llama is closed")
        n_tokens = self._llama.n_tokens
        if self.row is not None and kwargs.get("idx") in (None, n_tokens - 1):
            row, n_rows = self.row
            kwargs["idx"] = n_tokens + row - n_rows
        return host_sample(*args, **kwargs)

    def reset(self, host_reset: _t.Callable[[], None]) -> None:
        self._forget()
        host_reset()

    def save_state(self, host_save_state: _t.Callable[[], _t.Any]) -> _t.Any:
        self.settle()
        return host_save_state()

    def load_state(self, host_load_state: _t.Callable[..., None], state: _t.Any) -> None:
        self.settle()
        try:
            host_load_state(state)
            self._known = self._llama.n_tokens
        finally:
            self._spec.begin(_SEQ)  # hidden rows are no part of a state: cold until a token is evaluated

    # -- inside --

    @_contextlib.contextmanager
    def _loop(self) -> _t.Iterator[None]:
        # Inside its loop the host would ask a draft_model for tokens and write them behind the last of its own.
        draft_model, self._llama.draft_model = self._llama.draft_model, None
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop, self._llama.draft_model = False, draft_model

    def _chosen(self, token: int) -> None:
        """The host's sampler chose `token`: count it, and the draft for it if there was one."""
        if self._remaining is not None:
            self._remaining -= 1
        if self._drafts is None:
            return
        assert self.row is not None
        row = self.row[0]
        if row >= len(self._drafts):
            return
        if self._drafts[row] == token:
            self._spec.counters.accepted(row)
        elif _current().log:
            print(
                f"ds4_mtp_plugin: mtp miss: position={self._llama.n_tokens} depth={row + 1} "
                f"drafted={self._drafts[row]} sampled={token}",
                file=_sys.stderr,
            )

    def settle(self) -> None:
        """Take rows that nobody asked for out of the engine's memory: it then holds the Llama's tokens, no more."""
        if self._closed():
            return  # under a generation that is only now dropped
        if self._uncertain:
            self._reevaluate()
        if self._drafts is None:
            return
        self._drafts, self._uncertain = None, True
        assert self.row is not None
        try:
            self._spec.accept(_SEQ, self.row[0])
        except _RollbackRefused as err:
            self._give_up(str(err), reevaluate=True)
        self._uncertain = False

    def overtake(self) -> None:
        """Somebody decodes on the Llama's context: that finds the Llama's tokens in memory, and gives other rows."""
        self.settle()
        self.row = None

    def close(self) -> None:
        """Free the head; the Llama is about to load another model."""
        self._draft._detach()

    def _closed(self) -> bool:
        return self._draft._spec is not self._spec or self._llama._ctx.ctx is None

    def _forget(self) -> None:
        self._drafts = self.row = None
        self._uncertain = False
        self._known = 0
        self._spec.begin(_SEQ)

    def _advance(self, token: int) -> bool:
        """The loop asks for `token`: is it the draft in the row behind the last one?"""
        if self._drafts is None:
            return False
        assert self.row is not None
        row, n_rows = self.row
        if row >= len(self._drafts) or self._drafts[row] != token or self._llama.n_tokens != self._known:
            return False
        self._commit(token, row + 1, n_rows)
        return True

    def _speculate(self, token: int) -> bool:
        """Evaluate `token` together with what may follow it; False where it is to be evaluated alone."""
        llama = self._llama
        n_past = llama.n_tokens
        if self._spec.target.seq_pos_max(_SEQ) != n_past - 1:
            return False  # the app changed one of them: what a plain run makes of that is the host's affair
        room = len(llama.input_ids) - 1 - n_past
        if self._remaining is not None:
            room = min(room, self._remaining - 1)
        try:
            drafts = self._spec.draft(_SEQ, n_past, token, room)
        except Exception as err:
            self._give_up(f"drafting failed: {err}", reevaluate=False)
            return False
        if not drafts:
            return False
        self._uncertain = True
        try:
            self._spec.verify(_SEQ, n_past, token, drafts)
        except Exception as err:
            # A decode that failed may have used up a pending rollback: nothing in memory can be relied on.
            self._give_up(f"verifying failed: {err}", reevaluate=True)
            return False
        self._drafts = drafts
        self._commit(token, 0, len(drafts) + 1)
        return True

    def _commit(self, token: int, row: int, n_rows: int) -> None:
        """What the host's eval does after a decode, for one row."""
        llama = self._llama
        n_past = llama.n_tokens
        self._uncertain = True
        self.row = (row, n_rows)
        llama.input_ids[n_past] = token
        if llama._logits_all:
            llama.scores[n_past, :] = self._spec.target.logits(row)
        llama.n_tokens = n_past + 1
        llama._requires_eval = False
        self._note(n_past, 1)
        self._uncertain = False

    def _note(self, n_past: int, n: int) -> None:
        """The Llama evaluated n tokens at n_past."""
        if n_past <= self._known:
            self._known = n_past + n

    def _eval_plain(self, host_eval: _t.Callable[..., None], tokens: _t.Sequence[int]) -> None:
        """The host's eval, chunk by chunk as it would cut them, keeping hidden rows of the last window.

        Hidden rows live until the next decode, so each chunk's are taken before the next chunk.
        """
        llama, spec = self._llama, self._spec
        self.row = None
        for i in range(0, len(tokens), llama.n_batch):
            chunk = tokens[i : i + llama.n_batch]
            n_past = llama.n_tokens
            n = max(0, len(chunk) - max(0, len(tokens) - spec.drafter.window - i)) if self._active else 0
            spec.target.set_hidden(
                _engine.HIDDEN_OFF if n == 0 else _engine.HIDDEN_OUTPUTS if len(chunk) == 1 else _engine.HIDDEN_ALL
            )
            before = spec.target.seq_pos_max(_SEQ)
            try:
                host_eval(chunk)
            except BaseException:
                # A decode that fails may take more with it than its own rows; one that is interrupted may leave rows
                # that the host does not count.
                self._uncertain = spec.target.seq_pos_max(_SEQ) not in (before, llama.n_tokens - 1)
                raise
            self._note(n_past, len(chunk))
            if n:
                hidden = _np.empty((n, spec.target.n_embd_out), dtype=_np.float32)
                for j in range(n):
                    spec.target.hidden(len(chunk) - n + j, hidden[j])
                spec.process(_SEQ, n_past, chunk, hidden)

    def _reevaluate(self) -> None:
        """The engine's memory is of no use: clear it and evaluate the Llama's tokens again.

        Raises:
            RuntimeError: not all of what it held is known.
        """
        llama = self._llama
        n_tokens, known = llama.n_tokens, self._known
        self._forget()
        llama._ctx.kv_cache_clear()
        llama.n_tokens = 0
        if n_tokens > known:
            raise RuntimeError(
                f"MtpDraft: the engine lost its memory, and only {known} of the {n_tokens} rows that it held were "
                "evaluated through this Llama; evaluate the prompt again"
            )
        try:
            if n_tokens:
                llama.eval(llama.input_ids[:n_tokens].tolist())
        except BaseException:
            llama.n_tokens = self._known = n_tokens  # the tokens are there still; the next call tries again
            self._uncertain = True
            raise

    def _give_up(self, why: str, *, reevaluate: bool) -> None:
        """Decode plainly for the rest of this generation. The app is told once, and last: a warning may be raised."""
        self._active = False
        if reevaluate:
            self._reevaluate()
        if not self._warned:
            self._warned = True
            _warnings.warn(f"MtpDraft: decoding plainly: {why}", RuntimeWarning, stacklevel=2)
