"""A server that is lost is an exception that names it; the process lives, and what it had there counts as lost."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, rpc, settings
from tests import LONG
from tests.fixtures.planted import Planted
from tests.rpc import proxy as requests
from tests.rpc.proxy import Fault, Proxy, cut, garbage, stall
from tests.rpc.servers import Server, free_port

Make = Callable[..., Llama]
Plant = Callable[..., Planted]

_N = 16

# In a decode: a graph is sent, rows are asked for.
_GRAPH, _ROWS = (requests.GRAPH_COMPUTE, requests.GRAPH_RECOMPUTE), (requests.GET_TENSOR,)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all of them: whatever its clients meet with, it has to serve the next."""
    with Server() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """Before the server; what it lets through may be silent for a second."""
    rpc.set_timeout(1)
    with Proxy(server.port) as proxy, added(proxy.endpoint):
        yield proxy
    rpc.set_timeout(300)


@contextlib.contextmanager
def added(endpoint: str) -> Iterator[None]:
    rpc.add_servers([endpoint])
    try:
        yield
    finally:
        rpc.remove_servers([endpoint])


def tokens(llm: Llama, prompt: list[int], n: int) -> Iterator[int]:
    for _, token in zip(range(n), llm.generate(prompt, temp=0.0)):
        yield token


def check_lost(llm: Llama, prompt: list[int], endpoint: str) -> None:
    """Nothing false is said of what lay on the server."""
    assert llm._ctx.ctx is not None
    assert llama_cpp.llama_memory_seq_pos_max(llm._ctx.memory, 0) == -1
    room = (llama_cpp.ctypes.c_uint8 * (1 << 20))()
    assert llama_cpp.llama_state_get_data(llm._ctx.ctx, room, len(room)) == 0
    assert not llm._ctx.get_logits_ith(-1)
    sample = [llm.sample] if llm.n_tokens else []  # the host has an assertion of its own
    for use in (llm.save_state, *sample, lambda: next(tokens(llm, prompt, 1))):
        with pytest.raises(rpc.ServerLost, match=endpoint):
            use()


# -- a server that is not there, or none --


def test_a_server_that_is_not_there_is_named(llama: Make, plant: Plant) -> None:
    """It may come later; until then a Llama that wants nothing of it does without."""
    files, port = plant(), free_port()
    endpoint = f"127.0.0.1:{port}"
    with pytest.raises(rpc.ServerLost, match=f"{endpoint}: no connection: Connection refused"):
        rpc.add_servers([endpoint])
    prompt = files.cycle[:5].tolist()
    with contextlib.ExitStack() as stack:
        with Server(port=port):
            stack.enter_context(added(endpoint))
            assert list(tokens(llama(files.trunk, n_gpu_layers=-1), prompt, _N)) == files.follow(prompt[-1], _N)
        with pytest.raises(rpc.ServerLost, match=f"{endpoint}: no connection: Connection refused"):
            llama(files.trunk, n_gpu_layers=-1)
        assert list(tokens(llama(files.trunk, n_gpu_layers=0), prompt, _N)) == files.follow(prompt[-1], _N)
    llama(files.trunk, n_gpu_layers=-1)  # taken back, it is not asked


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Something that answers whatever is sent with `answer`, and closes; with None it does neither. Its endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as client:
                read(client, 33)
                if answer is not None:
                    client.sendall(answer)
                else:
                    client.recv(1)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "greeting of protocol 7.0 .it closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it answered with [0-9]+ bytes, expected 28"),
        (struct.pack("<Q4B24x", 28, 6, 1, 0, 0), r"it speaks protocol 6\.1, this side 7\.0"),
        (struct.pack("<Q4B24x", 28, 7, 9, 0, 0), r"it speaks protocol 7\.9, this side 7\.0"),
        (None, "it was silent for 1 s"),
    ],
    ids=["closes", "http", "older", "newer", "silent"],
)
def test_what_is_no_server_of_this_protocol_is_named(answer: bytes | None, why: str) -> None:
    rpc.set_timeout(1)
    try:
        with listening(answer) as endpoint, pytest.raises(rpc.ServerLost, match=f"{endpoint}: .*{why}"):
            rpc.add_servers([endpoint])
    finally:
        rpc.set_timeout(300)
    assert endpoint not in [device.endpoint for device in rpc.devices()]


