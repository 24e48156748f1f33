"""Checks of what an app passes: what is wrong is said with its name and what was expected."""

from __future__ import annotations

import math
import numbers
import operator
import os
from pathlib import Path
from typing import Any

__all__ = ["endpoint", "flag", "integer", "path", "real"]


def endpoint(text: str) -> str:
    """`text`, which the engine reads as a name or an IPv4 address and a port.

    Raises:
        ValueError: it is not "host:port".
    """
    host, _, port = text.rpartition(":")
    if not host or ":" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(
            f"RPC server {text!r}: expected host:port, with a name or an IPv4 address and a port from 1 to 65535"
        )
    return text


def path(value: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Path:
    """An absolute path, so that it means the same file after a chdir; "~" is the user's home.

    ".." stays as it is: behind a symbolic link it is not the folder that the link stands in.

    Raises:
        TypeError: `value` is no path.
        ValueError: it is empty.
    """
    try:
        text = os.fsdecode(value)
    except TypeError:
        raise TypeError(f"MtpDraft: model_path is {value!r}, expected the path of an MTP GGUF") from None
    if not text:
        raise ValueError(f"MtpDraft: model_path is {value!r}, expected the path of an MTP GGUF")
    return Path(os.path.expanduser(text)).absolute()


def integer(draft: str, name: str, value: Any, least: int, most: int | None = None) -> int:
    """
    Raises:
        TypeError: `value` is no integer (numpy's are).
        ValueError: it is below `least` or above `most`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{draft}: {name} is {value!r}, expected an integer") from None
    if number < least or (most is not None and number > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{draft}: {name} is {number}, expected {limits}")
    return number


def real(draft: str, name: str, value: Any, what: str, most: float = math.inf) -> float:
    """
    Args:
        what: what is expected, for the message.

    Raises:
        TypeError: `value` is no number.
        ValueError: it is not from 0 to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{draft}: {name} is {value!r}, expected {what}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{draft}: {name} is an integer that no float holds, expected {what}") from None
    if not 0 <= number <= most:
        raise ValueError(f"{draft}: {name} is {number:g}, expected {what}")
    return number


def flag(draft: str, name: str, value: Any) -> bool:
    """
    Raises:
        TypeError: `value` is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{draft}: {name} is {value!r}, expected True or False")
    return value
