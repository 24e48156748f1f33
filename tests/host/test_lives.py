"""Two Llamas in two threads, Llamas freed beside others, many in turn, and Ctrl-C: see lives.py, which does it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import LONG
from tests.fixtures.planted import BY_CONTEXT, Planted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def live(plant: Callable[..., Planted]) -> Callable[[str, int], dict[str, Any]]:
    files = plant(**BY_CONTEXT)

    def live(case: str, n: int) -> dict[str, Any]:
        argv = [sys.executable, "-m", "tests.host.lives", case, str(n), str(files.trunk), str(files.mtp)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=3600 if LONG else 300)
        assert done.returncode == 0, done.stderr[-3000:]
        # What Python says of an exception in a __del__; and of a Ctrl-C that comes while the host logs a line.
        assert "ignored" not in done.stderr or case == "interrupts"
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(found)
        return found

    return live


def test_two_llamas_in_two_threads(live: Callable[[str, int], dict[str, Any]]) -> None:
    found = live("two_threads", 200 if LONG else 8)
    for accepted, iters in zip(found["accepted"], found["iters"]):
        assert 0 < accepted < 2 * iters


def test_llamas_are_freed_while_another_generates(live: Callable[[str, int], dict[str, Any]]) -> None:
    found = live("freed", 500 if LONG else 20)
    assert found["texts"] > 1 and found["accepted"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_over_many_llamas(live: Callable[[str, int], dict[str, Any]]) -> None:
    found = live("rounds", 1000 if LONG else 48)
    assert found["accepted"] > found["rounds"]
    # A head's context, its smallest part, is more than that in all, and so is a page a round of the long mode.
    assert found["last"] - found["first"] < 1 << 20
    assert found["files"][0] == found["files"][1]
    assert found["threads"] < 4


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to itself")
def test_ctrl_c_and_another_generation(live: Callable[[str, int], dict[str, Any]]) -> None:
    found = live("interrupts", 2000 if LONG else 20)
    assert found["in the middle"] > found["interrupts"] // 2
    assert found["accepted"] > 0
    assert found["gave up"] == 0


@pytest.mark.parametrize("case", ["lines", "rests", "resumed"])
def test_an_interrupt_at_any_line_and_another_generation(live: Callable[[str, int], dict[str, Any]], case: str) -> None:
    """What a signal at a random moment meets once in thousands of times."""
    found = live(case, 4000 if LONG else 100)
    assert found["places"] > 30
    assert found["gave up"] == 0
    assert found["resumed"] > 50 * 256 or case != "resumed"
