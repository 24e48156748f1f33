"""One generation, streamed and timed, and what two of them say of each other."""

from __future__ import annotations

import argparse as _argparse
import codecs as _codecs
import contextlib as _contextlib
import dataclasses as _dataclasses
import sys as _sys
import threading as _threading
import time as _time
import typing as _t

from ..draft import MtpDraft as _MtpDraft
from ..stats import MtpStats as _MtpStats


@_dataclasses.dataclass(frozen=True)
class Generation:
    """What one generation gave and took. `seconds` is from the first token on, `prompt_seconds` up to it."""

    tokens: list[int]
    prompt_seconds: float
    seconds: float
    stats: _MtpStats | None = None

    @property
    def ms_per_token(self) -> float:
        """Milliseconds a token behind the first (which the prompt's evaluation gives)."""
        return 1000 * self.seconds / max(1, len(self.tokens) - 1)


def add_model_arguments(parser: _argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, metavar="BASE", help="GGUF of the model")
    parser.add_argument("--mtp", required=True, metavar="MTP", help="GGUF of its MTP head")
    parser.add_argument("-p", "--prompt", required=True, help="text to continue")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU, -1 all")


def add_arguments(parser: _argparse.ArgumentParser, *, n_predict: int, ctx: int, sampling: bool = True) -> None:
    parser.add_argument(
        "-n",
        "--n-predict",
        type=int,
        default=n_predict,
        metavar="N",
        help="tokens, 0 or less: until the end of text or context (default %(default)s)",
    )
    parser.add_argument("-k", "--num-pred-tokens", type=int, default=2, metavar="K", help="drafts a cycle (default 2)")
    parser.add_argument("-c", "--ctx-size", type=int, default=ctx, metavar="N", help="context (default %(default)s)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: the host's choice)")
    parser.set_defaults(temp=0.0, seed=1)
    if not sampling:
        return
    parser.add_argument("--temp", type=float, default=0.0, metavar="T", help="temperature (default 0, greedy)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of the sampler (default %(default)s)")


@_contextlib.contextmanager
def loaded(
    model_path: str, draft: _MtpDraft | None, args: _argparse.Namespace, **options: _t.Any
) -> _t.Iterator[_t.Any]:
    """A Llama that is closed again."""
    from llama_cpp import Llama

    with progress(f"loading {model_path}"):
        llm = Llama(
            model_path,
            draft_model=draft,
            n_ctx=args.ctx_size,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            seed=args.seed,
            verbose=False,
            **options,
        )
    try:
        yield llm
    finally:
        llm.close()


def tokenize(llm: _t.Any, prompt: str, args: _argparse.Namespace) -> list[int]:
    """The prompt's tokens.

    Raises:
        ValueError: they fill the context.
    """
    special = "<" in prompt  # a prompt that is already in the model's chat format
    tokens: list[int] = llm.tokenize(prompt.encode(), add_bos=True, special=special)
    if len(tokens) >= args.ctx_size:
        raise ValueError(f"the prompt has {len(tokens)} tokens, the context {args.ctx_size}: raise -c")
    return tokens


def generate(
    model_path: str, draft: _MtpDraft | None, prompt: str, args: _argparse.Namespace, **options: _t.Any
) -> Generation:
    """Load, generate and stream to stdout, and free everything again."""
    with loaded(model_path, draft, args, **options) as llm:
        prompt_tokens = tokenize(llm, prompt, args)
        room = args.ctx_size - len(prompt_tokens)
        n = min(args.n_predict, room) if args.n_predict > 0 else room
        text = _codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokens: list[int] = []
        t0 = first = _time.perf_counter()
        stream = llm.generate(prompt_tokens, temp=args.temp)
        for token in stream:
            if not tokens:
                first = _time.perf_counter()
            tokens.append(token)
            if token == llm.token_eos():
                break
            _sys.stdout.write(text.decode(llm.detokenize([token], prev_tokens=prompt_tokens + tokens[:-1])))
            _sys.stdout.flush()
            if len(tokens) == n:
                break
        end = _time.perf_counter()
        stream.close()
        print(flush=True)
        return Generation(tokens, first - t0, end - first, None if draft is None else draft.stats)


def report(plain: Generation | None, drafted: Generation) -> None:
    """What was measured, to stdout: rates, acceptance, what a row costs, and why there is a gain or none."""
    stats = drafted.stats
    assert stats is not None
    if plain is not None:
        print(f"plain        {1000 / plain.ms_per_token:8.1f} tokens/s")
    print(f"speculative  {1000 / drafted.ms_per_token:8.1f} tokens/s", end="")
    print(f"   {plain.ms_per_token / drafted.ms_per_token:.2f} x" if plain is not None else "")
    if not stats.iters:
        print("nothing was drafted")
        return
    positions = "  ".join(f"{i + 1}: {100 * rate:.0f} %" for i, rate in enumerate(stats.rate_per_position))
    per_cycle = 1 + stats.per_iter
    verify, step = stats.verify_ms / stats.iters, stats.draft_ms / max(1, stats.draft_decodes)
    print(f"accepted     {positions}   ({per_cycle:.2f} tokens a cycle)")
    print(f"cost         verify of {stats.depth + 1} rows {verify:.2f} ms, MTP step {step:.2f} ms", end="")
    if plain is None:
        print()
        return
    print(f", single trunk row {plain.ms_per_token:.2f} ms")
    paid = 1000 * drafted.seconds / stats.iters / plain.ms_per_token
    verdict = "pays" if per_cycle > paid else "does not pay"
    print(f"so a cycle {verdict} here: it takes the time of {paid:.2f} plain tokens and gives {per_cycle:.2f}")
    if per_cycle <= paid:
        print("Fewer drafts (-k 1) cost less. Larger models, bound by memory, gain where a small one does not.")


@_contextlib.contextmanager
def progress(what: str) -> _t.Iterator[None]:
    """A line on stderr that counts seconds, where someone may be watching; one line otherwise."""
    if not _sys.stderr.isatty():
        print(f"{what} ...", file=_sys.stderr)
        yield
        return
    done = _threading.Event()

    def tick() -> None:
        t0 = _time.perf_counter()
        while True:
            print(f"\r{what} ... {_time.perf_counter() - t0:.0f} s", end="", file=_sys.stderr, flush=True)
            if done.wait(1.0):
                print("\r\x1b[K", end="", file=_sys.stderr, flush=True)
                return

    thread = _threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
