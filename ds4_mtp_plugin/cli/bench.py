"""Measure what drafts gain with your files: plain decoding, fixed numbers of drafts and the automatic one, in turn.

The model is loaded once, and everyone gets it with the same threads, in rounds, the order of which turns. Ratios are to
plain decoding in the same round: their median, the least and the greatest. The limit is what a number of drafts could
gain at best: tokens per cycle, over the time of a verify, its drafts, and the host's own loop for as many tokens, in
plain tokens. What is not reached of it is spent elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
from llama_cpp import Llama

from ..draft import MAX_PRED_TOKENS, Draft
from ..engine.cpu import cpu
from ..host.wraps import session_of
from ..settings import current
from ..speculation import AdaptiveDepth, FixedDepth
from . import EXIT_DIFFERS, EXIT_FAILED, EXIT_OK, arguments, generation, prefix
from .comparison import seed

HELP = "what drafts gain on your files and machine, beside plain decoding"
EXITS = {
    EXIT_OK: "measured, and every text is plain decoding's",
    EXIT_FAILED: "failed: a file or an option does not fit, or nothing can be drafted; stderr says why, in a line",
    EXIT_DIFFERS: "a text differs from plain decoding's",
}

# What another number of threads has to gain to be worth a line, and the tokens that it is tried for.
_WORTH, _TRIED = 1.05, 12


@dataclass
class Contender:
    """A way to decode, and what it took in each round; `depth` is None for plain decoding."""

    name: str
    depth: AdaptiveDepth | None
    first: list[float] = field(default_factory=list)  # seconds to the first token
    seconds: list[float] = field(default_factory=list)  # from there to the last
    decodes: list[float] = field(default_factory=list)  # of plain decoding: those of them that the engine took
    tokens: list[int] = field(default_factory=list)
    cycles: int = 0
    accepted: list[int] = field(default_factory=list)  # verifies in which drafts 1, 2, ... were accepted
    verifies: list[int] = field(default_factory=list)  # verifies with such a draft
    costs: list[tuple[float, float]] = field(default_factory=list)  # of each run: ms of a verify and of its drafts

    def run(self, llm: Llama, draft: Draft, prompt: list[int], n: int, seed: int, sampling: dict[str, Any]) -> None:
        session = session_of(llm)
        assert session is not None
        llm.draft_model = None if self.depth is None else draft
        if self.depth is not None:
            session.choose_by(self.depth)
        llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
        llm.set_seed(seed)
        before = draft.stats
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        self.tokens = []
        with _decodes(llm) if self.depth is None else nullcontext([0.0]) as decodes:
            start = first = time.perf_counter()
            for token in llm.generate(prompt, **sampling):
                if not self.tokens:
                    first = time.perf_counter()
                    decodes.clear()
                self.tokens.append(token)
                if len(self.tokens) == n or llama_cpp.llama_vocab_is_eog(vocab, token):
                    break
            end = time.perf_counter()
        self.decodes.append(sum(decodes))
        self.first.append(first - start)
        self.seconds.append(end - first)
        stats = draft.stats.since(before)
        self.cycles += stats.iters + stats.plain
        if stats.iters:
            self.costs.append((stats.verify_ms / stats.iters, stats.draft_ms / stats.iters))
        for mine, new in ((self.accepted, stats.accepted_per_position), (self.verifies, stats.proposed_per_position)):
            mine[:] = [a + b for a, b in zip(mine or [0] * len(new), new)]

    def forget(self) -> None:
        """The rounds so far were to warm up."""
        self.first, self.seconds, self.decodes = [], [], []
        self.accepted, self.verifies, self.costs, self.cycles = [], [], [], 0

    @property
    def acceptance(self) -> list[float]:
        """Of the verifies with a draft 1, 2, ... the share in which it, and all before it, was accepted."""
        return [a / v for a, v in zip(self.accepted, self.verifies) if v]


@contextmanager
def _decodes(llm: Llama) -> Iterator[list[float]]:
    """The seconds of each decode of the host's loop meanwhile."""
    seconds: list[float] = []
    decode = llm._ctx.decode

    def timed(batch: Any) -> None:
        t0 = time.perf_counter()
        decode(batch)
        llama_cpp.llama_synchronize(llm.ctx)
        seconds.append(time.perf_counter() - t0)

    llm._ctx.decode = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        del llm._ctx.decode  # the class's is there again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.add_prompt(parser, default=arguments.EXAMPLE)
    parser.add_argument(
        "-r", "--rounds", type=arguments.integer(1), default=5, metavar="N", help="after one to warm up (%(default)s)"
    )
    parser.add_argument(
        "--prefix",
        type=arguments.integer(64),
        metavar="N",
        help="instead: the time to the first token of prompts of N tokens, each of which begins as the one before",
    )
    arguments.add_generation(
        parser, n_predict=128, ctx=4096, depth="the greatest number of drafts (default: 3 of a head, 16 of the text)"
    )
    arguments.add_sampling(parser)


