"""Speculation in one Llama: the host's ``eval`` as a cycle.

The host's own generation loop stays, which evaluates one token, samples one, and so on. Asked for one token, ``eval``
evaluates the drafts that may follow in the same decode, and when the loop later asks for a token that is already
evaluated, there is nothing left to do but to point at the next row. So samplers, grammars, logits processors, stopping
criteria, streaming and stop strings see what they see in a plain run, in the same order, and the Llama never shows a
token that nobody has asked for.
"""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar

import numpy as np

from ..draft import MAX_PRED_TOKENS, Draft, attach, detach
from ..engine import HIDDEN_ALL, HIDDEN_OFF, HIDDEN_OUTPUTS, EngineError
from ..settings import current
from ..speculation import N_KEEP, AdaptiveDepth, CommonSpeculative, FixedDepth, Verify
from .checkpoints import Checkpoints
from .contract import Llama, State
from .generation import Generation
from .ledger import Ledger

__all__ = ["SINGLE_ROWS", "Session"]

# On the CPU up to as many rows are computed as if each were alone (patches/ggml/src/ggml-cpu/ds4-mtp-rows.h).
SINGLE_ROWS = MAX_PRED_TOKENS + 1

# The host drives one sequence.
_SEQ = 0

# What speculation may fail at and go on plainly. Anything else that passes through here is the app's: the exception of
# a signal handler, of another thread, of an aborted decode.
_FAILURES = (EngineError, MemoryError)

# First drafts in a row that were wrong, at which the app is told.
_MISFIT = 100

_T = TypeVar("_T")


