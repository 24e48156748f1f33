from __future__ import annotations

from collections.abc import Iterator

import pytest

from ds4_mtp_plugin import rpc
from ds4_mtp_plugin.host.library import current
from tests.models import llama, plant  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _an_engine_with_servers() -> None:
    if current().rpc_function("ggml_backend_rpc_start_server") is None:
        pytest.skip("this engine was built without RPC")


@pytest.fixture(autouse=True)
def _no_servers_afterwards() -> Iterator[None]:
    yield
    rpc.remove_servers()
