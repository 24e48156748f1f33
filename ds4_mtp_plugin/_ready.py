"""One libllama for the host runtime and for us: chosen before the host is imported, checked after."""

from __future__ import annotations

import importlib as _importlib
import importlib.metadata as _metadata
import os as _os
import sys as _sys

from .engine import LIBRARY_DIR as _LIBRARY_DIR
from .engine import Library as _Library

# The one whose internals host.py and session.py know.
_HOST_VERSION = "0.3.36"

# Without its own engine, and without leaving such a wheel in pip's cache for projects that want one with it.
_INSTALL_HOST = f"pip install --no-cache-dir llama-cpp-python=={_HOST_VERSION} -C wheel.cmake=false"


def ready() -> None:
    """Import the host on our library, check that it runs on it, and adopt it.

    Raises:
        ImportError: no host, another version of it, or a host that runs on another llama.cpp; the message says how
            to mend it.
    """
    if "llama_cpp" not in _sys.modules:
        # Children of this process inherit the choice, so that a Llama unpickles there too.
        if any(_LIBRARY_DIR.glob("*llama.*")):
            _os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(_LIBRARY_DIR))
        if any(_LIBRARY_DIR.glob("*mtmd.*")):
            _os.environ.setdefault("MTMD_CPP_LIB", str(_LIBRARY_DIR))
        try:
            _importlib.import_module("llama_cpp")
        except ModuleNotFoundError as err:
            if err.name != "llama_cpp":
                raise
            raise ImportError(f"ds4_mtp_plugin needs llama-cpp-python {_HOST_VERSION}: {_INSTALL_HOST}") from None
        except (FileNotFoundError, RuntimeError, AttributeError) as err:
            where = _os.environ.get("LLAMA_CPP_LIB_PATH")
            raise ImportError(
                f"llama_cpp could not load its library from {where or 'its own folder'} ({err}). "
                + (
                    "Unset LLAMA_CPP_LIB_PATH, so that ds4_mtp_plugin's own library is used."
                    if where not in (None, str(_LIBRARY_DIR))
                    else f"ds4_mtp_plugin's library belongs in {_LIBRARY_DIR}: reinstall ds4_mtp_plugin."
                )
            ) from err
    version = _metadata.version("llama-cpp-python")
    if version != _HOST_VERSION:
        raise ImportError(
            f"llama-cpp-python {version} is installed, this ds4_mtp_plugin works with {_HOST_VERSION} alone: "
            f"{_INSTALL_HOST}"
        )
    host = _importlib.import_module(f"{__package__}.host")
    host.adopt(_Library(host.library_path()))
