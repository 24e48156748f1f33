"""Servers are added, listed and started as they are asked for."""

from __future__ import annotations

import pytest

from ds4_mtp_plugin import rpc
from tests.rpc.servers import Server


def test_a_server_that_was_added_is_listed_once() -> None:
    with Server() as server:
        rpc.add_servers([server.endpoint])
        rpc.add_servers([server.endpoint])
        [device] = [each for each in rpc.devices() if each.endpoint == server.endpoint]
    assert 0 < device.free <= device.total


@pytest.mark.parametrize("text", ["", "host", "host:", ":50052", "host:0", "host:65536", "host:x", "::1:50052"])
def test_what_is_no_endpoint_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port") as error:
        rpc.add_servers([text])
    assert repr(text) in str(error.value)
