"""Generate text with a model and drafts: of its MTP head, or of the text itself.

The text goes to stdout as it comes, then a few lines on what speculation did.
"""

from __future__ import annotations

import argparse

from . import EXIT_DIFFERS, EXIT_FAILED, EXIT_OK, arguments, generation, report
from .comparison import compare, seed

HELP = "text of your own model, with drafts"
EXITS = {
    EXIT_OK: "done; with --compare: both texts are the same",
    EXIT_FAILED: "failed: a file or an option does not fit; stderr says why, in a line",
    EXIT_DIFFERS: "with --compare: the speculative text differs from the plain one",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.add_prompt(parser)
    parser.add_argument("--compare", action="store_true", help="first the plain text, then the same with drafts")
    arguments.add_generation(parser, n_predict=256, ctx=4096)
    arguments.add_sampling(parser)


def do(args: argparse.Namespace) -> int:
    prompt = arguments.prompt(args)
    if args.compare:
        return compare(args.model, arguments.draft(args), prompt, args)
    draft = arguments.draft(args)
    chosen = seed(args)
    drafted = generation.generate(args.model, draft, prompt, args, seed=chosen)
    if args.json:
        print(report.as_json(drafted, seed=chosen))
    else:
        print()
        report.print_report(None, drafted)
    return EXIT_OK