def do(args: argparse.Namespace) -> int:
    if current().disable:
        raise ValueError("DS4_MTP_SPEC_DISABLE is set: nothing is drafted, and there is nothing to compare. Unset it")
    prompt = arguments.prompt(args)
    if args.num_pred_tokens == 0:
        args.usage_error("-k 0: expected the greatest number of drafts, 1 or more")
    most = args.num_pred_tokens or (3 if args.mtp or arguments.has_head(args.model) else MAX_PRED_TOKENS)
    options: dict[str, Any] = {"num_pred_tokens": most, "adaptive": True}
    if args.prefix:
        args.ctx_size = args.ctx_size and max(args.ctx_size, args.prefix + 256)
    else:
        options["checkpoints_mb"] = 0  # everyone reads the whole prompt each time
    draft = arguments.draft(args, **options)
    # Equal threads for a single row and for a verify: by the host's default a row has half of them.
    args.threads = args.threads or arguments.cores()
    chosen = seed(args)
    with generation.load(args.model, draft, args) as llm:
        if session_of(llm) is None:
            raise RuntimeError("this model does not draft as it was loaded; stderr says why")
        tokens = generation.tokenize(llm, prompt, args)
        if args.prefix:
            return prefix.run(llm, draft, tokens, args)
        n = generation.length(llm, tokens, args)
        field = [
            Contender("plain", None),
            Contender("automatic", AdaptiveDepth(draft.stats.depth)),
            *(
                Contender(f"{k} draft{'s' if k > 1 else ''}", FixedDepth(k, text=False))
                for k in range(1, draft.stats.depth + 1)
            ),
        ]
        with generation.progress(f"{1 + args.rounds} rounds of {len(field)} times {n} tokens"):
            for turn in range(1 + args.rounds):
                at = turn % len(field)
                for each in field[at:] + field[:at]:
                    each.run(llm, draft, tokens, n, chosen, arguments.sampling(args))
                if turn == 0:
                    if len(field[0].tokens) < 2:
                        raise ValueError("the text ends at its first token: give another prompt (-p), or a greater -n")
                    for each in field:
                        each.forget()
        result = measured(field, len(tokens), args.threads, exact=draft.stats.exact)
        better = other_threads(llm, draft, tokens, args.threads)
    if better is not None:
        result["threads_that_a_single_row_is_faster_with"] = better
    print(json.dumps(result) if args.json else rendered(result))
    return EXIT_OK if all(row["same_text"] for row in result["contenders"].values()) else EXIT_DIFFERS


