"""Servers are started, added and listed as they are asked for."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import cli, rpc, settings
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from ds4_mtp_plugin.host.library import current
from tests.fixtures.planted import Planted
from tests.rpc.proxy import GRAPH_COMPUTE, GRAPH_RECOMPUTE, Proxy, cut
from tests.rpc.servers import Server, environment, free_port


def free(server: Server) -> int:
    [device] = [each for each in rpc.devices() if each.endpoint == server.endpoint]
    return device.free


def test_a_server_that_was_added_is_listed_once() -> None:
    with Server() as server:
        rpc.add_servers([server.endpoint])
        rpc.add_servers([server.endpoint])
        [device] = rpc.devices()
    assert device.endpoint == server.endpoint and 0 < device.free <= device.total


def test_the_environment_adds_servers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as first, Server() as second:
        monkeypatch.setenv("DS4_MTP_RPC_SERVERS", f"{first.endpoint},{second.endpoint}")
        settings.current.cache_clear()
        assert [device.endpoint for device in rpc.devices()] == [first.endpoint, second.endpoint]
        monkeypatch.undo()
        settings.current.cache_clear()


@pytest.mark.parametrize("text", ["", "host", "host:", ":50052", "host:0", "host:65536", "host:x", "::1:50052"])
def test_what_is_no_endpoint_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port") as error:
        rpc.add_servers([text])
    assert repr(text) in str(error.value)


def test_a_text_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match=r"add_servers\(\['host:50052'\]\)"):
        rpc.add_servers("host:50052")


def test_the_command_line_takes_servers(capsys: pytest.CaptureFixture[str]) -> None:
    with Server() as server:
        argv = ["run", "-m", str(BASE), "--mtp", str(HEAD), "-p", "import", "-n", "20", "-t", "1"]
        assert cli.main([*argv, "--compare", "--rpc", server.endpoint]) == 0
        assert "the same 20 tokens" in capsys.readouterr().out
        assert [device.endpoint for device in rpc.devices()] == [server.endpoint]


def test_a_port_that_is_taken_is_one_line_and_exit_status_1() -> None:
    with Server() as server:
        argv = [sys.executable, "-m", "ds4_mtp_plugin", "rpc-server", "--port", str(server.port)]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment())
    assert done.returncode == cli.EXIT_FAILED
    assert f"could not serve at {server.endpoint}" in done.stderr.splitlines()[-1]
    assert "without a password" in done.stdout


def test_ctrl_c_ends_a_server() -> None:
    with Server() as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == -signal.SIGINT


def test_doctor_names_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    assert cli.main(["doctor", "--rpc", nobody]) == 1
    assert f"wrong: RPC server {nobody}: no connection" in capsys.readouterr().out


def test_doctor_lists_a_server_and_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with Server() as server:
        assert cli.main(["doctor", "--rpc", server.endpoint]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("server")]
    assert server.endpoint in line and "MB free" in line


@pytest.mark.parametrize("build", ["with patch set 0123456789ab", "without this package's patches"])
def test_a_server_of_another_build_is_named_and_works(
    llama: Callable[..., Llama], plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str], build: str
) -> None:
    def another(answer: bytes) -> bytes:
        if build.startswith("with "):
            return answer.replace(current().patchset.encode(), b"0123456789ab")
        return re.sub(rb"(...)\xff(\0{24})", rb"\1\0\2", answer, flags=re.DOTALL)  # the greeting's answer

    with Server() as server, Proxy(server.port, another) as proxy:
        said = f"RPC server {proxy.endpoint}: its engine was built {build}, this side's with {current().patchset}"
        assert cli.main(["doctor", "--rpc", proxy.endpoint]) == 1
        assert f"wrong: {said}" in capsys.readouterr().out
        rpc.remove_servers()
        with pytest.warns(rpc.OtherBuild, match=said):
            rpc.add_servers([proxy.endpoint])
        assert llama(plant().trunk, n_gpu_layers=-1).create_completion("a", max_tokens=1)


def test_a_server_that_came_back_as_another_build_is_named(
    llama: Callable[..., Llama], plant: Callable[..., Planted]
) -> None:
    builds = [current().patchset.encode()]
    with Server() as server, Proxy(server.port, lambda answer: answer.replace(builds[0], builds[-1])) as proxy:
        rpc.add_servers([proxy.endpoint])
        lost = llama(plant().trunk, n_gpu_layers=-1)
        proxy.on(cut, GRAPH_COMPUTE, GRAPH_RECOMPUTE)
        with pytest.raises(rpc.ServerLost):
            lost.eval([300])
        builds.append(b"0123456789ab")
        with pytest.warns(rpc.OtherBuild, match=f"{proxy.endpoint}: its engine was built with patch set 0123456789ab"):
            llama(plant().trunk, n_gpu_layers=-1)


def test_a_model_of_which_nothing_is_offloaded_needs_no_server(
    llama: Callable[..., Llama], plant: Callable[..., Planted]
) -> None:
    with Server() as server:
        rpc.add_servers([server.endpoint])
    assert llama(plant().trunk, n_gpu_layers=0).create_completion("a", max_tokens=1)
