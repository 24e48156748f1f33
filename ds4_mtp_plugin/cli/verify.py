"""Generate greedily with drafts, then ask plain decoding what it would have chosen at each token.

Where speculation is exact every token is plain decoding's own choice. Where it is not (GPUs), a token may be another
one whose logit was as good as equal: the worst gap says how equal.
"""

from __future__ import annotations

import argparse
import dataclasses

from ..replay import replay
from ..settings import current
from . import EXIT_DIFFERS, EXIT_FAILED, EXIT_OK, arguments, generation, report

HELP = "how far greedy text with drafts is from the plain one"
EXITS = {
    EXIT_OK: "the worst gap is within the bound",
    EXIT_FAILED: "failed, or nothing was drafted, so that nothing was compared; stderr says why, in a line",
    EXIT_DIFFERS: "the worst gap is larger than the bound",
}

# A quarter of ds4's bound. Decoding a small trained model's text 64 rows at a time, with the CPU's other kernels,
# moved its choices by no more than 0.03; a drafted token that the model did not choose is several logits off.
BOUND = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.add_prompt(parser)
    parser.add_argument(
        "--bound",
        type=arguments.real(0),
        default=BOUND,
        metavar="GAP",
        help="greatest gap that passes, in logits; 0: every token has to be plain decoding's choice "
        "(default %(default)s)",
    )
    arguments.add_generation(parser, n_predict=256, ctx=4096)


def do(args: argparse.Namespace) -> int:
    prompt = arguments.prompt(args)
    if current().disable:
        raise ValueError("DS4_MTP_SPEC_DISABLE is set: nothing is drafted, and there is nothing to compare. Unset it")
    drafted = generation.generate(args.model, arguments.draft(args), prompt, args)
    if drafted.stats is None or not drafted.stats.proposed:
        raise RuntimeError(f"nothing was drafted in {len(drafted.tokens)} tokens, so that nothing was compared")
    with generation.load(args.model, None, args) as llm, generation.progress("decoding it plainly"):
        found = replay(llm, drafted.prompt, drafted.tokens)
    passed = found.worst_gap <= args.bound and (args.bound > 0 or not found.diverging)
    if args.json:
        compared = {**dataclasses.asdict(found), "bound": args.bound, "passed": passed}
        print(report.as_json(drafted, replay=compared))
    else:
        print(f"---\n{drafted.stats}")
        print(f"{found.diverging} of {found.n} tokens are not the choice of plain decoding")
        if found.diverging:
            print(f"worst gap: {found.worst_gap:.4f} logits, at token {found.worst_at} (bound {args.bound:g})")
    return EXIT_OK if passed else EXIT_DIFFERS
