"""Generate the same text plainly and speculatively with the small DeepSeek-V4 that comes with the plugin.

It shows both texts, that they are the same, and what speculation did and cost on this machine; each after a run to warm
up.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..draft import MtpDraft
from . import EXIT_DIFFERS, EXIT_OK, arguments
from .comparison import compare

HELP = "plain and speculative text of the model that comes with the plugin"
EXITS = {EXIT_OK: "both texts are the same", EXIT_DIFFERS: "the speculative text differs from the plain one"}

MODELS = Path(__file__).resolve().parent.parent / "models"
BASE, HEAD = MODELS / "ds4-mini-q8_0.gguf", MODELS / "ds4-mini-mtp-q8_0.gguf"
DSPARK = MODELS / "ds4-mini-dspark-q8_0.gguf"
HEADS = {"mtp": HEAD, "dspark": DSPARK}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", choices=HEADS, default="mtp", help="which of its two heads drafts (default: mtp)")
    arguments.add_prompt(parser, default=arguments.EXAMPLE)
    arguments.add_generation(parser, n_predict=128, ctx=2048)
    arguments.add_sampling(parser)


def do(args: argparse.Namespace) -> int:
    draft = MtpDraft(HEADS[args.head], num_pred_tokens=args.num_pred_tokens)
    return compare(str(BASE), draft, arguments.prompt(args), args, warm_up=True)
