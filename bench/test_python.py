"""What Python takes of a cycle: a generation's time less that of the engine's functions, each timed where it is called.

    python -m pytest bench/test_python.py

The model is as small as its vocabulary allows, DeepSeek-V4-Flash's, so that the engine leaves the caches alone and
copies of rows are of their full width. What is left of a plain token is the host's loop, of which a cycle has one
turn per token.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as host
import pytest
from llama_cpp import Llama

from bench.test_decode import THREADS
from ds4_mtp_plugin import MtpDraft
from ds4_mtp_plugin.host.library import current
from tests.fixtures.planted import FLASH, TINY, planted

# What the host's loop calls of the engine for a token.
_OF_THE_HOST = ("llama_decode", "llama_sampler_sample", "llama_get_logits_ith", "llama_get_logits")


class Watch:
    """Seconds spent in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            t0 = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - t0

        return timed


class Watched:
    """cffi's library object, with a watch over its functions."""

    def __init__(self, lib: Any, watch: Watch) -> None:
        self._lib, self._watch = lib, watch

    def __getattr__(self, name: str) -> Any:
        function = self._watch.over(getattr(self._lib, name))
        setattr(self, name, function)
        return function


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch = Watch()
    monkeypatch.setattr(current(), "lib", Watched(current().lib, watch))
    for name in _OF_THE_HOST:
        monkeypatch.setattr(host, name, watch.over(getattr(host, name)))
    yield watch


def test_python(table: Callable[[str], None], directory: Path, watch: Watch) -> None:
    files = planted(directory, config=dataclasses.replace(TINY, n_vocab=FLASH.n_vocab), acceptance=1.0, quant="Q8_0")
    prompt, n = files.cycle[:64].tolist(), 120
    lines = [f"microseconds of Python, {FLASH.n_vocab} tokens, all drafts right: median (least) of 6 times {n} tokens"]
    drafts: dict[str, Callable[[], MtpDraft | None]] = {
        "plain": lambda: None,
        "no drafts": lambda: MtpDraft(files.mtp, num_pred_tokens=0),
        **{f"k={k}": lambda k=k: MtpDraft(files.mtp, num_pred_tokens=k) for k in (1, 2, 3)},  # type: ignore[misc]
        "automatic": lambda: MtpDraft(files.mtp),
    }
    loop = 0.0
    for name, draft in drafts.items():
        llm = Llama(str(files.trunk), n_ctx=1024, verbose=False, draft_model=draft(), **THREADS)
        per_cycle: list[float] = []
        for _ in range(7):
            llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
            tokens = llm.generate(prompt, temp=0.0)
            next(tokens)
            stats, watch.seconds = getattr(llm.draft_model, "stats", None), 0.0
            t0 = time.perf_counter()
            for _ in range(n):
                next(tokens)
            left = 1e6 * (time.perf_counter() - t0 - watch.seconds)
            now = None if stats is None else llm.draft_model.stats.since(stats)  # type: ignore[union-attr]
            cycles = n if now is None else now.iters + now.plain
            per_cycle.append(left / cycles)
        del per_cycle[0]
        loop = loop or statistics.median(per_cycle)
        found, per_token = statistics.median(per_cycle), statistics.median(per_cycle) * cycles / n
        lines.append(
            f"  {name:10} {found:6.0f} ({min(per_cycle):.0f}) per cycle of {n / cycles:.2f} tokens, "
            f"{per_token:.0f} per token; beyond the host's loop {found - loop * n / cycles:.0f} per cycle"
        )
        llm.close()
    table("\n".join(lines))
