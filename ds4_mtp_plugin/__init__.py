"""MTP speculative decoding of DeepSeek-V4 models in llama-cpp-python.

Import this before ``llama_cpp``: the host then loads the llama.cpp library that this package brings.
"""

import pathlib as _pathlib
import sys as _sys
import typing as _t

__version__ = "0.1.0"
__all__ = ["MtpDraft", "MtpStats", "__version__"]

_import_error: _t.Optional[ImportError] = None

try:
    from . import _ready as _ready

    _ready.ready()  # before anything imports the host

    from .draft import MtpDraft
    from .stats import MtpStats
except ImportError as _err:
    # The command says it in a line, and its doctor and install-engine are there to mend it.
    if _pathlib.PurePath(_sys.argv[0] if getattr(_sys, "argv", None) else "").stem != "ds4-mtp":
        raise
    _import_error = _err
