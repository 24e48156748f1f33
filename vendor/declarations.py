"""Compile ``ds4_mtp_plugin/engine/cdef.txt`` into a module, so that no import has to parse it (0.1 s).

    python -m vendor.declarations

The module is committed: cffi's format of it has been the same since 1.0, and a build needs no cffi. A test holds it to
its source.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import cffi

ENGINE = Path(__file__).resolve().parents[1] / "ds4_mtp_plugin" / "engine"
MODULE = "_declarations"


def compiled() -> str:
    """The module's text."""
    ffi = cffi.FFI()
    ffi.cdef((ENGINE / "cdef.txt").read_text(encoding="utf-8"))
    ffi.set_source(MODULE, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{MODULE}.py"
        with contextlib.redirect_stdout(None):
            ffi.emit_python_code(str(path))
        text = path.read_text(encoding="utf-8")
    return text.replace("auto-generated file", "python -m vendor.declarations, of cdef.txt")


if __name__ == "__main__":
    (ENGINE / f"{MODULE}.py").write_text(compiled(), encoding="utf-8")
