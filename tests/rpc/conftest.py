from __future__ import annotations

from collections.abc import Iterator

import pytest

from ds4_mtp_plugin import rpc
from tests.models import llama, plant  # noqa: F401


@pytest.fixture(autouse=True)
def _no_servers_afterwards() -> Iterator[None]:
    yield
    rpc.remove_servers()
