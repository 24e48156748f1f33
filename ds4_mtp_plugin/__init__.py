"""Speculative decoding in llama-cpp-python: DeepSeek-V4 models with their MTP head, any model with its own text.

Import this before ``llama_cpp``: the host then loads the llama.cpp library that this package brings.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["MtpDraft", "MtpStats", "NgramDraft", "__version__"]

#: Why the package does not work here, None where it does. `ds4-mtp doctor` and `install-engine` are there to mend it,
#: so importing the package succeeds and using it says why it cannot.
import_error: ImportError | None = None

try:
    from .host import ready

    ready()  # before anything imports the host

    from .draft import MtpDraft, NgramDraft
    from .stats import MtpStats
except ImportError as _err:
    import_error = _err


def __getattr__(name: str) -> Any:
    if import_error is not None and name in __all__:
        raise import_error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
