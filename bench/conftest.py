from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ds4_mtp_plugin  # noqa: F401

# isort: split
import pytest

TABLES: list[str] = []


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are written, and found again."""
    given = os.environ.get("DS4_BENCH_DIR")
    return Path(given) if given else tmp_path_factory.mktemp("bench")


@pytest.fixture
def table() -> Any:
    """Takes a table to be printed at the end of the run."""
    return TABLES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for each in TABLES:
        terminalreporter.write_line("")
        terminalreporter.write_line(each)
