"""Lend this machine to a Llama on another one, over llama.cpp's RPC: its GPUs, or its CPU where it has none.

On the other machine: 'ds4-mtp run --rpc HOST:PORT ...', or ds4_mtp_plugin.rpc.add_servers before a Llama is made. One
process at a time is served, for as long as it has a model here; others wait. Ends by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from ..engine import rpc
from ..host.library import current
from ..options import endpoint
from . import EXIT_FAILED, arguments

HELP = "lend this machine's GPUs or CPU to a Llama on another machine"
EXITS = {
    EXIT_FAILED: "failed: the port is taken, or a folder cannot be made; stderr says why",
    128 + signal.SIGTERM: "stopped by SIGTERM",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default %(default)s: this machine alone)",
    )
    parser.add_argument(
        "--port", type=arguments.integer(1, 2**16 - 1), default=50052, metavar="P", help="port (default %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep large weights in this folder, so that they are sent once"
    )
    parser.add_argument(
        "-t",
        "--threads",
        type=arguments.threads,
        default=arguments.cores(),
        metavar="N",
        help="threads (default: one per core)",
    )


def do(args: argparse.Namespace) -> int:
    where = endpoint(f"{args.host}:{args.port}")
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    print(
        f"serving at {where} until Ctrl-C. Whoever reaches this port can use this machine, without a password and "
        "unencrypted: open it to machines that you trust alone.",
        flush=True,
    )
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # Python's handlers would wait for a call that does not return
    rpc.serve(current(), where, cache=None if args.cache is None else str(args.cache), n_threads=args.threads)
