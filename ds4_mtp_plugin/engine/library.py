"""Finding, opening and checking the one ``libllama`` of the process."""

from __future__ import annotations

import ctypes as _ctypes
import importlib.metadata as _metadata
import os as _os
import pathlib as _pathlib
import typing as _t

try:
    from ._declarations import ffi as _ffi
except ModuleNotFoundError as err:
    raise ModuleNotFoundError(f"ds4_mtp_plugin needs cffi, whose {err.name} is missing: pip install cffi") from None

# Must equal DS4_MTP_ABI of patches/src/ds4-mtp.h.
ABI = 10


def _library_dir() -> _pathlib.Path:
    """Where the build installed the libraries: in an editable install that is not beside these modules."""
    try:
        distribution = _metadata.distribution("ds4-mtp-plugin")
    except _metadata.PackageNotFoundError:
        return _pathlib.Path(__file__).resolve().parent.parent / "lib"
    return _pathlib.Path(str(distribution.locate_file("ds4_mtp_plugin/lib")))


LIBRARY_DIR = _library_dir()

ffi: _t.Any = _ffi

# enum ds4_mtp_rollback
ROLLBACK_RECENT, ROLLBACK_ANY, ROLLBACK_SAVED, ROLLBACK_COPIES = 1, 2, 3, 4

#: INT32_MAX: as many rows as a CPU computes each as if it were alone, which are all that are ever verified.
ANY_ROWS = 2**31 - 1

# enum ds4_mtp_struct: every struct that crosses the interface by value.
_BY_VALUE = ("struct llama_model_params", "struct llama_context_params", "llama_batch")


class Library:
    """An open ``libllama`` with our patches in it.

    Attributes:
        path: the name that it was opened by.
        lib: cffi's library object.
        patchset: hash over the patches that it was built with.
    """

    def __init__(self, path: str) -> None:
        """Open `path` and check that it is ours.

        A library that the process already holds under this name is shared, not loaded again (``dlopen`` counts
        references by file), so opening what the host runtime opened gives the host's own contexts and models.

        Raises:
            ImportError: no such library, one without our patches, or one whose interface differs from this
                binding's; the message says what was found and how to mend it.
        """
        self.path = path
        try:
            self.lib: _t.Any = ffi.dlopen(path)
        except OSError as err:
            raise ImportError(
                f"cannot open the engine {path}: {err}. Reinstall ds4_mtp_plugin ('pip install .' in its source)."
            ) from err
        try:
            abi = int(self.lib.ds4_mtp_abi())
        except (AttributeError, ffi.error):
            raise ImportError(
                f"the llama.cpp library {path} does not carry the patches of ds4_mtp_plugin. One process can hold only "
                "one llama.cpp: import ds4_mtp_plugin before llama_cpp (so that both use the library installed in "
                f"{LIBRARY_DIR}), and leave LLAMA_CPP_LIB_PATH unset."
            ) from None
        if abi != ABI:
            raise ImportError(
                f"{path} has version {abi} of the plugin's C interface, this ds4_mtp_plugin expects {ABI}: the library "
                "is from another version of the plugin. Reinstall ds4_mtp_plugin, or run 'ds4-mtp install-engine' "
                "again if that has placed it."
            )
        for which, name in enumerate(_BY_VALUE):
            theirs, ours = int(self.lib.ds4_mtp_sizeof(which)), int(ffi.sizeof(name))
            if theirs != ours:
                raise ImportError(
                    f"{path}: '{name}' has {theirs} bytes, this ds4_mtp_plugin expects {ours}: the library was built "
                    "from another llama.cpp. Reinstall ds4_mtp_plugin."
                )
        self.patchset: str = ffi.string(self.lib.ds4_mtp_patchset()).decode()

    @property
    def version(self) -> str:
        """llama.cpp's own version of this library."""
        return str(ffi.string(self.lib.llama_version()).decode())

    @property
    def gpu_rows(self) -> int:
        """The most rows that every GPU at hand computes as if each were alone: 0 where one promises nothing."""
        return int(self.lib.ds4_mtp_gpu_rows())

    @property
    def has_gpu(self) -> bool:
        """Whether a backend has found a GPU."""
        return self.gpu_rows != ANY_ROWS

    def rollback(self, model: _t.Any) -> int:
        """Which rows the memory of a model's contexts can take back: a ROLLBACK_ constant, or 0 for none.

        Args:
            model: a pointer or an address.
        """
        return int(self.lib.ds4_mtp_rollback(ffi.cast("struct llama_model *", model)))

    def lost(self, model: _t.Any) -> str | None:
        """Why a server (RPC) that holds a part of a model is lost, named; None while none is.

        Args:
            model: a pointer or an address.
        """
        why = self.lib.ds4_mtp_lost(ffi.cast("struct llama_model *", model))
        return None if why == ffi.NULL else str(ffi.string(why).decode())

    def losses(self) -> tuple[int, str]:
        """How often a server (RPC) was lost or could not be reached in this process, and why the last time."""
        function = self.rpc_function("ggml_backend_rpc_last_loss")
        if function is None:
            return 0, ""
        n = ffi.new("uint64_t *")
        why = str(ffi.string(function(n)).decode())
        return int(n[0]), why

    def rpc_function(self, name: str) -> _t.Any | None:
        """A function of ggml-rpc.h, from the registry, as the backend may be a module; None where it was not built.

        None on Windows too, which does not look for ggml's functions behind libllama.
        """
        try:
            reg = self.lib.ggml_backend_reg_by_name(b"RPC")
        except ffi.error:
            return None
        if reg == ffi.NULL:
            return None
        return ffi.cast(f"{name}_t", self.lib.ggml_backend_reg_get_proc_address(reg, name.encode()))

    @property
    def compiler(self) -> str:
        """Name and version of the compiler that built this library."""
        return str(ffi.string(self.lib.ds4_mtp_compiler()).decode())

    @property
    def system_info(self) -> str:
        """llama.cpp's line on backends and CPU features."""
        return str(ffi.string(self.lib.llama_print_system_info()).decode())

    def modules(self) -> dict[str, bool]:
        """The backends in libraries of their own beside this one ("cpu-haswell", "cuda"), and whether each is loaded.

        Where they are modules (GGML_BACKEND_DL) the engine takes the best of several for this CPU, and none that
        cannot be loaded. On Windows: nothing, for want of a way to ask what is loaded.
        """
        self.lib.llama_print_system_info()  # the first question loads them
        paths = sorted(_pathlib.Path(self.path).parent.glob("libggml-*"))
        names = {path: path.stem.removeprefix("libggml-") for path in paths}
        return {name: _is_loaded(path) for path, name in names.items() if name != "base"}


def _is_loaded(path: _pathlib.Path) -> bool:
    try:
        # Not cffi: there is no message where a library is not loaded, and cffi crashes for want of it.
        _ctypes.CDLL(str(path), _os.RTLD_NOW | _os.RTLD_NOLOAD)
    except OSError:
        return False
    return True