def test_the_environment_s_timeout_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS4_MTP_RPC_TIMEOUT", "1")
    settings.current.cache_clear()
    try:
        rpc.set_timeout(0)
        with listening(None) as endpoint, pytest.raises(rpc.ServerLost, match="it was silent for 1 s"):
            rpc.add_servers([endpoint])
    finally:
        monkeypatch.undo()
        settings.current.cache_clear()
        rpc.set_timeout(300)


# -- a server that is lost --


@pytest.mark.parametrize(
    ("fault", "request_", "skip"),
    [
        (cut, requests.SET_TENSOR, 5),
        (stall, requests.SET_TENSOR, 5),
        (garbage, requests.SET_TENSOR, 5),
        (cut, requests.ALLOC_BUFFER, 1),
        (cut, requests.BUFFER_GET_BASE, 1),
        (garbage, requests.ALLOC_BUFFER, 3),
    ],
)
def test_lost_while_a_llama_is_made(
    llama: Make, plant: Plant, proxy: Proxy, fault: Fault, request_: int, skip: int
) -> None:
    """In the middle of its weights; before its memory; before its graphs."""
    files = plant()
    prompt = files.cycle[:5].tolist()
    proxy.on(fault, request_, skip=skip)
    with pytest.raises(rpc.ServerLost, match=proxy.endpoint):
        llama(files.trunk, n_gpu_layers=-1)
    assert list(tokens(llama(files.trunk, n_gpu_layers=-1), prompt, _N)) == files.follow(prompt[-1], _N)


@pytest.mark.parametrize(("fault", "skip"), [(cut, 0), (stall, 1), (garbage, 1), (cut, 2)])
def test_lost_in_a_prompt(llama: Make, plant: Plant, proxy: Proxy, fault: Fault, skip: int) -> None:
    """In its first, second and last batch."""
    files = plant()
    prompt = files.cycle[:300].tolist()
    llm = llama(files.trunk, n_gpu_layers=-1, n_batch=128)
    proxy.on(fault, *_GRAPH, skip=skip)
    with pytest.raises(rpc.ServerLost, match=proxy.endpoint):
        next(tokens(llm, prompt, 1))
    check_lost(llm, prompt, proxy.endpoint)
    again = llama(files.trunk, n_gpu_layers=-1, n_batch=128)
    assert list(tokens(again, prompt, _N)) == files.follow(prompt[-1], _N)
    check_lost(llm, prompt, proxy.endpoint)  # the new connection is none of its


@pytest.mark.parametrize(
    ("fault", "at", "drafts"),
    [
        (cut, _GRAPH, False),
        (stall, _ROWS, False),
        (cut, _GRAPH, True),
        (cut, _ROWS, True),
        (stall, _GRAPH, True),
        (garbage, _ROWS, True),
    ],
)
def test_lost_in_a_verify(
    llama: Make, plant: Plant, proxy: Proxy, fault: Fault, at: tuple[int, ...], drafts: bool
) -> None:
    """And in the decode of a single token; all that was said before is right."""
    files = plant()
    prompt = files.cycle[:5].tolist()
    options: dict[str, Any] = {"draft_model": MtpDraft(files.mtp, adaptive=False, n_gpu_layers=0)} if drafts else {}
    llm = llama(files.trunk, n_gpu_layers=-1, **options)
    said = []
    with pytest.raises(rpc.ServerLost, match=proxy.endpoint):
        for token in tokens(llm, prompt, _N):
            said.append(token)
            if len(said) == 5:
                proxy.on(fault, *at)
    assert 5 <= len(said) < _N and said == files.follow(prompt[-1], len(said))
    check_lost(llm, prompt, proxy.endpoint)
    llm.close()
    options = {"draft_model": MtpDraft(files.mtp, adaptive=False, n_gpu_layers=0)} if drafts else {}
    again = llama(files.trunk, n_gpu_layers=-1, **options)
    assert list(tokens(again, prompt, _N)) == files.follow(prompt[-1], _N)


