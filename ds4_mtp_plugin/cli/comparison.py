"""The same text twice, plain and speculative, and a report on the difference."""

from __future__ import annotations

import argparse
import random
import sys

from ..draft import Draft
from . import EXIT_DIFFERS, EXIT_OK, generation, report

__all__ = ["compare", "seed"]


def seed(args: argparse.Namespace) -> int:
    """The seed that `args` asks for: a random one where that is -1, which both texts of a comparison share."""
    # The last value means "random" to the engine.
    return random.randrange(2**32 - 1) if args.seed == -1 else int(args.seed)


def compare(model: str, draft: Draft, prompt: str, args: argparse.Namespace, *, warm_up: bool = False) -> int:
    """Generate plainly, then with the draft; an exit status."""
    chosen = seed(args)

    def title(text: str) -> None:
        if not args.json:
            print(text)

    title("--- plain ---")
    plain = generation.generate(model, None, prompt, args, seed=chosen, warm_up=warm_up)
    title("--- speculative ---")
    drafted = generation.generate(model, draft, prompt, args, seed=chosen, warm_up=warm_up)
    title("---")
    n = len(plain.tokens)
    same = plain.tokens == drafted.tokens
    pairs = enumerate(zip(plain.tokens, drafted.tokens))
    differs_at = None if same else next((i for i, (a, b) in pairs if a != b), min(n, len(drafted.tokens)))
    if args.json:
        members = {"plain": report.plain_members(plain), "same": same, "differs_at": differs_at}
        print(report.as_json(drafted, seed=chosen, **members))
        return EXIT_OK if same else EXIT_DIFFERS
    if same:
        print(f"the same {n} tokens")
    else:
        print(f"the texts differ from token {differs_at} on (of {n})", file=sys.stderr)
    report.print_report(plain, drafted)
    return EXIT_OK if same else EXIT_DIFFERS
