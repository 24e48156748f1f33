"""Layers on other machines, over llama.cpp's RPC: ``add_servers(["host:port"])`` before a Llama is made.

A server is ``ds4-mtp rpc-server`` on the other machine. Which layers lie there is the Llama's ``n_gpu_layers`` and
``tensor_split``: servers are the first of its devices, this machine's GPUs come behind them.
"""

from __future__ import annotations

from collections.abc import Iterable

from . import options
from .engine import ServerLost
from .engine import rpc as _rpc
from .engine.rpc import Device
from .host import servers as _servers
from .host.library import current as _library
from .host.servers import OtherBuild
from .settings import current as _settings

__all__ = ["Device", "OtherBuild", "ServerLost", "add_servers", "devices", "remove_servers", "set_timeout"]


def add_servers(endpoints: Iterable[str]) -> None:
    """Give the servers at `endpoints` ("host:port") to every Llama that is made from now on in this process.

    One that was added already keeps its place. ``DS4_MTP_RPC_SERVERS`` adds servers too, which are then the first.

    Raises:
        EngineError: a server offers nothing, or the engine was built without RPC.
        ServerLost: a server cannot be reached, or speaks another version of the protocol.
        ValueError: an endpoint is not "host:port".

    Warns:
        OtherBuild: a server works, but its engine is of another build than this one.
    """
    if isinstance(endpoints, str):
        raise TypeError(f"add_servers: endpoints is {endpoints!r}, expected a list: add_servers([{endpoints!r}])")
    _servers.add([options.endpoint(each) for each in endpoints])


def remove_servers(endpoints: Iterable[str] | None = None) -> None:
    """Take servers back, by default all, for every Llama that is made from now on: with one that is gone, none loads.

    Those of the environment are looked for again with the next Llama.
    """
    _servers.remove(endpoints)


def set_timeout(seconds: int) -> None:
    """How long a server may be silent (300 s at first) before it is lost (`ServerLost`); 0 for no limit.

    It has to be longer than a server takes for a batch of a prompt. ``DS4_MTP_RPC_TIMEOUT`` overrides it.

    Raises:
        EngineError: the engine was built without RPC.
        ValueError: `seconds` is negative.
    """
    if seconds < 0:
        raise ValueError(f"a timeout of {seconds} s, expected 0 (none) or more")
    given = _settings().rpc_timeout
    _rpc.set_timeout(_library(), seconds if given is None else given)


def devices() -> list[Device]:
    """The devices of the servers, in the order of ``tensor_split``, each with its memory, for which it is asked."""
    return [device for server in _servers.current() for device in _rpc.memory(_library(), server)]