def test_a_server_that_dies_is_lost_to_all_its_llamas(llama: Make, plant: Plant) -> None:
    files = plant()
    prompt = files.cycle[:5].tolist()
    with Server() as server, added(server.endpoint):
        first, second = (llama(files.trunk, n_gpu_layers=-1) for _ in range(2))
        for llm in (first, second):
            assert list(tokens(llm, prompt, _N)) == files.follow(prompt[-1], _N)
        state = first.save_state()
        server.kill()
        with pytest.raises(rpc.ServerLost, match=server.endpoint):
            first.load_state(state)
        for llm in (first, second):
            with pytest.raises(rpc.ServerLost, match=server.endpoint):
                next(tokens(llm, prompt, 1))
            check_lost(llm, prompt, server.endpoint)
            llm.close()


@pytest.mark.parametrize("fault", [cut, garbage])
def test_a_state_of_a_server_that_is_lost_is_none(llama: Make, plant: Plant, proxy: Proxy, fault: Fault) -> None:
    files = plant()
    prompt = files.cycle[:5].tolist()
    llm = llama(files.trunk, n_gpu_layers=-1)
    assert list(tokens(llm, prompt, _N)) == files.follow(prompt[-1], _N)
    proxy.on(fault, requests.GET_TENSOR, skip=1)
    with pytest.raises(rpc.ServerLost, match=proxy.endpoint):
        llm.save_state()
    check_lost(llm, prompt, proxy.endpoint)


@pytest.mark.parametrize("fault", [cut, stall])
def test_without_the_head_s_server_the_text_goes_on(llama: Make, plant: Plant, proxy: Proxy, fault: Fault) -> None:
    files = plant()
    prompt = files.cycle[:5].tolist()
    draft = MtpDraft(files.mtp, adaptive=False, n_gpu_layers=-1)
    llm = llama(files.trunk, n_gpu_layers=0, draft_model=draft)
    said = []
    with pytest.warns(RuntimeWarning, match=f"decoding plainly: .*{proxy.endpoint}"):
        for token in tokens(llm, prompt, _N):
            said.append(token)
            if len(said) == 5:
                proxy.on(fault, *_GRAPH)
    assert said == files.follow(prompt[-1], _N)
    assert draft.stats.accepted > 0


def test_what_frees_its_memory_on_a_server_leaves_the_others_theirs(llama: Make, plant: Plant, server: Server) -> None:
    """With a buffer a server forgets its graphs, and has to be sent them again."""
    files = plant()
    prompt = files.cycle[:5].tolist()
    with added(server.endpoint):
        first, second = (llama(files.trunk, n_gpu_layers=-1) for _ in range(2))
        text = tokens(first, prompt, _N)
        said = [next(text) for _ in range(5)]
        second.close()
        assert said + list(text) == files.follow(prompt[-1], _N)


# -- a server whose clients are not what they should be --


@contextlib.contextmanager
def greeted(endpoint: str) -> Iterator[socket.socket]:
    """A connection that the server takes for a client's."""
    host, port = endpoint.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(struct.pack("<BQ24x", requests.HELLO, 24))
        assert len(read(client, 36)) == 36
        yield client


def read(client: socket.socket, n: int) -> bytes:
    """n bytes, or fewer where the server closes."""
    data = b""
    while len(data) < n and (part := client.recv(n - len(data))):
        data += part
    return data


def ask(client: socket.socket, request: int, content: bytes, n: int) -> tuple[Any, ...]:
    """n numbers of 64 bits that the server answers."""
    client.sendall(struct.pack("<BQ", request, len(content)) + content)
    return struct.unpack(f"<{n}Q", read(client, 8 + 8 * n)[8:])


def tensor(buffer: int, data: int, n: int, *, op: int = 0) -> bytes:
    """rpc_tensor of ggml-rpc.cpp: n floats."""
    return struct.pack("<QIQ 4I 4I I64xi 80x QQQ 64xi", 1, 0, buffer, n, 1, 1, 1, 4, *[4 * n] * 3, op, 0, 0, 0, data, 0)


