"""Serve a model with its MTP head over HTTP, with OpenAI's interface: llama_cpp.server.

All other options are the server's own and are handed on to it ('python -m llama_cpp.server --help' lists them):
--host, --port, --n_ctx, --n_gpu_layers, ... Several models come from a --config_file, in which the "draft_model" of
each is the GGUF of its head. The server evaluates one request at a time, and ends a stream when another request comes
in; with --interrupt_requests false that one waits.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from typing import Any

from .. import rpc
from . import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, arguments

HELP = "an HTTP server with OpenAI's interface (llama_cpp.server) and MTP heads"

_EXIT_TERMINATED = 128 + signal.SIGTERM
EXITS = {
    EXIT_OK: "stopped by Ctrl-C while it listened",
    EXIT_FAILED: "failed: a file or a setting does not fit, or the port is taken; stderr says why",
    EXIT_USAGE: "the command line is not understood, by this command or by the server",
    EXIT_INTERRUPTED: "Ctrl-C before it listened",
    _EXIT_TERMINATED: "stopped by SIGTERM",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="BASE", help="GGUF of the model")
    parser.add_argument("--mtp", metavar="MTP", help="GGUF of its MTP head (default: the one in the model's file)")
    parser.add_argument(
        "-k",
        "--num-pred-tokens",
        type=arguments.integer(0),
        metavar="K",
        help="drafts per cycle (default: 0 to 3, by what is measured)",
    )
    arguments.add_servers(parser)
    parser.set_defaults(rest=[])


def do(args: argparse.Namespace) -> int:
    if args.mtp and not args.mtp.endswith(".gguf"):
        raise ValueError(
            f"--mtp {args.mtp}: the server takes a name without .gguf at its end for prompt lookup; rename the file"
        )
    head = args.mtp or (args.model if args.model and arguments.has_head(args.model) else None)
    if args.num_pred_tokens is not None and not head:
        raise ValueError("-k is of the head that --mtp names; in a --config_file it is draft_model_num_pred_tokens")
    from ..host import server  # noqa: F401  from here on the server's settings name heads

    main: Any = importlib.import_module("llama_cpp.server.__main__")
    rpc.add_servers(args.rpc)
    given = {"model": args.model, "draft_model": head, "draft_model_num_pred_tokens": args.num_pred_tokens}
    if args.rpc and args.model:
        given["n_gpu_layers"] = -1  # one that follows counts
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    sys.argv = ["ds4-mtp serve", *options, *args.rest]
    # The server ends by the signal that it got; this one would leave no time to close a model.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_EXIT_TERMINATED))
    try:
        main.main()
    except SystemExit as err:
        # uvicorn's STARTUP_FAILURE, which it gives where the port is taken: 3 means something else among our statuses.
        if err.code == 3:
            return EXIT_FAILED
        raise
    return EXIT_OK
