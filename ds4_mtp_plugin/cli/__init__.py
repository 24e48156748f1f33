"""``ds4-mtp``: the plugin from the command line, a file per verb."""

from __future__ import annotations

import argparse as _argparse
import sys as _sys
import typing as _t

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_DIFFERS = 0, 1, 2, 3

_EPILOG = f"""exit status:
  {EXIT_OK}  done
  {EXIT_FAILED}  failed: a file or an option that does not fit, said in one line
  {EXIT_USAGE}  the command line is not understood
  {EXIT_DIFFERS}  the speculative text differs from the plain one
"""


def main(argv: _t.Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; None: the process's) and return its exit status."""
    parser = _argparse.ArgumentParser(
        prog="ds4-mtp",
        description="MTP speculative decoding of DeepSeek-V4 models in llama-cpp-python.",
        epilog=_EPILOG,
        formatter_class=_argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    from . import demo as _demo
    from . import run as _run

    for verb in (_demo, _run):
        sub = verbs.add_parser(
            verb.__name__.rpartition(".")[2],
            help=verb.HELP,
            description=verb.__doc__,
            epilog=_EPILOG,
            formatter_class=_argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(sub)
        sub.set_defaults(do=verb.do)
    args = parser.parse_args(argv)
    try:
        return int(args.do(args))
    except (ImportError, OSError, RuntimeError, ValueError) as err:
        print(f"ds4-mtp {args.verb}: {err}", file=_sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def _version() -> str:
    from .. import __version__

    return __version__
