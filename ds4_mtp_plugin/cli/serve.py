"""Serve a model with its MTP head over HTTP, with OpenAI's interface: llama_cpp.server.

All other options are the server's own and are handed on to it ('python -m llama_cpp.server --help' lists them):
--host, --port, --n_ctx, --n_gpu_layers, ... Several models come from a --config_file, in which the "draft_model" of
each is the GGUF of its head. It runs until Ctrl-C (exit status 0) or SIGTERM (143).
"""

from __future__ import annotations

import argparse as _argparse
import importlib as _importlib
import signal as _signal
import sys as _sys
import typing as _t

HELP = "an HTTP server with OpenAI's interface (llama_cpp.server) and MTP heads"


def add_arguments(parser: _argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="BASE", help="GGUF of the model")
    parser.add_argument("--mtp", metavar="MTP", help="GGUF of its MTP head (the same as --draft_model MTP)")
    parser.add_argument("-k", "--num-pred-tokens", type=int, metavar="K", help="drafts a cycle (default 2)")
    parser.set_defaults(rest=[])


def do(args: _argparse.Namespace) -> int:
    if args.mtp and not args.mtp.endswith(".gguf"):
        raise ValueError(
            f"--mtp {args.mtp}: the server takes a name without .gguf at its end for prompt lookup; rename the file"
        )
    if args.num_pred_tokens is not None and not args.mtp:
        raise ValueError("-k is of the head that --mtp names; in a --config_file it is draft_model_num_pred_tokens")
    from ..host import server as _server  # noqa: F401  from here on the server's settings name heads

    main: _t.Any = _importlib.import_module("llama_cpp.server.__main__")
    given = {"model": args.model, "draft_model": args.mtp, "draft_model_num_pred_tokens": args.num_pred_tokens}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    _sys.argv = ["ds4-mtp serve", *options, *args.rest]
    # The server ends by the signal that it got; this one would leave no time to close a model.
    _signal.signal(_signal.SIGTERM, lambda *_: _sys.exit(128 + _signal.SIGTERM))
    main.main()
    return 0
