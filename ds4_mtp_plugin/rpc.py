"""Layers on other machines, over llama.cpp's RPC: ``add_servers(["host:port"])`` before a Llama is made.

A server is ``ds4-mtp rpc-server`` on the other machine. Which layers lie there is the Llama's ``n_gpu_layers`` and
``tensor_split``: servers are the first of its devices, this machine's GPUs come behind them.
"""

from __future__ import annotations

from collections.abc import Iterable

from . import options
from .engine.rpc import Device, memory
from .host import servers
from .host.library import current as library

__all__ = ["Device", "add_servers", "devices", "remove_servers"]


def add_servers(endpoints: Iterable[str]) -> None:
    """Give the servers at `endpoints` ("host:port") to every Llama that is made from now on in this process.

    One that was added already keeps its place. ``DS4_MTP_RPC_SERVERS`` adds servers too, which are then the first.

    Raises:
        EngineError: a server offers nothing, or the engine was built without RPC.
        ValueError: an endpoint is not "host:port".
    """
    if isinstance(endpoints, str):
        raise TypeError(f"add_servers: endpoints is {endpoints!r}, expected a list: add_servers([{endpoints!r}])")
    servers.add([options.endpoint(each) for each in endpoints])


def remove_servers() -> None:
    """Forget the servers that were added: those of a Llama that exists stay its own."""
    servers.clear()


def devices() -> list[Device]:
    """The devices of the servers, in the order of ``tensor_split``, each with its memory, for which it is asked."""
    return [device for server in servers.current() for device in memory(library(), server)]
