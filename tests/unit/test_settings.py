from __future__ import annotations

import pytest

from ds4_mtp_plugin import settings
from ds4_mtp_plugin.settings import Settings


def test_unset_empty_and_0_are_off() -> None:
    names = (
        "DS4_MTP_SPEC_DISABLE",
        "DS4_MTP_STRICT",
        "DS4_MTP_ACCEPT_REPORT",
        "DS4_MTP_SPEC_LOG",
        "DS4_MTP_CONTINUOUS",
    )
    assert Settings.of({}) == Settings.of(dict.fromkeys(names, "")) == Settings.of(dict.fromkeys(names, "0"))
    assert Settings.of({}) == Settings(disable=False, strict=False, report=False, log=False, margin=None)


def test_servers_are_endpoints_separated_by_commas() -> None:
    assert Settings.of({"DS4_MTP_RPC_SERVERS": "a:1,10.0.0.2:50052"}).rpc_servers == ("a:1", "10.0.0.2:50052")
    assert Settings.of({"DS4_MTP_RPC_SERVERS": ""}).rpc_servers == ()
    with pytest.raises(ValueError, match="DS4_MTP_RPC_SERVERS: RPC server 'a': expected host:port"):
        Settings.of({"DS4_MTP_RPC_SERVERS": "b:1,a"})


def test_anything_else_is_on() -> None:
    assert Settings.of({"DS4_MTP_SPEC_DISABLE": "1"}).disable
    assert Settings.of({"DS4_MTP_STRICT": "1"}).strict
    assert Settings.of({"DS4_MTP_ACCEPT_REPORT": "yes"}).report
    assert Settings.of({"DS4_MTP_SPEC_LOG": "1"}).log


def test_the_margin_is_a_number() -> None:
    assert Settings.of({"DS4_MTP_MIN_MARGIN": "3"}).margin == 3.0
    assert Settings.of({"DS4_MTP_MIN_MARGIN": "0"}).margin == 0.0  # off, also where the app gave one
    assert Settings.of({"DS4_MTP_MIN_MARGIN": ""}).margin is None
    for bad in ("three", "-1", "nan"):
        with pytest.raises(ValueError, match=f"DS4_MTP_MIN_MARGIN is '{bad}'"):
            Settings.of({"DS4_MTP_MIN_MARGIN": bad})


def test_it_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.current.cache_clear()
    try:
        monkeypatch.setenv("DS4_MTP_SPEC_LOG", "1")
        assert settings.current().log
        monkeypatch.setenv("DS4_MTP_SPEC_LOG", "0")
        assert settings.current().log
    finally:
        settings.current.cache_clear()
