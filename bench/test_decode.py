"""Decoding speed of plain, speculative and the host's stock drafting, as ratios within a run.

    python -m pytest bench --benchmark-json=bench/results/NAME.json

The planted model of half a gigabyte is written to DS4_BENCH_DIR (default: pytest's own folder; a minute). Where
DS4_LLAMA_SERVER names a ``llama-server`` (``python -m bench.device.prepare --cpu`` builds one on the same engine), that
takes part, plainly and with its own drafting.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.contest import Contender, Contest, contenders, render
from bench.server import BINARY, ServerContender
from ds4_mtp_plugin import MtpDraft, NgramDraft
from ds4_mtp_plugin.cli.demo import BASE, DSPARK, HEAD
from tests.fixtures.dspark_gguf import write_dspark
from tests.fixtures.mtp_gguf import FAMILIES, HALF_A_GIGABYTE, plant
from tests.fixtures.planted import BENCH, planted

ROUNDS = int(os.environ.get("DS4_BENCH_ROUNDS", "5"))

# The same for every contender and every decode. By the host's default a single row runs on half the cores and a verify
# on all of them, which is worth more than most drafts.
THREADS = {"n_threads": os.cpu_count(), "n_threads_batch": os.cpu_count()}

_FILE = """import os
import sys


def read_lines(path):
    with open(path) as f:
        return [line.rstrip() for line in f]


def write_lines(path, lines):
    with open(path, 'w') as f:
        for line in lines:
            f.write(line + os.linesep)


def main():
    lines = read_lines(sys.argv[1])
    lines.sort(key=str.lower)
    write_lines(sys.argv[2], lines)


if __name__ == '__main__':
    main()
"""
_RECORDS = "".join(
    f'    {{"id": {i}, "name": "item {i}", "tags": ["small", "red"], "price": {3 * i}.50, "in_stock": true}},\n'
    for i in range(1, 9)
)

PROMPTS = {
    "code": "import os\n\n\ndef read_lines(path):\n    ",
    "prose": "This module implements a number of functions that",
    "an edit": f"{_FILE}\n\n# The same, with the lines in reverse:\nimport os\nimport sys\n",
    "json": f'{{"items": [\n{_RECORDS}    {{"id": 9,',
}


def field(mtp: Path | None, directory: Path) -> list[Contender]:
    """All contenders, llama.cpp's own server among them where there is one."""
    servers = [
        ServerContender(f"server k={k}" if k else "server plain", mtp, k, 0, directory / f"server-{k}.log")
        for k in (0, 1, 3)
        if BINARY in os.environ
    ]
    return [*contenders(mtp), *servers]


def of_block(head: Path, directory: Path) -> list[Contender]:
    """Contenders with a DSpark head, of which the server verifies whole blocks."""
    ours = [
        Contender("dspark", lambda: {"draft_model": MtpDraft(head)}),
        Contender("dspark k=3", lambda: {"draft_model": MtpDraft(head, num_pred_tokens=3)}),
        Contender("dspark k=5", lambda: {"draft_model": MtpDraft(head, num_pred_tokens=5)}),
    ]
    if BINARY in os.environ:
        ours.append(ServerContender("server dspark", head, 5, 0, directory / "server-dspark.log", "draft-dspark"))
    return ours


def measure(benchmark: Any, table: Callable[[str], None], title: str, contest: Contest) -> None:
    try:
        contest.round()  # warm-up: weights into memory, graphs built
        for each in contest.field:
            each.seconds.clear()
            each.first.clear()
        benchmark.pedantic(contest.round, rounds=ROUNDS)
        results = contest.results()
    finally:
        contest.close()
    benchmark.extra_info.update(results)
    table(render(title, results))
    ours = ("mtp", "automatic", "n-grams", "dspark")
    assert all(row.get("same_text", True) for name, row in results.items() if name.startswith(ours))


@pytest.mark.parametrize("acceptance", [0.9, 0.8, 0.5, 0.0])
def test_planted_half_a_gigabyte(
    benchmark: Any, table: Callable[[str], None], directory: Path, acceptance: float
) -> None:
    files = planted(directory, config=BENCH, acceptance=acceptance, quant="Q8_0")
    prompt = files.cycle[:64].tolist()
    contest = Contest(files.trunk, field(files.mtp, directory), prompt, 128, n_ctx=1024, **THREADS)
    measure(benchmark, table, f"planted, 500 MB of Q8_0, acceptance {acceptance}, 128 tokens", contest)


def test_planted_hybrid(benchmark: Any, table: Callable[[str], None], directory: Path) -> None:
    """A head in the model's file that attends over everything, beside recurrent layers."""
    files = plant(directory, "qwen35", family=HALF_A_GIGABYTE)
    contest = Contest(files.trunk, field(None, directory), files.prompt(64), 128, n_ctx=1024, **THREADS)
    measure(benchmark, table, "planted hybrid (qwen35), 500 MB of Q8_0, 128 tokens", contest)


@pytest.mark.parametrize("n", [1000, 8000])
def test_first_token_of_a_hybrid(benchmark: Any, table: Callable[[str], None], directory: Path, n: int) -> None:
    """What a head that attends over everything costs a prompt; the long one is a small model's."""
    small = FAMILIES["qwen35"]
    family = HALF_A_GIGABYTE if n < 8000 else replace(small, keys={**small.keys, "context_length": 2 * n})
    files = plant(directory, "qwen35", family=family)
    both = [
        Contender("plain", dict),
        Contender("plain again", dict),
        Contender("automatic", lambda: {"draft_model": MtpDraft(checkpoints_mb=0)}),
        *(each for each in field(None, directory) if isinstance(each, ServerContender)),
    ]
    contest = Contest(files.trunk, both, files.prompt(n), 2, n_ctx=n + 64, **THREADS)
    size = "500 MB" if n < 8000 else "2 MB"
    measure(benchmark, table, f"planted hybrid (qwen35), {size}, the first token behind {n} ('first')", contest)


