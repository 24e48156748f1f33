"""Time to the first token of prompts that share a beginning: what an agent, a chat or an editor waits for."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama_cpp import Llama

from ..draft import Draft
from ..engine.cpu import cpu
from . import EXIT_DIFFERS, EXIT_OK, generation

__all__ = ["ask", "conversation", "run"]

# Tokens of an answer, and of what comes behind it.
_ANSWER, _NEW = 16, 24

#: Takes a prompt and a number of tokens: seconds to the first of them, and they.
Ask = Callable[[Sequence[int], int], "tuple[float, list[int]]"]


def ask(llm: Llama, prompt: Sequence[int], n: int) -> tuple[float, list[int]]:
    """The Llama goes on from what it holds: seconds to the first token, and n greedy tokens."""
    t0 = time.perf_counter()
    first, tokens = 0.0, []
    for token in llm.generate(prompt, temp=0.0):
        first = first or time.perf_counter() - t0
        tokens.append(token)
        if len(tokens) == n:
            break
    return first, tokens


def conversation(ask: Ask, text: Sequence[int], n: int) -> Iterator[tuple[str, float, list[int]]]:
    """Prompts of n tokens of `text`, one after the other: what happens, seconds to the first token, the answer."""
    prompt, new = list(text[:n]), list(text[n : n + 2 * _NEW])
    first, answer = ask(prompt, _ANSWER)
    yield "first", first, answer
    yield "continued", *ask([*prompt, *answer, *new[:_NEW]], _ANSWER)
    yield "last answer dropped", *ask([*prompt, *new[_NEW:]], _ANSWER)
    for percent in (90, 50, 10):
        at = n * percent // 100
        prompt[at] = next(token for token in text if token != prompt[at])
        yield f"edited at {percent} %", *ask(prompt, _ANSWER)


def run(llm: Llama, draft: Draft, text: Sequence[int], args: argparse.Namespace) -> int:
    """Plainly and with the draft's checkpoints, in turn; an exit status."""
    n = args.prefix
    text = (list(text) * (1 + (n + 2 * _NEW) // len(text)))[: n + 2 * _NEW]
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    same = True

    with generation.progress(f"{args.rounds} rounds of 2 times 6 prompts of {n} tokens"):
        for turn in range(args.rounds):
            answers: list[list[list[int]]] = [[], []]
            for i in (0, 1) if turn % 2 == 0 else (1, 0):
                llm.draft_model = draft if i else None
                llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
                llm._ctx.kv_cache_clear()  # type: ignore[no-untyped-call, unused-ignore]
                for what, first, answer in conversation(functools.partial(ask, llm), text, n):
                    seconds.setdefault(what, ([], []))[i].append(first)
                    answers[i].append(answer)
            same = same and answers[0] == answers[1]
    rows: dict[str, dict[str, float]] = {
        what: {"plain_ms": 1000 * statistics.median(plain), "draft_ms": 1000 * statistics.median(drafted)}
        for what, (plain, drafted) in seconds.items()
    }
    exact = draft.stats.exact
    if args.json:
        about: dict[str, Any] = {"cpu": str(cpu()), "threads": args.threads, "rounds": args.rounds, "exact": exact}
        print(json.dumps({**about, "prompt_tokens": n, "same_text": same, "first_token": rows}))
    else:
        print(f"time to the first token of prompts of {n} tokens, {args.rounds} rounds, n_threads {args.threads}")
        print(cpu())
        print(f"{'':20} {'plain':>10} {'with draft':>12}")
        for what, row in rows.items():
            print(f"{what:20} {row['plain_ms']:7.0f} ms {row['draft_ms']:9.0f} ms")
        print("the same answers" if same else "OTHER ANSWERS")
    return EXIT_OK if same or not exact else EXIT_DIFFERS
