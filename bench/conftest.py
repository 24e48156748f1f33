from __future__ import annotations

from typing import Any

import ds4_mtp_plugin  # noqa: F401

# isort: split
import pytest

TABLES: list[str] = []


@pytest.fixture
def table() -> Any:
    """Takes a table to be printed at the end of the run."""
    return TABLES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for each in TABLES:
        terminalreporter.write_line("")
        terminalreporter.write_line(each)
