"""One generation: loaded, streamed, timed, and freed again."""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jinja2
import llama_cpp
from llama_cpp import Llama

from .. import rpc
from ..draft import Draft
from ..stats import MtpStats
from . import arguments

__all__ = ["Generation", "generate", "length", "load", "progress", "tokenize"]


@dataclass(frozen=True)
class Generation:
    """What one generation gave and took.

    Attributes:
        tokens: with the token that ends a text, where one came.
        prompt_seconds: time up to the first token.
        seconds: time from the first token on.
        text: what the tokens say.
        prompt: the tokens before them.
        ended: an end-of-text token came, as opposed to the number of tokens or the context.
        threads: of a single row.
        threads_by_default: the host chose their number.
        stats: what speculation did, None of a plain generation.
    """

    tokens: list[int]
    prompt_seconds: float
    seconds: float
    stats: MtpStats | None = None
    text: str = ""
    prompt: list[int] = field(default_factory=list)
    ended: bool = False
    threads: int = 1
    threads_by_default: bool = False

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per token after the first, which the evaluation of the prompt gives."""
        return 1000 * self.seconds / max(1, len(self.tokens) - 1)


@contextlib.contextmanager
def load(model_path: str, draft: Draft | None, args: argparse.Namespace) -> Iterator[Llama]:
    """A Llama that is closed again."""
    if servers := getattr(args, "rpc", []):
        with progress(f"looking for {', '.join(servers)}"):
            rpc.add_servers(servers)
    with progress(f"loading {model_path}"):
        llm = Llama(
            model_path,
            draft_model=draft,
            n_ctx=args.ctx_size,
            n_gpu_layers=arguments.n_gpu_layers(args),
            n_threads=args.threads,
            n_threads_batch=args.threads,
            verbose=False,
        )
    try:
        yield llm
    finally:
        llm.close()


def generate(
    model_path: str, draft: Draft | None, prompt: str, args: argparse.Namespace, *, seed: int = 1, warm_up: bool = False
) -> Generation:
    """Load, generate, stream to stdout unless ``args.json``, and free everything again.

    Args:
        warm_up: generate once before, unseen, so that graphs are built and times are known.

    Raises:
        ValueError: the prompt fills the context, or there is no template for ``args.chat``.
    """
    with load(model_path, draft, args) as llm:
        prompt_tokens = tokenize(llm, prompt, args)
        n = length(llm, prompt_tokens, args)
        if warm_up:
            llm.set_seed(seed)
            collections.deque(itertools.islice(llm.generate(prompt_tokens, **arguments.sampling(args)), n), maxlen=0)
            llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
        before = None if draft is None else draft.stats
        llm.set_seed(seed)
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokens: list[int] = []
        text, ended = "", False

        def say(data: bytes, *, final: bool = False) -> str:
            new = decoder.decode(data, final)
            if not args.json:
                sys.stdout.write(new)
                sys.stdout.flush()
            return new

        start = first = time.perf_counter()
        stream = llm.generate(prompt_tokens, **arguments.sampling(args))
        for token in stream:
            if not tokens:
                first = time.perf_counter()
            tokens.append(token)
            ended = llama_cpp.llama_vocab_is_eog(vocab, token)
            if ended:
                break
            text += say(llm.detokenize([token], prev_tokens=prompt_tokens + tokens[:-1]))
            if len(tokens) == n:
                break
        end = time.perf_counter()
        stream.close()
        text += say(b"", final=True)
        if not args.json:
            print(flush=True)
        stats = None if draft is None or before is None else draft.stats.since(before)
        return Generation(
            tokens,
            first - start,
            end - first,
            stats,
            text,
            prompt_tokens,
            ended,
            threads=llm.n_threads,
            threads_by_default=args.threads is None,
        )


def length(llm: Llama, prompt: list[int], args: argparse.Namespace) -> int:
    """How many tokens to generate: as many as were asked for and the context holds."""
    room = len(llm.input_ids) - len(prompt)
    return min(args.n_predict, room) if args.n_predict > 0 else room


def tokenize(llm: Llama, prompt: str, args: argparse.Namespace) -> list[int]:
    tokens = _chat(llm, prompt) if args.chat else llm.tokenize(prompt.encode(), add_bos=True, special=True)
    if not tokens:
        raise ValueError("the prompt has no tokens")
    if len(tokens) >= len(llm.input_ids):
        raise ValueError(f"the prompt has {len(tokens)} tokens, the context {len(llm.input_ids)}: raise -c")
    return tokens


def _chat(llm: Any, message: str) -> list[int]:
    """The tokens that the host's chat handler makes of a user's message: those that it asks the Llama to complete."""
    if "tokenizer.chat_template" not in llm.metadata:
        raise ValueError(
            f"--chat: {llm.model_path} has no chat template; leave --chat out, and write the prompt as the model has it"
        )
    asked: list[list[int]] = []

    def create_completion(*, prompt: list[int], **_: Any) -> Iterator[Any]:
        asked.append(prompt)
        return iter(())

    llm.create_completion = create_completion
    try:
        llm.create_chat_completion([{"role": "user", "content": message}], stream=True)
    except jinja2.TemplateError as err:
        raise ValueError(f"--chat: the chat template of {llm.model_path} fails: {err}") from None
    finally:
        del llm.create_completion
    return asked[0]


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """A line on stderr that counts seconds, where someone may be watching; one line otherwise."""
    if not sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr)
        yield
        return
    done = threading.Event()

    def tick() -> None:
        t0 = time.perf_counter()
        while True:
            print(f"\r{what} ... {time.perf_counter() - t0:.0f} s", end="", file=sys.stderr, flush=True)
            if done.wait(1.0):
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
                return

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
