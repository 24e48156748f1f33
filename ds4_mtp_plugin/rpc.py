"""Layers on other machines, over llama.cpp's RPC: ``add_servers([...])`` before a Llama is made.

A server is ``ds4-mtp rpc-server`` on the other machine. Which layers lie there is the Llama's ``n_gpu_layers`` and
``tensor_split``: servers come first among its devices.
"""

from __future__ import annotations

from collections.abc import Iterable

from .engine import ServerLost
from .engine import rpc as _rpc
from .engine.rpc import Device
from .host.library import current as _library

__all__ = ["Device", "ServerLost", "add_servers", "check_endpoint", "devices", "remove_servers", "set_timeout"]


def add_servers(endpoints: Iterable[str]) -> None:
    """Register the servers at `endpoints` ("host:port"), for every Llama that is made from now on in this process.

    One that is registered already stays as it is.

    Raises:
        EngineError: a server offers nothing, or the engine was built without RPC.
        ServerLost: a server cannot be reached, or is of another version.
        ValueError: an endpoint is not "host:port".
    """
    for endpoint in [check_endpoint(each) for each in endpoints]:
        _rpc.add_server(_library(), endpoint)


def remove_servers(endpoints: Iterable[str]) -> None:
    """Take servers back, for every Llama that is made from now on: one that is gone would fail to load there."""
    for endpoint in endpoints:
        _rpc.remove_server(_library(), endpoint)


def set_timeout(seconds: int) -> None:
    """How long a server may be silent (300 s at first) before it is lost (`ServerLost`); 0 for no limit.

    It has to be longer than a server takes for a batch of a prompt.

    Raises:
        EngineError: the engine was built without RPC.
        ValueError: `seconds` is negative.
    """
    if seconds < 0:
        raise ValueError(f"a timeout of {seconds} s, expected 0 (none) or more")
    _rpc.set_timeout(_library(), seconds)


def devices() -> list[Device]:
    """The devices of the servers that were added, with their memory."""
    return _rpc.devices(_library())


def check_endpoint(text: str) -> str:
    """`text`, which the engine reads as a name or an IPv4 address and a port.

    Raises:
        ValueError: it is not "host:port".
    """
    host, _, port = text.rpartition(":")
    if not host or ":" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(
            f"RPC server {text!r}: expected host:port, with a name or an IPv4 address and a port 1 to 65535"
        )
    return text
