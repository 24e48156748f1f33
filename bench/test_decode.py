"""Decoding speed of plain, speculative and the host's stock drafting, as ratios within a run.

    python -m pytest bench --benchmark-json=bench/results/NAME.json

The planted model of half a gigabyte is written to DS4_BENCH_DIR (default: pytest's own folder; a minute).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.contest import Contest, contenders, render
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from tests.fixtures.planted import BENCH, planted

ROUNDS = int(os.environ.get("DS4_BENCH_ROUNDS", "5"))

# The same for every contender and every decode. By the host's default a single row runs on half the cores and a verify
# on all of them, which is worth more than most drafts.
THREADS = {"n_threads": os.cpu_count(), "n_threads_batch": os.cpu_count()}

PROMPTS = {
    "code": "import os\n\n\ndef read_lines(path):\n    ",
    "prose": "This module implements a number of functions that",
}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("DS4_BENCH_DIR")
    return Path(given) if given else tmp_path_factory.mktemp("bench")


def measure(benchmark: Any, table: Callable[[str], None], title: str, contest: Contest) -> None:
    try:
        contest.round()  # warm-up: weights into memory, graphs built
        for each in contest.field:
            each.seconds.clear()
        benchmark.pedantic(contest.round, rounds=ROUNDS)
        results = contest.results()
    finally:
        contest.close()
    benchmark.extra_info.update(results)
    table(render(title, results))
    assert all(row.get("same_text", True) for name, row in results.items() if name.startswith("mtp"))


@pytest.mark.parametrize("acceptance", [0.8, 0.0])
def test_planted_half_a_gigabyte(
    benchmark: Any, table: Callable[[str], None], directory: Path, acceptance: float
) -> None:
    files = planted(directory, config=BENCH, acceptance=acceptance, quant="Q8_0")
    prompt = files.cycle[:64].tolist()
    contest = Contest(files.trunk, contenders(files.mtp), prompt, 128, n_ctx=1024, **THREADS)
    measure(benchmark, table, f"planted, 500 MB of Q8_0, acceptance {acceptance}, 128 tokens", contest)


@pytest.mark.parametrize("name", PROMPTS)
def test_mini(benchmark: Any, table: Callable[[str], None], name: str) -> None:
    contest = Contest(BASE, contenders(HEAD), PROMPTS[name], 256, n_ctx=1024, **THREADS)
    measure(benchmark, table, f"ds4-mini, {name}, 256 tokens", contest)
