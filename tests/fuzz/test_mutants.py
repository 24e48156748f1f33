"""Damaged files by the hundred: one clear error or the plain text; no signal, no hang, no memory without end.

A seed that fails is run again, alone, by ``python -m tests.fuzz.run SEED``.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
from pathlib import Path

import pytest

from tests import LONG
from tests.fixtures.planted import BY_CONTEXT, planted
from tests.fuzz import mutants, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

#: Seeds from 0 on.
N_MUTANTS = 10_000 if LONG else 300


def test_every_mutant_is_refused_or_gives_the_plain_text(tmp_path: Path) -> None:
    results = list(run.run(range(N_MUTANTS), tmp_path))
    failed = [result for result in results if result.outcome not in run.ALLOWED]
    assert not failed, "\n".join(f"{each.seed}: {each.outcome}: {each.what}: {each.said[-300:]}" for each in failed)
    outcomes = collections.Counter(result.outcome for result in results)
    print(dict(outcomes))
    assert min(outcomes["text"], outcomes["refused"]) > N_MUTANTS / 10  # neither is all that is met
    # A worker lives through hundreds: nothing of a file that was refused, or ran, stays behind.
    assert max(result.rss for result in results) < 300 << 20


def test_a_process_that_dies_is_seen(tmp_path: Path) -> None:
    """By models that end a plain Llama too: the check passes them, for they are not the head's fault."""
    seed = 270
    files = planted(tmp_path / "sound", config=run.CONFIG, **BY_CONTEXT)
    with run.Worker(files.trunk, files.mtp, tmp_path) as worker:
        result = worker.run(seed, False)
    assert result.outcome == "SIGABRT" and "GGML_ASSERT" in result.said
    (result,) = run.run([seed], tmp_path)
    assert result.outcome == "plain dies too" and "rope.dimension_count" in result.what


def test_a_process_that_hangs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = planted(tmp_path / "sound", config=run.CONFIG, **BY_CONTEXT)
    with run.Worker(files.trunk, files.mtp, tmp_path) as worker:
        os.kill(worker._process.pid, signal.SIGSTOP)  # else it may answer sooner than it is asked for an answer
        monkeypatch.setattr(run, "TIME", 0.2)
        assert worker.run(1, True).outcome == "hang"


def test_what_is_not_changed_is_written_as_it_was(tmp_path: Path) -> None:
    files = planted(tmp_path, config=run.CONFIG)
    for path in (files.trunk, files.mtp):
        assert mutants.written(mutants.read(path)) == path.read_bytes()


def test_a_seed_is_a_mutant(tmp_path: Path) -> None:
    head = planted(tmp_path, config=run.CONFIG).mtp
    for seed in range(20):
        data, what = mutants.mutated(seed, head)
        assert (data, what) == mutants.mutated(seed, head)
        assert what and (data != head.read_bytes() or "nothing" in what or "=" in what)
