"""Time to the first token of prompts that share a beginning: what an agent, a chat or an editor waits for.

    python -m pytest bench/test_prefix.py

Models and contenders are those of test_decode.py. Every contender has one conversation at a time, as an app has it:
each prompt goes on from whatever its Llama, or its server, kept of those before.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.contest import Contender
from bench.server import BINARY, ServerContender
from bench.test_decode import ROUNDS, THREADS
from ds4_mtp_plugin import MtpDraft
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from ds4_mtp_plugin.cli.prefix import conversation
from tests.fixtures.planted import BENCH, planted


@pytest.mark.parametrize(
    ("model", "n"), [("mini", 1000), ("mini", 4000), ("mini", 16000), ("500 MB", 1000), ("500 MB", 4000)]
)
def test_prefix(table: Callable[[str], None], directory: Path, model: str, n: int) -> None:
    trunk, mtp = BASE, HEAD
    if model != "mini":
        files = planted(directory, config=BENCH, acceptance=0.8, quant="Q8_0")
        trunk, mtp = files.trunk, files.mtp
    field = [Contender("plain", dict), Contender("mtp", lambda: {"draft_model": MtpDraft(mtp)})]
    if BINARY in os.environ and n < 4096:  # the small model's own context, beyond which the server does not go
        field.append(ServerContender("server k=1", mtp, 1, 0, directory / "server.log"))
    seconds: dict[str, list[list[float]]] = {}
    try:
        for each in field:
            each.load(trunk, n_ctx=n + 512, **THREADS)
        for turn in range(1 if n > 8000 else ROUNDS):
            for i, each in enumerate(field):
                text = np.random.default_rng(turn).integers(300, 2000, n + 100).tolist()
                for what, first, _ in conversation(each.continues, text, n):
                    seconds.setdefault(what, [[] for _ in field])[i].append(first)
    finally:
        for each in field:
            each.close()
    lines = [f"{model}, {n} tokens: seconds to the first token, medians of {len(seconds['first'][0])}"]
    lines.append(f"  {'':20} " + " ".join(f"{each.name:>10}" for each in field))
    for what, found in seconds.items():
        lines.append(f"  {what:20} " + " ".join(f"{statistics.median(each):10.2f}" for each in found))
    table("\n".join(lines))