class Session:
    """Speculation in one Llama.

    At any time the engine's memory holds the Llama's tokens and, behind them, the rows of an open verify: then
    ``llama.n_tokens == verify.n_committed``. An exception from outside may break that at any line; the ledger is then
    not sure, and the next call evaluates the Llama's tokens again.
    """

    def __init__(
        self,
        llama: Llama,
        draft: Draft,
        spec: CommonSpeculative,
        *,
        depth: AdaptiveDepth | None = None,
        checkpoints: Checkpoints | None = None,
        inexact: bool = False,
        single_rows: int = SINGLE_ROWS,
    ) -> None:
        """
        Args:
            depth: chooses the number of drafts of each cycle; None for always as many as there is room for.
            checkpoints: keeps those of prompts; None for none.
            inexact: also where a text that goes on behind one may round otherwise than one from its beginning.
            single_rows: rows that the engine computes as if each were alone, wherever they lie.
        """
        # The Llama holds its session: a strong reference back would keep a dropped Llama's memory until a collection.
        self._llama = weakref.ref(llama)
        self._draft = draft
        self._name = type(draft).__name__
        self._spec = spec
        self._depth = depth or FixedDepth(spec.counters.depth, text=spec.n_draft > 0)
        # The position that a draft which was not verified is for, and that draft.
        self._unverified: tuple[int, int] | None = None
        self._ledger = Ledger(single_rows)
        self._checkpoints = Checkpoints(0) if checkpoints is None else checkpoints
        self._inexact = inexact
        # The last position in memory where that still holds the text before a reset, for a checkpoint of it may be gone
        # back to; whoever else looks at memory finds it cleared.
        self._left: int | None = None
        # The verify of the target's last decode; None where that was no verify.
        self._verify: Verify | None = None
        # Tokens that the app wants of the generation that its completion is about to begin.
        self._wanted: int | None = None
        # The generation whose loop is running, as opposed to the app, which may evaluate between two tokens.
        self._running: Generation | None = None
        # The one that ran last, until it ends. Another one that is dropped meanwhile, perhaps by another thread, has no
        # say.
        self._last: Generation | None = None
        # Tokens that were evaluated one by one, of which speculation was not told yet: where they begin, how many they
        # are. And how many are still to come before it looks at any, how many of them came, and seconds of the first.
        self._kept_at = self._kept = self._rest = self._rested = 0
        self._each = 0.0
        self._warned = False
        self._closed = False
        attach(draft, spec)

    # -- the Llama's methods, each over the host's own --

    def completion(self, host_completion: Iterator[_T], wanted: int | None) -> Iterator[_T]:
        """Only a completion says how many tokens are wanted: no draft goes beyond them."""
        self._wanted = wanted
        try:
            first = next(host_completion, None)  # in which the generation begins
        finally:
            self._wanted = None
        if first is not None:
            yield first
            yield from host_completion

    def generate(
        self, llama: Llama, host_tokens: Generator[int, Sequence[int] | None, None]
    ) -> Generator[int, Sequence[int] | None, None]:
        self._look(llama)
        self.settle(clear=False)
        generation = Generation(self._wanted, drafting=self.drafts_with(llama.draft_model))
        self._wanted = None
        sent: Sequence[int] | None = None
        try:
            while True:
                self._last = self._running = generation
                try:
                    token = host_tokens.send(sent)
                except StopIteration:
                    return
                finally:
                    self._running = None
                generation.chosen()
                self._count(llama, token)
                sent = yield token
        finally:
            host_tokens.close()
            if self._last is generation:
                self._last = None
                # A collection amid a change may be what drops the generation; what is under way settles it too. An
                # exception from outside may leave the mark behind: then the next call settles.
                if not self._ledger.under_way:
                    self.settle()

    def eval(self, llama: Llama, host_eval: Callable[[Sequence[int]], None], tokens: Sequence[int]) -> None:
        self.check_open()
        rests = self._rest > 0 and len(tokens) == 1 and self._running is not None and self._ledger.sure
        if rests and llama.n_tokens == self._kept_at + self._kept:
            self._rest -= 1
            t0 = self._clock() if self._rested == 0 else None
            self._eval_one(llama, host_eval, tokens, llama.n_tokens - 1)
            if t0 is not None:
                self._spec.target.wait()
                self._each = self._clock() - t0
            self._rested += 1
            return
        if self._kept > 0:
            self._look(llama)
        t0, generation = self._clock(), self._running
        token = tokens[0] if generation is not None and len(tokens) == 1 else None
        # What is no token of the vocabulary is the host's to refuse.
        if (
            generation is not None
            and isinstance(token, (int, np.integer))
            and 0 <= int(token) < self._spec.target.n_vocab
        ):
            if self._advance(llama, int(token)):
                return
            as_usual = self._ledger.sure and self._left is None
            self.settle()
            if not as_usual:  # that cleared memory, or evaluated it again
                t0 = self._clock()
            if generation.drafting and self._speculate(llama, int(token), generation, t0):
                return
            self.settle()  # what a verify that failed has left is not known
            if generation.drafting and self.drafts_with(llama.draft_model):
                self._checkpoints.cut(llama.n_tokens)
                self._spec.keep_hidden(HIDDEN_OUTPUTS)
                t0 = self._clock()  # less the time of choosing, most of which rests spare where nothing is drafted
                self._eval_one(llama, host_eval, tokens, self._spec.target.seq_pos_max(_SEQ))
                self._spec.target.wait()
                self._depth.decoded(1, self._clock() - t0)
                self._rest = min(self._depth.rest, N_KEEP - self._kept) if self._kept > 0 else 0
            else:
                self._spec.counters.plain += 1
                self._eval_chunk(llama, host_eval, tokens, keep=0)
            return
        tokens = self._resume(llama, tokens)
        self.settle()
        # Without tokens the prompt is there to its last one, whose row of logits stays the one it is.
        for i in range(0, len(tokens), llama.n_batch):
            chunk = tokens[i : i + llama.n_batch]
            keep = len(chunk) - max(0, len(tokens) - self._spec.drafter.window - i)
            self._eval_chunk(llama, host_eval, chunk, max(0, keep))
            self._spec.counters.evaluated += len(chunk)
            self._take_checkpoint(llama, last=i + len(chunk) == len(tokens))

    def reset(self, llama: Llama, host_reset: Callable[[], None]) -> None:
        if not self._ledger.sure or self._ledger.known != llama.n_tokens:
            self.disturbed()
        if self._left is None and not len(self._checkpoints):
            try:
                host_reset()
            except BaseException:
                self._ledger.sure = False
                raise
            self._forget()
            return
        with self._ledger.changing():
            if self._left is None:
                is_open = self._verify is not None and self._verify.open
                self._left = (self._verify.end if self._verify is not None and is_open else llama.n_tokens) - 1
            # The host's, less the clearing of memory.
            llama.n_tokens, llama._requires_eval = 0, True
            self._forget()

    def save_state(self, host_save_state: Callable[[], State]) -> State:
        self.settle()
        state = host_save_state()
        state.ds4_mtp_batches, state.ds4_mtp_known = self._ledger.save(), self._ledger.known
        return state

    def load_state(self, llama: Llama, host_load_state: Callable[[State], None], state: State) -> None:
        self.settle()
        self.disturbed()
        before = llama.input_ids
        try:
            host_load_state(state)
        except BaseException:
            self._ledger.sure = self._ledger.sure and llama.input_ids is before
            raise
        finally:
            if llama.input_ids is not before:
                saved = (getattr(state, name, None) for name in ("ds4_mtp_batches", "ds4_mtp_known"))
                self._ledger.load(llama.n_tokens, *saved)
            # Hidden rows are no part of a state: cold until a token is evaluated.
            self._kept = self._rest = self._rested = 0
            self._spec.begin(_SEQ)
            self._spec.process(_SEQ, 0, llama.input_ids[: llama.n_tokens].tolist(), self._spec.target.hidden_rows(0, 0))

    # -- for the Llama's context --

    def settle(self, *, clear: bool = True) -> None:
        """Take rows that nobody asked for out of the engine's memory: it then holds the Llama's tokens, no more.

        Args:
            clear: also what a reset has left there.
        """
        llama = self._llama()
        if llama is None or self._closed or llama._ctx.ctx is None:
            return  # under a generation that is only now dropped
        if clear and self._left is not None:
            self.disturbed()
            self._spec.target.clear()
            self._left = None
        try:
            if self._ledger.sure and self._verify is not None and self._verify.open:
                with self._ledger.changing():
                    self._spec.accept(self._verify)
        except _FAILURES as err:
            self._give_up(str(err))
        if not self._ledger.sure:
            self._reevaluate(llama)

    def overtake(self) -> None:
        """Somebody decodes on the Llama's context: that finds the Llama's tokens in memory, and gives other rows."""
        self.settle()
        self._verify = None

    def disturbed(self) -> None:
        """Somebody changes rows that are in memory: what was kept to go back to them is void."""
        self._checkpoints.cut(0)

    def output(self, i: int) -> int | None:
        """The row of the last decode that an app means by `i`; None where a plain decode had no such row.

        To the app a verify was the decode of one token, whose row is 0 and, from the end, -1.
        """
        if self._verify is None:
            return i
        return self._verify.row if i in (0, -1) else None

    def drafts_with(self, draft: object) -> bool:
        """Whether `draft` is the one of this session; an app may take it off its Llama, and put it back."""
        return draft is self._draft

    def choose_by(self, depth: AdaptiveDepth) -> None:
        """From the next cycle on `depth` chooses how many tokens are drafted."""
        self._rest = self._rested = 0
        self._depth = depth

    def check_open(self) -> None:
        """
        Raises:
            RuntimeError: the Llama is closed; asking the engine would crash.
        """
        llama = self._llama()
        if llama is None or self._closed or llama._ctx.ctx is None:
            raise RuntimeError("the Llama is closed")

    def close(self) -> None:
        """Free the head. The Llama is being closed, or is about to load another model."""
        self._closed = True
        detach(self._draft, self._spec)

    # -- inside --

    def _count(self, llama: Llama, token: int) -> None:
        """The host's sampler chose `token`: count the draft for it if there was one."""
        verify, unverified, self._unverified = self._verify, self._unverified, None
        if verify is None or verify.expected is None:
            if unverified is not None and unverified[0] == llama.n_tokens:
                right = unverified[1] == token
                self._observe(0, right)
                if right:
                    self._rest = 0  # the next token is looked at
            return
        if not verify.ready:  # who drafts from the text keeps an account of its own
            self._observe(verify.row, verify.expected == token)
        if verify.expected == token:
            self._spec.counters.accepted(verify.row, ready=verify.ready)
        elif current().log:
            print(
                f"ds4_mtp_plugin: mtp miss: position={llama.n_tokens} depth={verify.row + 1} "
                f"drafted={verify.expected} sampled={token}",
                file=sys.stderr,
            )

    def _observe(self, position: int, right: bool) -> None:
        self._depth.outcome(position, right)
        if self._depth.misses == _MISFIT:
            warnings.warn(
                f"{self._draft!r}: {_MISFIT} first drafts in a row were wrong, so it gains nothing. Is it the head of "
                "this very model (ds4-mtp doctor compares the files), and not one of too few bits?",
                RuntimeWarning,
                stacklevel=2,
            )

    def _clock(self) -> float:
        """Seconds, less those that making drafts takes."""
        return time.perf_counter() - self._spec.counters.draft_s

    def _forget(self) -> None:
        self._verify = None
        self._ledger.forget()
        self._spec.begin(_SEQ)

    def _advance(self, llama: Llama, token: int) -> bool:
        """The loop asks for `token`: is it the draft in the row behind the last one?"""
        verify = self._verify
        if verify is None or verify.expected != token:
            return False
        if not self._ledger.sure or llama.n_tokens != verify.n_committed:
            return False
        with self._ledger.changing():
            verify.advance(token)
            self._commit(llama, token, verify)
        return True

    def _speculate(self, llama: Llama, token: int, generation: Generation, t0: float) -> bool:
        """Evaluate `token` together with what may follow it; False where it is to be evaluated alone.

        Args:
            t0: when the host asked for it (`_clock`).
        """
        n_past = llama.n_tokens
        if self._spec.target.seq_pos_max(_SEQ) != n_past - 1:
            return False  # the app changed one of them: what a plain run makes of that is the host's affair
        depth, room = self._depth, generation.room(n_past, len(llama.input_ids))
        n_max = depth.choose(room)
        ready = self._spec.ready(_SEQ, n_past, token, room)
        n_ready = depth.take(ready.rates)
        drafts = list(ready.tokens[:n_ready])
        if n_ready == 0:
            n_max = n_max or int(depth.probing)
            if n_max == 0:
                return False
            drafting = time.perf_counter()
            try:
                drafts = self._spec.draft(_SEQ, n_past, token, n_max, depth.more)
            except _FAILURES as err:
                self._spec.target.check_servers()
                self._give_up(f"drafting failed: {err}")
                return False
            if not drafts:
                return False
            depth.drafted(len(drafts), time.perf_counter() - drafting)
            n_worth = depth.worth(len(drafts))
            if n_worth == 0:
                self._unverified = n_past + 1, drafts[0]
                return False
            del drafts[n_worth:]
        try:
            with self._ledger.changing():
                self._verify = self._spec.verify(_SEQ, n_past, token, drafts, ready=n_ready > 0)
                self._commit(llama, token, self._verify)
        except _FAILURES as err:
            self._spec.target.check_servers()  # without the model there is no plain decoding either
            self._give_up(f"verifying failed: {err}")
            return False
        depth.decoded(len(drafts) + 1, self._clock() - t0)
        return True

    def _commit(self, llama: Llama, token: int, verify: Verify) -> None:
        """What the host's eval does after a decode, for the verify's last committed row."""
        n_past = llama.n_tokens
        llama.input_ids[n_past] = token
        if llama._logits_all:
            llama.scores[n_past, :] = self._spec.target.logits(verify.row)
        self._ledger.evaluated(n_past, 1)  # before the Llama counts the token: more may be known than it has, not less
        llama.n_tokens = n_past + 1
        llama._requires_eval = False

    def _eval_chunk(
        self, llama: Llama, host_eval: Callable[[Sequence[int]], None], chunk: Sequence[int], keep: int
    ) -> None:
        """The host's eval of one of its batches. Hidden rows of the last `keep` tokens are kept, while they live."""
        target, ledger, n_past = self._spec.target, self._ledger, llama.n_tokens
        drafting = self.drafts_with(llama.draft_model) and (self._last is None or self._last.drafting)
        keep = min(keep, self._spec.drafter.window) if drafting else 0
        self._spec.keep_hidden(HIDDEN_OFF if keep == 0 else HIDDEN_OUTPUTS if len(chunk) == 1 else HIDDEN_ALL)
        before = target.seq_pos_max(_SEQ)
        self._checkpoints.cut(n_past)
        try:
            host_eval(chunk)
            ledger.evaluated(n_past, len(chunk))
        except BaseException:
            self._failed(llama, n_past, len(chunk), before)
            raise
        if drafting:
            try:
                self._spec.process(_SEQ, n_past, chunk, target.hidden_rows(len(chunk) - keep, keep))
            except _FAILURES as err:
                self._give_up(f"keeping hidden rows failed: {err}")

    def _failed(self, llama: Llama, n_past: int, n: int, before: int) -> None:
        """Evaluating n tokens at n_past failed; `before` was the last position in memory.

        A decode that fails may take more with it than its own rows; one that is interrupted may leave rows that the
        host, which counts last, does not count.
        """
        self.disturbed()
        if llama.n_tokens > n_past:
            self._ledger.evaluated(n_past, n)
            before = llama.n_tokens - 1
        self._ledger.sure = self._spec.target.seq_pos_max(_SEQ) == before

    def _eval_one(
        self, llama: Llama, host_eval: Callable[[Sequence[int]], None], tokens: Sequence[int], before: int
    ) -> None:
        """The host's eval of one token of its loop. Speculation is told of it when it looks next.

        Args:
            before: the last position in memory.
        """
        n_past = llama.n_tokens
        self._spec.counters.plain += 1
        try:
            host_eval(tokens)
            self._ledger.evaluated(n_past, 1)
        except BaseException:
            self._failed(llama, n_past, 1, before)
            raise
        if self._kept == 0:
            self._kept_at = n_past
        try:
            self._spec.keep(_SEQ, self._kept)
            self._kept += 1
        except _FAILURES as err:
            self._give_up(f"keeping hidden rows failed: {err}")

    def _look(self, llama: Llama) -> None:
        """Tell speculation of the tokens that came since it looked."""
        self._rest = 0
        if self._rested > 0:
            self._depth.rested(self._rested, self._each)
            self._rested = 0
        if self._kept > 0:
            first, end = self._kept_at, self._kept_at + self._kept
            self._kept = 0
            try:
                self._spec.process_kept(_SEQ, first, llama.input_ids[first:end].tolist())
            except _FAILURES as err:
                self._give_up(f"keeping hidden rows failed: {err}")

    def _resume(self, llama: Llama, tokens: Sequence[int]) -> Sequence[int]:
        """A text begins: go back to the last checkpoint that it goes on behind. What of it is left to evaluate.

        Where that cannot be, memory is cleared as it is settled next.
        """
        if self._left is None or llama.n_tokens > 0 or self._spec.target.seq_pos_max(_SEQ) != self._left:
            return tokens
        found = self._checkpoints.find(tokens)
        if found is None:
            return tokens
        n = found.n
        with self._ledger.changing():
            self._checkpoints.cut(n)
            if not self._spec.target.load_partial(_SEQ, found.data, n):
                return tokens
            llama.input_ids[:n] = tokens[:n]
            self._ledger.load(n, found.batches)
            llama.n_tokens = n
            self._spec.process(_SEQ, 0, tokens[:n], self._spec.target.hidden_rows(0, 0))
            self._left = None
        self._spec.counters.resumed += n
        self._spec.counters.exact &= found.exact
        return tokens[n:]

    def _take_checkpoint(self, llama: Llama, *, last: bool) -> None:
        """Behind a batch of a prompt: where evaluating a longer one from its beginning would cut it too, and at its end
        where that need not be."""
        n_batch, n_tokens, batches = llama.n_batch, llama.n_tokens, self._ledger.save()
        if not self._checkpoints.max_bytes or not self.drafts_with(llama.draft_model):
            return
        exact = batches == [(p, n_batch) for p in range(0, n_tokens, n_batch)]
        if not exact and not (self._inexact and last):
            return
        try:
            state = self._spec.target.save_partial(_SEQ)
            self._checkpoints.add(llama.input_ids[:n_tokens], state, batches, exact=exact)
        except _FAILURES:
            self.disturbed()

    def _reevaluate(self, llama: Llama) -> None:
        """What the engine's memory holds is not known: clear it and evaluate the Llama's tokens again, as they were.

        Raises:
            RuntimeError: not all of what it held is known.
        """
        ledger, n_tokens = self._ledger, llama.n_tokens
        if n_tokens < ledger.known:
            ledger.evaluated(n_tokens, 0)  # the app has cut its text
        known, large, batches = ledger.known, ledger.save(), list(ledger.batches())
        try:
            self._forget()
            self._spec.target.clear()
            llama.n_tokens = 0
            if n_tokens > known:
                raise RuntimeError(
                    f"{self._name}: the engine lost its memory, and only {known} of the {n_tokens} rows that it held "
                    "were evaluated through this Llama; evaluate the prompt again"
                )
            for first, end in batches:
                llama.eval(llama.input_ids[first:end].tolist())
        except BaseException:
            if n_tokens <= known:  # the tokens are there still; the next call tries again
                llama.n_tokens = n_tokens
                ledger.load(n_tokens, large)
                ledger.sure = False
            raise

    def _give_up(self, why: str) -> None:
        """Decode plainly for the rest of this generation. The app is told once, and last: a warning may be raised."""
        if self._last is not None:
            self._last.drafting = False
        self._spec.counters.failures += 1
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self._name}: decoding plainly: {why}", RuntimeWarning, stacklevel=2)
