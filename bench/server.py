"""llama.cpp's own server as a contender: a process with one slot, asked over HTTP for the tokens behind a prompt."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contest import Contender
from ds4_mtp_plugin.host.library import folder

BINARY = "DS4_LLAMA_SERVER"  # the environment variable that names it


class ServerContender(Contender):
    """``llama-server``, at a depth above 0 with ``--spec-type`` `spec`; the same model files and options as a Llama.

    `head`: None for the one in the model's file. `rpc`: where its layers lie, its head staying here.

    The server's own clock is taken: from the first token to the last, no HTTP.
    """

    def __init__(
        self,
        name: str,
        head: Path | None,
        depth: int,
        n_gpu_layers: int,
        log: Path,
        spec: str = "draft-mtp",
        rpc: str = "",
    ) -> None:
        super().__init__(name, dict)
        self._gpu = str(999 if n_gpu_layers < 0 else n_gpu_layers)
        self._rpc = ["--rpc", rpc] if rpc else []
        self._draft: list[str] = []
        if depth:
            self._draft = ["--spec-type", spec, "--spec-draft-n-max", str(depth)]
            if head is not None:
                self._draft += ["--spec-draft-model", str(head), "--spec-draft-ngl", "0" if rpc else self._gpu]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._timings: dict[str, Any] = {}

    def load(self, trunk: Path, **options: Any) -> None:
        """Raises RuntimeError if the server ends instead of being ready; the end of its log says why."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [
            os.environ[BINARY],
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "-m",
            str(trunk),
            *self._rpc,
            *self._draft,
        ]
        command += ["-fa", "on" if options.get("flash_attn") else "off"]
        command += ["-ngl", self._gpu, "-c", str(options["n_ctx"]), "-np", "1", "--no-warmup", "--fit", "off"]
        if "n_threads" in options:
            command += ["-t", str(options["n_threads"]), "-tb", str(options["n_threads"])]
        # It has no libllama of its own.
        libraries = ":".join([str(folder()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
        env = {**os.environ, "LD_LIBRARY_PATH": libraries}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        while True:
            with contextlib.suppress(OSError):  # not listening yet, or 503 while it loads
                urllib.request.urlopen(f"{self._url}/health", timeout=5).close()
                return
            if self._process.poll() is not None:
                end = self._log.read_text(errors="replace")[-500:]
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}: {end}")
            time.sleep(0.1)

    def run(self, prompt: Sequence[int], n: int, temperature: float = 0.0) -> None:
        if temperature:
            raise RuntimeError("its samplers are its own")
        self._ask(prompt, n, cache=False)
        self.first.append(self._timings["prompt_ms"] / 1000)
        self.seconds.append(self._timings["predicted_ms"] / 1000)

    def continues(self, prompt: Sequence[int], n: int) -> tuple[float, list[int]]:
        """As the host's `generate`, which goes on from what it holds: seconds to the first token, and n tokens."""
        self._ask(prompt, n, cache=True)
        return self._timings["prompt_ms"] / 1000, self.text

    def _ask(self, prompt: Sequence[int], n: int, *, cache: bool) -> None:
        body = {"prompt": list(prompt), "n_predict": n, "temperature": 0, "samplers": ["temperature"]}
        body |= {"cache_prompt": cache, "ignore_eos": True, "return_tokens": True}
        request = urllib.request.Request(
            f"{self._url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                answer = json.load(response)
        except OSError as error:
            end = self._log.read_text(errors="replace")[-500:]
            raise RuntimeError(f"llama-server: {error}: {end}") from error
        self.text, self._timings = answer["tokens"], answer["timings"]

    def stats(self) -> dict[str, Any]:
        n, accepted = self._timings.get("predicted_n", 0), self._timings.get("draft_n_accepted")
        if accepted is None:
            return {}
        proposed = self._timings["draft_n"]
        return {
            "accepted": [round(accepted / max(1, proposed), 3)],
            "tokens_per_cycle": (n - 1) / max(1, n - 1 - accepted),
        }

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None