def measured(field: list[Contender], n_prompt: int, threads: int, *, exact: bool) -> dict[str, Any]:
    """All figures, for JSON; times in milliseconds."""
    plain, deepest = field[0], field[-1]
    rows: dict[str, dict[str, Any]] = {}
    for each in field:
        ratios = sorted(p / s for p, s in zip(plain.seconds, each.seconds))
        n = len(each.tokens) - 1
        rows[each.name] = {
            "tokens_per_s": n / statistics.median(each.seconds),
            "ratio": statistics.median(ratios),
            "least": ratios[0],
            "greatest": ratios[-1],
            "first_token_ms": 1000 * statistics.median(each.first),
            "tokens_per_cycle": len(each.seconds) * n / each.cycles if each.depth is not None and each.cycles else 1.0,
            "same_text": each.tokens == plain.tokens,
        }
    single = statistics.median(plain.seconds) / (len(plain.tokens) - 1)
    of_host = statistics.median(1 - d / s for d, s in zip(plain.decodes, plain.seconds))
    costs = {}
    for each in field[2:]:
        assert each.depth is not None
        if each.costs:
            verify, drafting = (statistics.median(ms) / (1000 * single) for ms in zip(*each.costs))
            n = rows[each.name]["tokens_per_cycle"]
            limit = n / (verify + drafting + n * of_host)
            costs[str(each.depth.n_max)] = {
                "verify_rows": verify,
                "drafts_rows": drafting,
                "limit": limit,
                "reached": rows[each.name]["ratio"] / limit,
            }
    return {
        "cpu": str(cpu()),
        "threads": threads,
        "prompt_tokens": n_prompt,
        "tokens": len(plain.tokens),
        "rounds": len(plain.seconds),
        "exact": exact,
        "single_row_ms": 1000 * single,
        "host_ms": 1000 * single * of_host,
        "acceptance": deepest.acceptance,
        "contenders": rows,
        "drafts": costs,
    }


def rendered(result: dict[str, Any]) -> str:
    lines = [
        f"{result['tokens']} tokens behind {result['prompt_tokens']}, {result['rounds']} rounds, "
        f"n_threads {result['threads']}; {result['cpu']}",
        f"{'':10} {'tokens/s':>9} {'ratio':>6} {'(least, greatest)':>18} {'a cycle':>8} {'first token':>12}",
    ]
    for name, row in result["contenders"].items():
        spread = f"({row['least']:.2f}, {row['greatest']:.2f})"
        lines.append(
            f"{name:10} {row['tokens_per_s']:9.1f} {row['ratio']:6.2f} {spread:>18} {row['tokens_per_cycle']:8.2f} "
            f"{row['first_token_ms']:9.0f} ms" + ("" if row["same_text"] else "  OTHER TEXT")
        )
    accepted = ", ".join(f"{share:.2f}" for share in result["acceptance"])
    lines.append(
        (f"accepted at position 1, 2, ...: {accepted}; " if accepted else "")
        + f"a plain token takes {result['single_row_ms']:.2f} ms, {result['host_ms']:.2f} of them in the host's loop"
    )
    lines += [
        f"-k {k}: verify {cost['verify_rows']:.2f} of it, drafting {cost['drafts_rows']:.2f}; "
        f"at best {cost['limit']:.2f}, reached {cost['reached']:.2f} of it"
        for k, cost in result["drafts"].items()
    ]
    if (better := result.get("threads_that_a_single_row_is_faster_with")) is not None:
        lines.append(f"A single row is faster with {better} threads: try -t {better}")
    return "\n".join(lines)


def other_threads(llm: Llama, draft: Draft, prompt: list[int], threads: int) -> int | None:
    """The number of threads with which plain decoding is faster than with `threads` by more than noise, if any."""

    def milliseconds(n: int) -> float:
        llama_cpp.llama_set_n_threads(llm.ctx, n, n)
        times = []
        for _ in range(_TRIED):
            t0 = time.perf_counter()
            llm.eval(prompt[-1:])
            times.append(time.perf_counter() - t0)
        return statistics.median(times)

    llm.draft_model = None
    llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
    cores = arguments.cores()
    found = {n: milliseconds(n) for n in sorted({1, *(2**i for i in range(10) if 2**i <= cores), cores, threads})}
    found[threads] = min(found[threads], milliseconds(threads))
    best = min(found, key=lambda n: found[n])
    return best if found[threads] > _WORTH * found[best] else None
