"""The servers of this process (RPC), and what a model that is loaded gets of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from ..engine import ANY_ROWS, rpc
from ..engine.library import ffi
from ..settings import current as settings
from .contract import ModelParams
from .library import current as library

__all__ = ["OtherBuild", "add", "current", "for_head", "place", "remove", "rows"]

_servers: dict[str, rpc.Server] = {}
# How many servers had been lost in this process when each was asked what it is.
_asked: dict[str, int] = {}


class OtherBuild(RuntimeWarning):
    """A server's engine is another build than this process's."""


def add(endpoints: Iterable[str]) -> None:
    """
    Raises:
        EngineError: a server offers nothing, or the engine was built without RPC.
        ServerLost: a server cannot be reached, or speaks another version of the protocol.

    Warns:
        OtherBuild: a server of another build works, but nothing was tried with it.
    """
    for endpoint in (*settings().rpc_servers, *endpoints):
        if endpoint not in _servers:
            _ask(endpoint)


def _ask(endpoint: str) -> None:
    if (timeout := settings().rpc_timeout) is not None:
        rpc.set_timeout(library(), timeout)
    _asked[endpoint], _ = library().losses()
    server = _servers[endpoint] = rpc.connect(library(), endpoint)
    if server.patchset != library().patchset:
        build = f"with patch set {server.patchset}" if server.patchset else "without this package's patches"
        warnings.warn(
            f"RPC server {endpoint}: its engine was built {build}, this side's with {library().patchset}: install the "
            "same version of ds4-mtp-plugin on both machines",
            OtherBuild,
            stacklevel=4,
        )


def remove(endpoints: Iterable[str] | None) -> None:
    for endpoint in tuple(_servers) if endpoints is None else endpoints:
        _servers.pop(endpoint, None)


def current() -> list[rpc.Server]:
    """In the order in which a model has them. Those that the environment names are looked for at the first question.

    Once one was lost all are asked again: what comes back may be another build.

    Raises:
        EngineError: as `add`.
    """
    add(())
    lost, _ = library().losses()
    for endpoint in tuple(_servers):
        if _asked[endpoint] != lost:
            _ask(endpoint)
    return list(_servers.values())


def rows(n_gpu_layers: int) -> int:
    """The most rows that all that computes layers of a model computes as if each were alone (ANY_ROWS: as the CPU)."""
    if n_gpu_layers == 0:
        return ANY_ROWS
    return min(library().gpu_rows, *(server.rows for server in current()), ANY_ROWS)


@contextlib.contextmanager
def place(params: ModelParams) -> Iterator[None]:
    """While the host loads a model with `params`: it has the servers' devices, unless it has devices already."""
    if params.n_gpu_layers == 0 or params.devices or not current():
        yield
        return
    devices = _devices()
    params.devices = int(ffi.cast("uintptr_t", devices))
    try:
        yield
    finally:
        params.devices = None


def for_head(n_gpu_layers: int, *, there: bool) -> dict[str, Any]:
    """Fields of ``llama_model_params`` by which a head lies on the servers (`there`), or beside them on this machine.

    A head makes one draft after the other, and each would wait for a server. Whoever has the fields keeps their arrays.
    """
    if n_gpu_layers == 0 or not current():
        return {}
    if there:
        return {"devices": _devices()}
    return {"devices": rpc.device_list(rpc.local_gpus(library())), "tensor_split": ffi.NULL, "main_gpu": 0}


def _devices() -> Any:
    """The servers' devices, and this machine's GPUs behind them."""
    remote = [device for server in current() for device in server.devices]
    return rpc.device_list([*remote, *rpc.local_gpus(library())])
