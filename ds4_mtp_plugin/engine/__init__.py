"""The engine room: the patched llama.cpp through cffi. Knows nothing of the host runtime or of speculation."""

from .context import (
    HIDDEN_ALL,
    HIDDEN_OFF,
    HIDDEN_OUTPUTS,
    Batch,
    Best,
    Context,
    DecodeAborted,
    DecodeError,
    EngineError,
    Floats,
    Memory,
    Model,
    NoSuchRow,
)
from .library import ABI, LIBRARY_DIR, ROLLBACK_ANY, ROLLBACK_COPIES, ROLLBACK_RECENT, ROLLBACK_SAVED, Library, ffi

__all__ = [
    "ABI",
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
    "Library",
    "Memory",
    "Model",
    "NoSuchRow",
    "ffi",
]