@pytest.mark.parametrize("noise", [0.02, 0.1, 1.0])
def test_planted_with_a_dspark_head(
    benchmark: Any, table: Callable[[str], None], directory: Path, noise: float
) -> None:
    files = planted(directory, config=BENCH, quant="Q8_0")
    head = write_dspark(directory / f"dspark-{noise}.gguf", files, BENCH, noise=noise)
    field = [Contender("plain", dict), *of_block(head, directory)]
    contest = Contest(files.trunk, field, files.cycle[:64].tolist(), 128, n_ctx=1024, **THREADS)
    measure(benchmark, table, f"planted, 500 MB of Q8_0, DSpark head with noise {noise}, 128 tokens", contest)


@pytest.mark.parametrize("name", PROMPTS)
def test_mini(benchmark: Any, table: Callable[[str], None], directory: Path, name: str) -> None:
    both = [*field(HEAD, directory), *of_block(DSPARK, directory)]
    contest = Contest(BASE, both, PROMPTS[name], 256, n_ctx=1536, **THREADS)
    measure(benchmark, table, f"ds4-mini, {name}, 256 tokens", contest)


@pytest.mark.parametrize("name", ["code", "prose"])
def test_mini_at_a_temperature(benchmark: Any, table: Callable[[str], None], directory: Path, name: str) -> None:
    contest = Contest(BASE, contenders(HEAD), PROMPTS[name], 256, temperature=0.8, n_ctx=1536, **THREADS)
    measure(benchmark, table, f"ds4-mini, {name}, temperature 0.8, 256 tokens", contest)


@pytest.mark.parametrize("n", [16, 1000, 8000])
def test_first_token(benchmark: Any, table: Callable[[str], None], n: int) -> None:
    """What of a draft costs a prompt; without checkpoints, from which the same prompt would go on."""
    field = [
        Contender("plain", dict),
        Contender("plain again", dict),
        Contender("automatic", lambda: {"draft_model": MtpDraft(HEAD, checkpoints_mb=0)}),
        Contender("n-grams alone", lambda: {"draft_model": NgramDraft(checkpoints_mb=0)}),
    ]
    prompt = np.random.default_rng(n).integers(300, 2000, n).tolist()
    contest = Contest(BASE, field, prompt, 2, n_ctx=n + 16, **THREADS)
    measure(benchmark, table, f"ds4-mini, the first token behind {n} ('first': its time, to plain's)", contest)


def test_drafting_nothing(benchmark: Any, table: Callable[[str], None], directory: Path) -> None:
    """A head that is never right, over 1,000 tokens, and a draft that is there and not used."""
    files = planted(directory, config=BENCH, acceptance=0.0, quant="Q8_0")
    field = [
        Contender("plain", dict),
        Contender("automatic", lambda: {"draft_model": MtpDraft(files.mtp)}),
        Contender("no drafts", lambda: {"draft_model": MtpDraft(files.mtp, num_pred_tokens=0)}),
        TakenOff("taken off", lambda: {"draft_model": MtpDraft(files.mtp)}),
        Contender("n-grams alone", lambda: {"draft_model": NgramDraft()}),
    ]
    contest = Contest(files.trunk, field, files.cycle[:64].tolist(), 1000, n_ctx=1536, **THREADS)
    measure(benchmark, table, "planted, 500 MB of Q8_0, nothing to draft, 1000 tokens", contest)


def test_a_stream_that_switches(benchmark: Any, table: Callable[[str], None], directory: Path) -> None:
    """From drafts that are nearly all right to none, and back: beside whoever knew which depth each part wants."""
    length, n_phases = 250, 4
    files = planted(directory, config=BENCH, phases=(length, 0.9, 0.0), quant="Q8_0")
    field = [each for each in contenders(files.mtp) if each.name.startswith(("plain", "automatic", "mtp"))]
    options = {"n_ctx": length * n_phases + 64, **THREADS}
    contest = Contest(files.trunk, field, files.cycle[:2].tolist(), length * n_phases - 2, **options)
    measure(benchmark, table, f"planted, 500 MB of Q8_0, acceptance 0.9 and 0 in turns of {length} tokens", contest)

    def seconds(each: Contender) -> Any:
        """Median seconds of each phase, the last rounds' (the first was a warm-up)."""
        ends = [0, *(length * (i + 1) - 3 for i in range(n_phases))]
        return np.median([np.diff(np.take(at, ends)) for at in each.stamps[1:]], axis=0)

    phases = {each.name: seconds(each) for each in field}
    known = np.min([of for name, of in phases.items() if name != "automatic"], axis=0)
    benchmark.extra_info["phases"] = {name: of.tolist() for name, of in phases.items()}
    lines = [f"  {name:14} " + " ".join(f"{s:6.2f}" for s in of) for name, of in phases.items()]
    share = known.sum() / phases["automatic"].sum()
    table("\n".join(["seconds per phase", *lines, f"  the best of each over automatic: {share:.3f}"]))


class TakenOff(Contender):
    """The app takes its draft off the Llama."""

    def load(self, trunk: Path, **options: Any) -> None:
        super().load(trunk, **options)
        assert self.llm is not None
        self.llm.draft_model = None
