"""A TCP proxy that makes the loopback as slow as a network, and counts what crosses it.

The delay is that of each way: bytes leave the proxy so long after they reached it, and do not wait for each other.
"""

from __future__ import annotations

import collections
import multiprocessing
import socket
import threading
import time
from multiprocessing.sharedctypes import SynchronizedArray
from types import TracebackType
from typing import NamedTuple

_CHUNK = 1 << 20


class Crossed(NamedTuple):
    """Bytes to the server and back, and how often the client waited for an answer: answers that followed a request."""

    up: int
    down: int
    answers: int

    def since(self, before: Crossed) -> Crossed:
        return Crossed(*(now - then for now, then in zip(self, before)))


class Proxy:
    """Stands before a port of this machine, as a process of its own, so that it takes no time of the client's threads.

    Attributes:
        endpoint: where it listens, "host:port".
    """

    def __init__(self, port: int, ms: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._counts = context.Array("Q", 4)
        listening, sending = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(port, ms / 1000, self._counts, sending), daemon=True)
        self._process.start()
        self.endpoint = f"127.0.0.1:{listening.recv()}"

    @property
    def crossed(self) -> Crossed:
        """What crossed it so far."""
        return Crossed(*self._counts[:3])

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()


def _run(
    port: int, delay: float, counts: SynchronizedArray[int], listening: multiprocessing.connection.Connection
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listening.send(server.getsockname()[1])
        while True:
            client, _ = server.accept()
            behind = socket.create_connection(("127.0.0.1", port))
            for each in (client, behind):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink, down in ((client, behind, False), (behind, client, True)):
                _Way(source, sink, delay, counts, down=down)


class _Way:
    """One direction of a connection: a thread that reads and one that writes."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, delay: float, counts: SynchronizedArray[int], *, down: bool
    ) -> None:
        self._source, self._sink, self._delay, self._counts, self._down = source, sink, delay, counts, down
        self._chunks: collections.deque[tuple[float, bytes]] = collections.deque()
        self._any = threading.Semaphore(0)
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        data = b"..."
        while data:
            try:
                data = self._source.recv(_CHUNK)
            except OSError:
                data = b""
            self._chunks.append((time.perf_counter() + self._delay, data))
            self._any.release()
            self._count(len(data))

    def _count(self, n: int) -> None:
        with self._counts.get_lock():
            self._counts[int(self._down)] += n
            # The fourth is whether a request is under way.
            self._counts[2] += int(self._down and self._counts[3])
            self._counts[3] = int(not self._down)

    def _write(self) -> None:
        while True:
            self._any.acquire()
            due, data = self._chunks.popleft()
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            try:
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._sink.sendall(data)
            except OSError:
                return
