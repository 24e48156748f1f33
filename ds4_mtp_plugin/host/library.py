"""One libllama for the host runtime and for us: chosen before the host is imported, checked after."""

from __future__ import annotations

import filecmp
import functools
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from ..engine import LIBRARY_DIR, Library
from .contract import HOST_VERSION, INSTALL_HOST

__all__ = ["current", "folder", "library_path", "ready"]

_CHOICE = "LLAMA_CPP_LIB_PATH"


def ready() -> None:
    """Import the host on our library, check that it runs on it, and wrap it. Safe to call again.

    Raises:
        ImportError: no host, another version of it, or a host that runs on another llama.cpp, another build of ours
            among them; the message says how to mend it.
    """
    if "llama_cpp" not in sys.modules:
        _import_host()
    version = importlib.metadata.version("llama-cpp-python")
    if version != HOST_VERSION:
        raise ImportError(
            f"llama-cpp-python {version} is installed, this ds4_mtp_plugin works with {HOST_VERSION} alone: "
            f"{INSTALL_HOST}"
        )
    current()
    _check_build()
    wraps: Any = importlib.import_module(f"{__package__}.wraps")  # not sooner: it imports the host
    wraps.apply()


@functools.cache
def current() -> Library:
    """The library of this process.

    Raises:
        ImportError: it is not one of ours.
    """
    return Library(library_path())


def library_path() -> str:
    """The name by which the host opened its llama.cpp library."""
    host: Any = importlib.import_module("llama_cpp.llama_cpp")
    return str(host._lib._name)


def folder() -> Path:
    """Where the host's library is, and ours beside it."""
    return Path(library_path()).parent


def _check_build() -> None:
    """`ds4-mtp install-engine` placed a copy, and this package was installed anew since: refuse to be half of each."""
    theirs = Path(library_path())
    ours = LIBRARY_DIR / theirs.name
    if _CHOICE in os.environ or not ours.is_file() or ours.samefile(theirs):
        return
    if not filecmp.cmp(theirs, ours, shallow=False):
        raise ImportError(
            f"llama_cpp runs on {theirs}, an engine of ds4_mtp_plugin of another build than this one's, {ours}: run "
            "'ds4-mtp install-engine' again, or 'ds4-mtp install-engine --undo' and import ds4_mtp_plugin before "
            "llama_cpp"
        )


def _import_host() -> None:
    given = os.environ.get(_CHOICE)
    ours = given is None and any(LIBRARY_DIR.glob("*llama.*"))
    if ours:
        # For the import alone: a process of another environment that is started from here chooses for itself. What
        # is pickled here brings the choice along (wraps.reduce_ex).
        os.environ[_CHOICE] = str(LIBRARY_DIR)
    try:
        importlib.import_module("llama_cpp")
    except ModuleNotFoundError as err:
        if err.name != "llama_cpp":
            raise
        raise ImportError(f"ds4_mtp_plugin needs llama-cpp-python {HOST_VERSION}: {INSTALL_HOST}") from None
    except (FileNotFoundError, RuntimeError, AttributeError) as err:
        raise ImportError(
            f"llama_cpp could not load its library from {given or LIBRARY_DIR} ({err}). "
            + (
                f"Unset {_CHOICE}, so that ds4_mtp_plugin's own library is used."
                if given not in (None, str(LIBRARY_DIR))
                else f"ds4_mtp_plugin's library belongs in {LIBRARY_DIR}: reinstall ds4_mtp_plugin."
            )
        ) from err
    finally:
        if ours:
            os.environ.pop(_CHOICE, None)
