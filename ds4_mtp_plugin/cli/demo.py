"""Generate the same text plainly and speculatively with the small DeepSeek-V4 that comes with the plugin.

It shows both texts, that they are the same, and what speculation did and cost on this machine.
"""

from __future__ import annotations

import argparse as _argparse
import pathlib as _pathlib

from . import _compare

HELP = "plain and speculative text of the model that comes with the plugin"

MODELS = _pathlib.Path(__file__).resolve().parent.parent / "models"
BASE, HEAD = MODELS / "ds4-mini-q8_0.gguf", MODELS / "ds4-mini-mtp-q8_0.gguf"

_PROMPT = "This module implements a number of functions that"


def add_arguments(parser: _argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--prompt", default=_PROMPT, help="text to continue (default: %(default)r)")
    _compare.add_arguments(parser, n_predict=128, ctx=2048)


def do(args: _argparse.Namespace) -> int:
    return _compare.compare(str(BASE), str(HEAD), args.prompt, args)
