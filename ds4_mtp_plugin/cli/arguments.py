"""Options that verbs share: the model, the prompt, lengths, sampling. What is out of range is a usage error."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_cpp import Llama

from .. import gguf
from .. import options as checks
from ..draft import Draft, MtpDraft, NgramDraft

# Of a C int, which the engine takes.
_MOST = 2**31 - 1
# The engine's own bound (GGML_MAX_N_THREADS); more end the process.
_MOST_THREADS = 512


def integer(low: int, high: int = _MOST) -> Callable[[str], int]:
    """The type of an option: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            limits = f"{low} or more" if high == _MOST else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected a whole number, {limits}, found {text!r}")
        return value

    return parse


def real(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Callable[[str], float]:
    """The type of an option: a finite number from `low` to `high`, or one greater than `above`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if (
            not math.isfinite(value)
            or (low is not None and value < low)
            or (high is not None and value > high)
            or (above is not None and value <= above)
        ):
            limits = (
                f", greater than {above:g}"
                if above is not None
                else f", {low:g} to {high:g}"
                if low is not None and high is not None
                else f", {low:g} or more"
                if low is not None
                else ""
            )
            raise argparse.ArgumentTypeError(f"expected a number{limits}, found {text!r}")
        return value

    return parse


def endpoints(text: str) -> list[str]:
    """The type of an option: servers, separated by commas."""
    try:
        return [checks.endpoint(each) for each in text.split(",")]
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from None


#: The type of an option: a number of threads.
threads = integer(1, _MOST_THREADS)

#: A prompt for those who have none at hand.
EXAMPLE = "This module implements a number of functions that"


def cores() -> int:
    """Threads that this process may run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Parameters of Llama.generate, by which it samples, under their names in llama.cpp's CLI.
_SAMPLING: tuple[tuple[str, str, Callable[[str], float], str], ...] = (
    ("--top-k", "top_k", integer(0), "sample among the N likeliest tokens; 0: all"),
    ("--top-p", "top_p", real(0, 1), "sample among the likeliest tokens that have this probability together; 1: all"),
    ("--min-p", "min_p", real(0, 1), "least probability of a token, relative to that of the likeliest; 0: any"),
    ("--typical-p", "typical_p", real(0, 1), "locally typical sampling; 1: off"),
    ("--repeat-penalty", "repeat_penalty", real(above=0), "penalty of the tokens that came last; 1: none"),
    ("--frequency-penalty", "frequency_penalty", real(), "penalty for each time that a token came; 0: none"),
    ("--presence-penalty", "presence_penalty", real(), "penalty of a token that came; 0: none"),
    ("--mirostat", "mirostat_mode", integer(0, 2), "1 or 2: Mirostat of this version, instead of top-k to min-p"),
    ("--mirostat-ent", "mirostat_tau", real(0), "Mirostat's target entropy"),
    ("--mirostat-lr", "mirostat_eta", real(0), "Mirostat's learning rate"),
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The files and where their layers go."""
    parser.add_argument("-m", "--model", required=True, metavar="BASE", help="GGUF of the model")
    parser.add_argument(
        "--mtp",
        metavar="MTP",
        help="GGUF of its MTP head; without it the head in the model's own file, and without that the text itself",
    )
    parser.add_argument(
        "-ngl",
        "--n-gpu-layers",
        type=integer(-1),
        metavar="N",
        help="layers on the GPU, or on the servers of --rpc; -1: all (default: 0, with --rpc all)",
    )
    add_servers(parser)


def add_servers(parser: argparse.ArgumentParser) -> None:
    """--rpc."""
    parser.add_argument(
        "--rpc",
        type=endpoints,
        default=[],
        metavar="HOST:PORT,...",
        help="machines that take layers, each with 'ds4-mtp rpc-server' running",
    )


def n_gpu_layers(args: argparse.Namespace) -> int:
    """What -ngl says, or --rpc by being there; 0 where a verb has neither."""
    given: int | None = getattr(args, "n_gpu_layers", None)
    if given is not None:
        return given
    return -1 if getattr(args, "rpc", []) else 0


def draft(args: argparse.Namespace, **options: Any) -> Draft:
    """The draft that --mtp and -k ask for; `options` go before -k.

    Raises:
        OSError, ValueError: the file is no head that can be used, or the head in the model's file is none.
    """
    options = {"num_pred_tokens": args.num_pred_tokens, **options}
    if args.mtp is None and not has_head(args.model):
        return NgramDraft(**options)
    return MtpDraft(args.mtp, **options)


def has_head(model: str) -> bool:
    """Whether the file of a model has an MTP head in it that can be used."""
    try:
        gguf.check_inside(model)
    except (OSError, ValueError):
        return False  # the host says what is wrong with the file
    return True


def add_prompt(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """-p and --chat; `prompt` gives the text."""
    parser.add_argument(
        "-p",
        "--prompt",
        default=default,
        metavar="TEXT",
        help="text to continue; @FILE: what the file holds, @-: stdin "
        + ("(default: stdin, where it is piped)" if default is None else "(default: %(default)r)"),
    )
    parser.add_argument("--chat", action="store_true", help="put it to the model as a user's message")


def add_generation(
    parser: argparse.ArgumentParser,
    *,
    n_predict: int,
    ctx: int,
    depth: str = "drafts per cycle (default: by what is measured)",
) -> None:
    """Lengths, threads, the depth of drafts, and how a result is printed."""
    parser.add_argument(
        "-n",
        "--n-predict",
        type=integer(-1),
        default=n_predict,
        metavar="N",
        help="tokens; 0 or -1: until the end of the text or the context (default %(default)s)",
    )
    parser.add_argument(
        "-k",
        "--num-pred-tokens",
        type=integer(0),
        metavar="K",
        help=depth,
    )
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=integer(0),
        default=ctx,
        metavar="N",
        help="length of the context; 0: the model's own (default %(default)s)",
    )
    parser.add_argument("-t", "--threads", type=threads, metavar="N", help="threads (default: the host's choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead, when all is done")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; without this it is greedily."""
    group = parser.add_argument_group("sampling", "named as in llama.cpp's CLI; defaults are llama-cpp-python's own")
    group.add_argument(
        "--temp", type=real(0), default=0.0, metavar="T", help="temperature; 0: greedy (default %(default)s)"
    )
    group.add_argument(
        "-s",
        "--seed",
        type=integer(-1, 2**32 - 1),
        default=1,
        metavar="S",
        help="seed of the sampler; -1: another each time (default %(default)s)",
    )
    defaults = inspect.signature(Llama.generate).parameters
    for option, name, kind, what in _SAMPLING:
        group.add_argument(
            option,
            dest=name,
            type=kind,
            default=defaults[name].default,
            metavar="N" if name in ("top_k", "mirostat_mode") else "X",
            help=f"{what} (default %(default)s)",
        )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Of `args` the parameters of Llama.generate."""
    names = ("temp", *(name for _, name, _, _ in _SAMPLING))
    return {"temp": 0.0} | {name: value for name, value in vars(args).items() if name in names}


def prompt(args: argparse.Namespace) -> str:
    """The text that -p names, or that is piped in.

    As llama.cpp's CLI does, it leaves out the newline at the end of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or not UTF-8.
        SystemExit: there is none: a usage error.
    """
    given: str | None = args.prompt
    if given is None and (sys.stdin is None or sys.stdin.isatty()):
        args.usage_error("there is no prompt: give -p TEXT or -p @FILE, or pipe it in")
    if given is not None and not given.startswith("@"):
        try:
            given.encode()
        except UnicodeEncodeError:
            raise ValueError("-p: the text is not UTF-8") from None
        return given
    name = "-" if given is None else given[1:]
    if name == "-":
        where, data = "stdin", sys.stdin.buffer.read()
    else:
        where = name
        try:
            data = Path(name).expanduser().read_bytes()
        except OSError as err:
            raise OSError(f"-p {given}: {err.strerror} (what follows @ is the name of a file)") from None
    try:
        text = data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as err:
        raise ValueError(f"the prompt in {where} is not UTF-8 (byte {err.start})") from None
    text = text.removesuffix("\n")
    if not text:
        raise ValueError(f"the prompt in {where} is empty")
    return text
