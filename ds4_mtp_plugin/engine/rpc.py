"""ggml's RPC backend (ggml/src/ggml-rpc): the devices of other machines, and this machine's for others.

Its functions are found through the registry of backends, so that it works where the backend is linked and where it is a
module. The devices of servers are not put into that registry, where they would be every model's for good: a model
is given them by name (``llama_model_params.devices``).
"""

from __future__ import annotations

import os
import typing as _t
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import EngineError, naming_servers
from .library import Library, ffi

__all__ = ["Device", "Server", "connect", "device_list", "local_gpus", "memory", "serve", "set_timeout"]

# enum ggml_backend_dev_type
_CPU, _GPU, _IGPU = 0, 1, 2


@dataclass(frozen=True)
class Server:
    """A server that answered.

    Attributes:
        endpoint: "host:port".
        devices: pointers to its devices, which live as long as the process.
        rows: the most rows that it computes as if each were alone: ANY_ROWS for a CPU with our kernels, 0 where it
            promises nothing.
        patchset: of its engine (`Library.patchset`), "" of one without our patches.
    """

    endpoint: str
    devices: tuple[_t.Any, ...]
    rows: int
    patchset: str


@dataclass(frozen=True)
class Device:
    """A device of a server.

    Attributes:
        endpoint: the server, "host:port".
        name: the engine's: "RPC0", "RPC1", ... in the order in which servers were first added.
        free: bytes of its memory that are free now.
        total: bytes of its memory.
    """

    endpoint: str
    name: str
    free: int
    total: int


def connect(library: Library, endpoint: str) -> Server:
    """The server at `endpoint` ("host:port"), which is asked for its devices.

    Raises:
        EngineError: the engine has no RPC backend, or the server offers no device.
        ServerLost: there is no server, or it speaks another version of the protocol.
    """
    lib = library.lib
    with naming_servers(library):
        reg = _function(library, "ggml_backend_rpc_add_server")(endpoint.encode())
        if reg == ffi.NULL:
            raise EngineError(f"the RPC server {endpoint} offers no device")
        devices = tuple(lib.ggml_backend_reg_dev_get(reg, i) for i in range(lib.ggml_backend_reg_dev_count(reg)))
        # The engine remembers devices, and the server may be gone since.
        if _function(library, "ggml_backend_rpc_unreachable")(devices[0]) != ffi.NULL:
            raise EngineError(f"the RPC server {endpoint} cannot be reached")
        patchset = _function(library, "ds4_mtp_rpc_patchset")(devices[0])
        if patchset == ffi.NULL:
            raise EngineError(f"the RPC server {endpoint} was lost")
        name = ffi.string(patchset).decode()
    rows = _function(library, "ds4_mtp_rpc_rows")
    return Server(endpoint, devices, min(int(rows(device)) for device in devices), name)


def set_timeout(library: Library, seconds: int) -> None:
    """How long a server may be silent before it is lost; 0 for no limit. For the servers that are in use too.

    Raises:
        EngineError: the engine has no RPC backend.
    """
    _function(library, "ggml_backend_rpc_set_limit")(seconds)


def memory(library: Library, server: Server) -> list[Device]:
    """The devices of a server with their memory, for which it is asked."""
    found = []
    for device in server.devices:
        free, total = ffi.new("size_t *"), ffi.new("size_t *")
        library.lib.ggml_backend_dev_memory(device, free, total)
        name = ffi.string(library.lib.ggml_backend_dev_name(device)).decode()
        found.append(Device(server.endpoint, name, int(free[0]), int(total[0])))
    return found


def local_gpus(library: Library) -> list[_t.Any]:
    """This machine's GPUs; integrated ones where there is no other, as the engine chooses (src/llama.cpp)."""
    return _registered(library, _GPU) or _registered(library, _IGPU)


def device_list(devices: Iterable[_t.Any]) -> _t.Any:
    """`devices` as ``llama_model_params.devices`` wants them; the caller keeps it while a model is loaded."""
    return ffi.new("ggml_backend_dev_t[]", [*devices, ffi.NULL])


def serve(library: Library, endpoint: str, *, cache: str | None, n_threads: int) -> _t.NoReturn:
    """Serve this machine's GPUs, or its CPU where it has none, at `endpoint` until the process is ended.

    Python's signal handlers do not run meanwhile.

    Args:
        cache: folder in which the server keeps large tensors of weights, so that a client need not send them again.
        n_threads: of the CPU.

    Raises:
        EngineError: the engine has no RPC backend, or could not listen (it says on stderr why).
    """
    start = _function(library, "ggml_backend_rpc_start_server")
    offered = local_gpus(library) or _registered(library, _CPU)
    folder = ffi.NULL if cache is None else ffi.new("char[]", os.fsencode(cache))
    start(endpoint.encode(), folder, n_threads, len(offered), ffi.new("ggml_backend_dev_t[]", offered))
    raise EngineError(f"the engine could not serve at {endpoint} (it says on stderr why)")


def _function(library: Library, name: str) -> _t.Any:
    function = library.rpc_function(name)
    if function is None:
        raise EngineError(
            f"the engine {library.path} has no RPC backend: build it with CMAKE_ARGS=-DGGML_RPC=ON (not on Windows)"
        )
    return function


def _registered(library: Library, kind: int) -> list[_t.Any]:
    lib = library.lib
    every = (lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count()))
    return [device for device in every if lib.ggml_backend_dev_type(device) == kind]
