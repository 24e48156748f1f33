"""``ds4-mtp``: the plugin from the command line, a file per verb."""

from __future__ import annotations

import argparse as _argparse
import importlib as _importlib
import sys as _sys
import typing as _t

import ds4_mtp_plugin as _package

# These work where the rest of the package does not.
_MENDING = ("doctor", "install_engine")
_VERBS = ("demo", "run", "serve", "verify", *_MENDING)

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_DIFFERS = 0, 1, 2, 3

_EPILOG = f"""exit status:
  {EXIT_OK}  done
  {EXIT_FAILED}  failed: a file or an option that does not fit, said in one line
  {EXIT_USAGE}  the command line is not understood
  {EXIT_DIFFERS}  the speculative text differs from the plain one (verify: by more than the bound)
"""


def main(argv: _t.Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; None: the process's) and return its exit status."""
    parser = _argparse.ArgumentParser(
        prog="ds4-mtp",
        description="MTP speculative decoding of DeepSeek-V4 models in llama-cpp-python.",
        epilog=_EPILOG,
        formatter_class=_argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_package.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    argv = _sys.argv[1:] if argv is None else list(argv)
    broken = _package.import_error
    if broken is not None and not {name.replace("_", "-") for name in _MENDING}.intersection(argv[:1]):
        print(f"ds4-mtp: {broken}\n('ds4-mtp doctor' shows what is installed)", file=_sys.stderr)
        return EXIT_FAILED
    for name in _VERBS if broken is None else _MENDING:
        verb = _importlib.import_module(f".{name}", __name__)
        sub = verbs.add_parser(
            name.replace("_", "-"),
            help=verb.HELP,
            description=verb.__doc__,
            epilog=_EPILOG,
            formatter_class=_argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(sub)
        sub.set_defaults(do=verb.do)
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "rest"):  # a verb that hands options on
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(args.do(args))
    except (ImportError, OSError, RuntimeError, ValueError) as err:
        print(f"ds4-mtp {args.verb}: {err}", file=_sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
