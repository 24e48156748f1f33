"""Speculation in one Llama: what its methods do while there is a draft.

The host's own generation loop stays, which evaluates one token, samples one, and so on; what changes is ``eval``.
Asked for one token, it evaluates the drafts that may follow in the same decode, and when the loop later asks for a
token that is already evaluated, there is nothing left to do. So samplers, grammars, logits processors, stopping
criteria, streaming and stop strings see what they see in a plain run, in the same order, and tokens that nobody has
asked for yet are never visible in the Llama's own state.
"""

from __future__ import annotations

import contextlib as _contextlib
import sys as _sys
import typing as _t
import warnings as _warnings
import weakref as _weakref

import numpy as _np

from . import engine as _engine
from .draft import MAX_PRED_TOKENS as _MAX_PRED_TOKENS
from .draft import MtpDraft as _MtpDraft
from .settings import current as _current
from .speculative import CommonSpeculative as _CommonSpeculative
from .speculative import RollbackRefused as _RollbackRefused

# The host drives one sequence.
_SEQ = 0

# On the CPU up to as many rows are computed as if each were alone (patches/ggml/src/ggml-cpu/ds4-mtp-rows.h).
_SINGLE_ROWS = _MAX_PRED_TOKENS + 1


class Session:
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
        # Larger decodes than _SINGLE_ROWS among them, (position, rows): their rows depend on how many there were.
        self._prompts: list[tuple[int, int]] = []
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
        state = host_save_state()
        state.ds4_mtp_prompts = self._prompts[:]
        return state

    def load_state(self, host_load_state: _t.Callable[..., None], state: _t.Any) -> None:
        self.settle()
        try:
            host_load_state(state)
            self._known = n_tokens = self._llama.n_tokens
            # One that a Llama without a draft saved: most likely a prompt.
            unsaid = [(0, n_tokens)] if n_tokens > _SINGLE_ROWS else []
            self._prompts = list(getattr(state, "ds4_mtp_prompts", unsaid))
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
        self._prompts = []
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
        if n_past > self._known:
            return
        self._known = n_past + n
        self._prompts = [(p, min(rows, n_past - p)) for p, rows in self._prompts if p < n_past]
        if n > _SINGLE_ROWS:
            self._prompts.append((n_past, n))

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
            if n and self._active:
                try:
                    hidden = _np.empty((n, spec.target.n_embd_out), dtype=_np.float32)
                    for j in range(n):
                        spec.target.hidden(len(chunk) - n + j, hidden[j])
                    spec.process(_SEQ, n_past, chunk, hidden)
                except Exception as err:
                    self._give_up(f"keeping hidden rows failed: {err}", reevaluate=False)

    def _reevaluate(self) -> None:
        """The engine's memory is of no use: clear it and evaluate the Llama's tokens again, as they were.

        Raises:
            RuntimeError: not all of what it held is known.
        """
        llama = self._llama
        n_tokens, known, prompts, in_loop = llama.n_tokens, self._known, self._prompts, self._in_loop
        self._forget()
        llama._ctx.kv_cache_clear()
        llama.n_tokens = 0
        if n_tokens > known:
            raise RuntimeError(
                f"MtpDraft: the engine lost its memory, and only {known} of the {n_tokens} rows that it held were "
                "evaluated through this Llama; evaluate the prompt again"
            )
        self._in_loop = False  # none of these is a token to draft behind
        try:
            starts = iter([*prompts, (n_tokens, 0)])
            start, rows = next(starts)
            while (at := llama.n_tokens) < n_tokens:
                if at == start:
                    end = start + rows
                    start, rows = next(starts)
                else:
                    end = min(at + _SINGLE_ROWS, start)
                llama.eval(llama.input_ids[at:end].tolist())
        except BaseException:
            llama.n_tokens = self._known = n_tokens  # the tokens are there still; the next call tries again
            self._prompts = prompts
            self._uncertain = True
            raise
        finally:
            self._in_loop = in_loop

    def _give_up(self, why: str, *, reevaluate: bool) -> None:
        """Decode plainly for the rest of this generation. The app is told once, and last: a warning may be raised."""
        self._active = False
        self._spec.counters.failures += 1
        if reevaluate:
            self._reevaluate()
        if not self._warned:
            self._warned = True
            _warnings.warn(f"MtpDraft: decoding plainly: {why}", RuntimeWarning, stacklevel=2)
