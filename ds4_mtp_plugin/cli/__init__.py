"""``ds4-mtp``: the plugin from the command line, a file per verb.

A verb is a module with HELP (a line), ``add_arguments(parser)``, ``do(args)``, which returns the exit status, and
EXITS where its statuses mean something other than the common ones. ``args.usage_error(message)`` ends the command with
the verb's usage.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import ds4_mtp_plugin

__all__ = ["EXIT_DIFFERS", "EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_OK", "EXIT_PIPE", "EXIT_USAGE", "main"]

# These work where the rest of the package does not.
_MENDING = ("doctor", "install-engine")
_VERBS = ("demo", "run", "bench", "serve", "verify", "convert", "rpc-server", *_MENDING)

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_DIFFERS = 0, 1, 2, 3
# 128 and the number of the signal, as a shell says it.
EXIT_INTERRUPTED, EXIT_PIPE = 130, 141

_COMMON_EXITS = {
    EXIT_OK: "done",
    EXIT_FAILED: "failed; stderr says why, in a line",
    EXIT_USAGE: "the command line is not understood",
    EXIT_INTERRUPTED: "interrupted (Ctrl-C)",
    EXIT_PIPE: "the reader of the output went away",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; None: the process's) and return its exit status.

    Raises:
        SystemExit: of argparse, for a usage error (2), --help and --version (0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    broken = ds4_mtp_plugin.import_error
    if broken is not None and not {*_MENDING, "-h", "--help", "--version"}.intersection(argv[:1]):
        print(f"ds4-mtp: {broken}\n('ds4-mtp doctor' shows what is installed)", file=sys.stderr)
        return EXIT_FAILED
    parser = argparse.ArgumentParser(
        prog="ds4-mtp",
        description="MTP speculative decoding of DeepSeek-V4 models in llama-cpp-python.",
        epilog="'ds4-mtp VERB --help' lists the options and exit statuses of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {ds4_mtp_plugin.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    parsers = {name: _add_verb(verbs, name) for name in (_VERBS if broken is None else _MENDING)}
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "rest"):  # a verb that hands options on
        args.rest = rest
    elif rest:
        parsers[args.verb].error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = int(args.do(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What is buffered still would be written at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (ImportError, OSError, RuntimeError, ValueError) as err:
        print(f"ds4-mtp {args.verb}: {err}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> argparse.ArgumentParser:
    verb = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    exits = {**_COMMON_EXITS, **getattr(verb, "EXITS", {})}
    parser = verbs.add_parser(
        name,
        help=verb.HELP,
        description=verb.__doc__,
        epilog="exit status:\n" + "\n".join(f"  {status:<3}  {exits[status]}" for status in sorted(exits)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    parser.set_defaults(do=verb.do, usage_error=parser.error)
    return parser