@pytest.fixture
def buffer(server: Server) -> Iterator[tuple[socket.socket, int, int]]:
    """A client with a buffer of 4096 bytes, what it is called, and where it begins."""
    with greeted(server.endpoint) as client:
        name, _ = ask(client, requests.ALLOC_BUFFER, struct.pack("<IQ", 0, 4096), 2)
        (base,) = ask(client, requests.BUFFER_GET_BASE, struct.pack("<Q", name), 1)
        yield client, name, base


def test_garbage_does_not_end_a_server(server: Server) -> None:
    """In place of a greeting, and behind one; requests with sizes that mean nothing."""
    host, port = server.endpoint.split(":")
    for seed in range(1000 if LONG else 50):
        draw = random.Random(seed)
        with socket.create_connection((host, int(port))) as client, contextlib.suppress(OSError):
            client.sendall(draw.randbytes(draw.randrange(200)))
        with greeted(server.endpoint) as client, contextlib.suppress(OSError):
            size = draw.choice([0, 8, 12, 296, 305, 400, 1 << 34, 1 << 63])
            client.sendall(struct.pack("<BQ", draw.choice([*range(19), 0x80]), size) + draw.randbytes(min(size, 400)))
    with greeted(server.endpoint):
        pass


@pytest.mark.parametrize(
    ("offset", "n", "op", "at", "size"),
    [
        (-4, 4, 0, 0, 16),
        (4096 - 12, 4, 0, 0, 16),
        (1 << 63, 4, 0, 0, 16),
        (0, 4, 0, 8, 16),
        (0, 4, 0, -8, 8),
        (0, 4, 1000, 0, 16),
    ],
    ids=["before", "behind", "far", "longer than it", "before it", "no operation"],
)
def test_what_is_written_out_of_bounds_ends_the_connection_alone(
    server: Server, buffer: tuple[socket.socket, int, int], offset: int, n: int, op: int, at: int, size: int
) -> None:
    client, name, base = buffer
    content = tensor(name, (base + offset) % (1 << 64), n, op=op) + struct.pack("<BQ", 0, at % (1 << 64)) + bytes(size)
    client.sendall(struct.pack("<BQ", requests.SET_TENSOR, len(content)) + content)
    assert read(client, 1) == b""
    with greeted(server.endpoint):
        pass


def test_what_is_written_in_bounds_is_read_again(buffer: tuple[socket.socket, int, int]) -> None:
    """The same requests, as they should be."""
    client, name, base = buffer
    content = tensor(name, base + 4080, 4) + struct.pack("<BQ", 0, 8) + b"12345678"
    client.sendall(struct.pack("<BQ", requests.SET_TENSOR, len(content)) + content)
    content = tensor(name, base + 4080, 4) + struct.pack("<QQ", 8, 8)
    assert ask(client, requests.GET_TENSOR, content, 1) == struct.unpack("<Q", b"12345678")


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of a running process's files is Linux's")
def test_a_part_of_a_file_is_not_kept(tmp_path: Path) -> None:
    """Where the disk is full the cache has nothing: what is found there is taken for a whole tensor."""
    with Server(f"--cache={tmp_path}") as server:
        for room in (1000, resource.RLIM_INFINITY):
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            with greeted(server.endpoint) as client:
                name, _ = ask(client, requests.ALLOC_BUFFER, struct.pack("<IQ", 0, 8000), 2)
                (base,) = ask(client, requests.BUFFER_GET_BASE, struct.pack("<Q", name), 1)
                content = tensor(name, base, 2000) + struct.pack("<BQ", 1, 0) + bytes(8000)
                client.sendall(struct.pack("<BQ", requests.SET_TENSOR, len(content)) + content)
                ask(client, requests.BUFFER_GET_BASE, struct.pack("<Q", name), 1)  # the one before is done
            assert [file.stat().st_size for file in tmp_path.iterdir()] == ([] if room == 1000 else [8000])


@pytest.mark.skipif(not LONG, reason="waits for 10 s, in the long mode alone")
def test_who_does_not_greet_does_not_hold_up_others(server: Server) -> None:
    host, port = server.endpoint.split(":")
    with socket.create_connection((host, int(port))), greeted(server.endpoint):
        pass
