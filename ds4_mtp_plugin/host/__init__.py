"""The seam to llama-cpp-python, the only room that knows its internals (contract.py says which)."""

from .contract import HOST_VERSION, INSTALL_HOST
from .library import library_path, ready

__all__ = ["HOST_VERSION", "INSTALL_HOST", "library_path", "ready"]
