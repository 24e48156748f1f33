"""A server's connection as a test wants it: cut, stalled, or answered otherwise, at the request that it names."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

# ggml-rpc.cpp, enum rpc_cmd
ALLOC_BUFFER, BUFFER_GET_BASE, SET_TENSOR, GET_TENSOR = 0, 3, 6, 8
GRAPH_COMPUTE, HELLO, GRAPH_RECOMPUTE = 10, 14, 16

#: What a proxy does at a request: it is given both sockets, and the request goes on where it returns True.
Fault = Callable[[socket.socket, socket.socket], bool]

#: What a proxy makes of an answer, or of a part of one.
Edit = Callable[[bytes], bytes]


def cut(client: socket.socket, server: socket.socket) -> bool:
    """The connection ends in the middle of the request."""
    for side in (client, server):
        side.shutdown(socket.SHUT_RDWR)
    return False


def stall(client: socket.socket, server: socket.socket) -> bool:
    """From here on nothing comes through, and nobody says so."""
    return False


def garbage(client: socket.socket, server: socket.socket) -> bool:
    """The request is answered, but not by a server of this protocol."""
    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    return False


class Proxy:
    """Stands before a server: what comes to `endpoint` goes on to the server until a fault is due.

    Attributes:
        endpoint: "host:port".
        requests: of the clients so far, by their number in the protocol.
    """

    def __init__(self, port: int, edit: Edit = bytes) -> None:
        self.requests: list[int] = []
        self._server = port
        self._edit = edit
        self._fault: tuple[Fault, frozenset[int], int] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Proxy:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def on(self, fault: Fault, *requests: int, skip: int = 0) -> None:
        """`fault` is due at the next one of `requests` behind `skip` of them, once."""
        self._fault = fault, frozenset(requests), skip

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                self._open += (client, server)
                for run in (self._requests, self._answers):
                    self._threads.append(threading.Thread(target=run, args=(client, server)))
                    self._threads[-1].start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), client.makefile("rb") as stream:
            while head := stream.read(9):
                request, size = struct.unpack("<BQ", head)
                self.requests.append(request)
                if (fault := self._due(request)) is not None and not fault(client, server):
                    while stream.read1():
                        pass
                    break
                server.sendall(head + stream.read(size))
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(self._edit(data))
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _due(self, request: int) -> Fault | None:
        if self._fault is None or request not in self._fault[1]:
            return None
        fault, requests, skip = self._fault
        self._fault = None if skip == 0 else (fault, requests, skip - 1)
        return fault if skip == 0 else None
