"""RPC servers on this machine, each a process of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from ds4_mtp_plugin import host

_ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    """A port on the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Of a process that runs `ds4-mtp` as this one would, on the same engine."""
    search = os.pathsep.join([str(_ROOT), *sys.path])
    return {**os.environ, "PYTHONPATH": search, "LLAMA_CPP_LIB_PATH": str(Path(host.library_path()).parent)}


class Server:
    """``ds4-mtp rpc-server`` on a free loopback port, of the engine that this process runs on; listens once entered.

    Attributes:
        endpoint: "host:port", before it is entered too.
        process: once it is entered.
    """

    def __init__(self, *options: str, threads: int = 1, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.endpoint = f"127.0.0.1:{self.port}"
        self._options = (f"--port={self.port}", f"--threads={threads}", *options)

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "ds4_mtp_plugin", "rpc-server", *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment())
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
                return self
            status = self.process.poll()
            if status is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the RPC server at {self.endpoint} does not listen (exit status {status})")
            time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, as a machine that loses power does. Safe to call again."""
        self.process.kill()
        self.process.wait()
