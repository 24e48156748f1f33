"""The engine room: the patched llama.cpp through cffi. Knows nothing of the host runtime or of speculation."""

from .batch import Batch, Floats, HiddenRows
from .context import HIDDEN_ALL, HIDDEN_OFF, HIDDEN_OUTPUTS, Best, Context, Memory, Model
from .errors import DecodeAborted, DecodeError, EngineError, NoSuchRow, ServerLost, naming_servers
from .library import (
    ABI,
    ANY_ROWS,
    LIBRARY_DIR,
    ROLLBACK_ANY,
    ROLLBACK_COPIES,
    ROLLBACK_RECENT,
    ROLLBACK_SAVED,
    Library,
    ffi,
)

__all__ = [
    "ABI",
    "ANY_ROWS",
    "HIDDEN_ALL",
    "HIDDEN_OFF",
    "HIDDEN_OUTPUTS",
    "LIBRARY_DIR",
    "ROLLBACK_ANY",
    "ROLLBACK_COPIES",
    "ROLLBACK_RECENT",
    "ROLLBACK_SAVED",
    "Batch",
    "Best",
    "Context",
    "DecodeAborted",
    "DecodeError",
    "EngineError",
    "Floats",
    "HiddenRows",
    "Library",
    "Memory",
    "Model",
    "NoSuchRow",
    "ServerLost",
    "ffi",
    "naming_servers",
]
