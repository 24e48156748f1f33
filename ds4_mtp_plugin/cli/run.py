"""Generate text with a model and its MTP head.

The text goes to stdout as it comes, then a few lines on what speculation did.
"""

from __future__ import annotations

import argparse as _argparse

from .. import MtpDraft as _MtpDraft
from . import _compare, _generation

HELP = "text of your own model with its MTP head"


def add_arguments(parser: _argparse.ArgumentParser) -> None:
    _generation.add_model_arguments(parser)
    parser.add_argument("--compare", action="store_true", help="first the plain text, then the same with the head")
    _generation.add_arguments(parser, n_predict=256, ctx=4096)


def do(args: _argparse.Namespace) -> int:
    options = {"n_gpu_layers": args.n_gpu_layers}
    if args.compare:
        return _compare.compare(args.model, args.mtp, args.prompt, args, **options)
    draft = _MtpDraft(args.mtp, num_pred_tokens=args.num_pred_tokens)
    drafted = _generation.generate(args.model, draft, args.prompt, args, **options)
    print()
    _generation.report(None, drafted)
    return 0
