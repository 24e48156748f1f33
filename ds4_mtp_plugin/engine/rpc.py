"""ggml's RPC backend (ggml/src/ggml-rpc): the devices of other machines, and this machine's for others.

Its functions are found through the registry of backends, so that it works where the backend is linked and where it is a
module. What is registered stays so for the process: a model that is loaded afterwards takes these devices first.
"""

from __future__ import annotations

import os
import typing as _t
from dataclasses import dataclass

from .context import EngineError, naming_servers
from .library import Library, ffi

__all__ = ["Device", "add_server", "devices", "remove_server", "serve", "set_timeout"]

# enum ggml_backend_dev_type
_CPU, _GPU, _IGPU = 0, 1, 2


@dataclass(frozen=True)
class Device:
    """A device of a server.

    Attributes:
        endpoint: the server, "host:port".
        name: the engine's: "RPC0", "RPC1", ... in the order in which they were registered.
        free: bytes of its memory that are free now.
        total: bytes of its memory.
    """

    endpoint: str
    name: str
    free: int
    total: int


def add_server(library: Library, endpoint: str) -> None:
    """Register the devices of the server at `endpoint` ("host:port"); nothing where they are already.

    Raises:
        EngineError: the engine has no RPC backend, or the server offers no device.
        ServerLost: there is no server, or it is of another version.
    """
    add = _function(library, "ggml_backend_rpc_add_server")
    if endpoint in (_endpoint(library, device) for device in _registered(library)):
        return
    with naming_servers(library):
        reg = add(endpoint.encode())
        if reg == ffi.NULL:
            raise EngineError(f"the RPC server {endpoint} offers no device")
    library.lib.ggml_backend_register(reg)


def remove_server(library: Library, endpoint: str) -> None:
    """Take back what `add_server` registered; nothing where it is not. Models that are loaded stay where they are."""
    if endpoint in (_endpoint(library, device) for device in _registered(library)):
        # Asked again, the engine gives what it registered.
        library.lib.ggml_backend_unload(_function(library, "ggml_backend_rpc_add_server")(endpoint.encode()))


def set_timeout(library: Library, seconds: int) -> None:
    """How long a server may be silent before it is lost; 0 for no limit. For the servers that are in use too.

    Raises:
        EngineError: the engine has no RPC backend.
    """
    _function(library, "ggml_backend_rpc_set_limit")(seconds)


def devices(library: Library) -> list[Device]:
    """The registered devices, with their memory, for which each server is asked."""
    found = []
    for device in _registered(library):
        free, total = ffi.new("size_t *"), ffi.new("size_t *")
        library.lib.ggml_backend_dev_memory(device, free, total)
        name = ffi.string(library.lib.ggml_backend_dev_name(device)).decode()
        found.append(Device(_endpoint(library, device), name, int(free[0]), int(total[0])))
    return found


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
    lib = library.lib
    local = [
        device
        for device in (lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count()))
        if not _is_remote(library, device)
    ]
    gpus = [device for device in local if lib.ggml_backend_dev_type(device) in (_GPU, _IGPU)]
    offered = gpus or [device for device in local if lib.ggml_backend_dev_type(device) == _CPU]
    folder = ffi.NULL if cache is None else ffi.new("char[]", os.fsencode(cache))
    start(endpoint.encode(), folder, n_threads, len(offered), ffi.new("ggml_backend_dev_t[]", offered))
    raise EngineError(f"the engine could not serve at {endpoint} (it says on stderr why)")


def _function(library: Library, name: str) -> _t.Any:
    function = library.rpc_function(name)
    if function is None:
        raise EngineError(
            f"the engine {library.path} was built without the RPC backend: build it with CMAKE_ARGS=-DGGML_RPC=ON"
        )
    return function


def _registered(library: Library) -> list[_t.Any]:
    lib = library.lib
    every = (lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count()))
    return [device for device in every if _is_remote(library, device)]


def _is_remote(library: Library, device: _t.Any) -> bool:
    reg = library.lib.ggml_backend_dev_backend_reg(device)
    return bool(ffi.string(library.lib.ggml_backend_reg_name(reg)) == b"RPC")


def _endpoint(library: Library, device: _t.Any) -> str:
    return str(ffi.string(library.lib.ggml_backend_dev_description(device)).decode())
