"""Generate greedily with the head, then ask plain decoding what it would have chosen at each token.

Where speculation is exact every token is plain decoding's own choice. Where it is not (GPUs), a token may be another
one whose logit was as good as equal: the worst gap says how equal.
"""

from __future__ import annotations

import argparse as _argparse

from .. import MtpDraft as _MtpDraft
from ..replay import replay as _replay
from . import EXIT_DIFFERS as _EXIT_DIFFERS
from . import EXIT_OK as _EXIT_OK
from . import _generation

HELP = "how far greedy text with the head is from the plain one"

# A quarter of ds4's bound. Decoding a small trained model's text 64 rows at a time, with the CPU's other kernels,
# moved its choices by no more than 0.03; a drafted token that the model did not choose is several logits off.
BOUND = 0.5


def add_arguments(parser: _argparse.ArgumentParser) -> None:
    _generation.add_model_arguments(parser)
    parser.add_argument(
        "--bound",
        type=float,
        default=BOUND,
        metavar="GAP",
        help=f"exit with status {_EXIT_DIFFERS} where the worst gap is larger (default %(default)s; 0: exact)",
    )
    _generation.add_arguments(parser, n_predict=256, ctx=4096, sampling=False)


def do(args: _argparse.Namespace) -> int:
    options = {"n_gpu_layers": args.n_gpu_layers}
    draft = _MtpDraft(args.mtp, num_pred_tokens=args.num_pred_tokens)
    drafted = _generation.generate(args.model, draft, args.prompt, args, **options)
    with _generation.loaded(args.model, None, args, **options) as llm, _generation.progress("decoding it plainly"):
        found = _replay(llm, _generation.tokenize(llm, args.prompt, args), drafted.tokens)
    print(f"---\n{draft.stats}")
    print(f"{found.diverging} of {found.n} tokens are not the choice of plain decoding")
    if found.diverging:
        print(f"worst gap: {found.worst_gap:.4f} logits, at token {found.worst_at} (bound {args.bound:g})")
    return _EXIT_OK if found.worst_gap <= args.bound and (args.bound or not found.diverging) else _EXIT_DIFFERS
