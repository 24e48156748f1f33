"""MTP speculative decoding of DeepSeek-V4 models in llama-cpp-python.

Import this before ``llama_cpp``: the host then loads the llama.cpp library that this package brings.
"""

__version__ = "0.1.0"
__all__ = ["MtpDraft", "MtpStats", "__version__"]

from . import _ready as _ready_host  # makes the engine ready and adopts the host; must come first
from .draft import MtpDraft
from .stats import MtpStats

_ready_host.ready()
