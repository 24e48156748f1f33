"""MTP speculative decoding of DeepSeek-V4 models in llama-cpp-python.

Import this before ``llama_cpp``: the host then loads the llama.cpp library that this package brings.
"""

__version__ = "0.1.0"
__all__ = ["MtpDraft", "MtpStats", "__version__"]

from . import _ready as _ready

_ready.ready()  # before anything imports the host

from .draft import MtpDraft  # noqa: E402
from .stats import MtpStats  # noqa: E402
