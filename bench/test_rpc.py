"""Decoding over RPC servers: processes of this machine, behind proxies that add a network's latency.

    python -m pytest bench/test_rpc.py --benchmark-json=bench/results/NAME.json

A server and the Llama have a thread each. What crosses the wire is counted per cycle (a plain decode, or a verify),
after the first token. ``DS4_LLAMA_SERVER`` as in test_decode.py: llama-server has RPC servers of its own, because one
serves one process at a time, and its head on this machine, as ours is.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.contest import Contender, Contest, render
from bench.proxy import Crossed, Proxy
from bench.server import BINARY, ServerContender
from bench.test_decode import PROMPTS, ROUNDS
from ds4_mtp_plugin import MtpDraft, rpc
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from tests.fixtures.mtp_gguf import HALF_A_GIGABYTE, plant
from tests.fixtures.planted import BENCH, planted
from tests.rpc.servers import Server

THREADS = {"n_threads": 1, "n_threads_batch": 1}
DELAYS = [0.0, 0.2, 1.0, 5.0, 20.0]


@pytest.fixture
def behind() -> Iterator[Callable[..., Proxy]]:
    """Starts a server behind a proxy: behind(ms)."""
    with contextlib.ExitStack() as stack:
        yield lambda ms: stack.enter_context(Proxy(stack.enter_context(Server()).port, ms))
        rpc.remove_servers()


def drafts(head: Path | None, **options: Any) -> list[Contender]:
    """Plain decoding, the head at the depth that it chooses, and at fixed ones without drafts from the text."""
    return [
        Contender("plain", dict),
        Contender("automatic", lambda: {"draft_model": MtpDraft(head, **options)}),
        *(
            Contender(f"mtp k={k}", lambda k=k: {"draft_model": MtpDraft(head, num_pred_tokens=k, **options)})  # type: ignore[misc]
            for k in (1, 2, 3)
        ),
    ]


def servers(head: Path | None, directory: Path, behind: Callable[..., Proxy], ms: float) -> list[Contender]:
    if BINARY not in os.environ:
        return []
    return [
        ServerContender(
            f"server k={k}" if k else "server plain",
            head,
            k,
            -1,
            directory / f"server-rpc-{k}.log",
            rpc=behind(ms).endpoint,
        )
        for k in (0, 3)
    ]


def crossed(contender: Contender, prompt: Sequence[int], n: int, proxies: Sequence[Proxy]) -> tuple[list[Crossed], int]:
    """What crosses while n tokens follow the first, and in how many cycles."""
    llm = contender.llm
    assert llm is not None
    llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
    tokens = llm.generate(prompt, temp=0.0)
    next(tokens)
    stats, before = getattr(llm.draft_model, "stats", None), [proxy.crossed for proxy in proxies]
    list(itertools.islice(tokens, n))
    cycles = n
    if stats is not None:
        now = llm.draft_model.stats.since(stats)  # type: ignore[union-attr]
        cycles = now.iters + now.plain
    return [proxy.crossed.since(then) for proxy, then in zip(proxies, before)], cycles


def measure(
    benchmark: Any, table: Callable[[str], None], title: str, contest: Contest, proxies: Sequence[Proxy], n: int
) -> None:
    try:
        contest.round()  # weights into memory, graphs built
        for each in contest.field:
            each.seconds.clear()
            each.first.clear()
        benchmark.pedantic(contest.round, rounds=ROUNDS)
        results = contest.results()
        lines = [render(title, results)]
        for each in contest.field:
            if each.llm is None:
                continue
            found, cycles = crossed(each, contest.prompt, n, proxies)
            results[each.name]["crossed_per_cycle"] = [[count / cycles for count in one] for one in found]
            lines += [
                f"  {each.name:14} per cycle {one.up / cycles / 1e3:.1f} kB up, {one.down / cycles / 1e3:.1f} kB down, "
                f"{one.answers / cycles:.2f} answers waited for"
                for one in found
            ]
    finally:
        contest.close()
    benchmark.extra_info.update(results)
    table("\n".join(lines))
    assert all(row.get("same_text", True) for name, row in results.items() if not name.startswith("server"))


@pytest.mark.parametrize("ms", DELAYS)
def test_mini(
    benchmark: Any, table: Callable[[str], None], directory: Path, behind: Callable[..., Proxy], ms: float
) -> None:
    proxy = behind(ms)
    rpc.add_servers([proxy.endpoint])
    field = [*drafts(HEAD), *servers(HEAD, directory, behind, ms)]
    contest = Contest(BASE, field, PROMPTS["code"], 128, n_ctx=1024, n_gpu_layers=-1, **THREADS)
    measure(benchmark, table, f"ds4-mini, code, {ms} ms each way, 128 tokens", contest, [proxy], 127)


@pytest.mark.parametrize("ms", DELAYS)
def test_planted_half_a_gigabyte(
    benchmark: Any, table: Callable[[str], None], directory: Path, behind: Callable[..., Proxy], ms: float
) -> None:
    files = planted(directory, config=BENCH, acceptance=0.8, quant="Q8_0")
    proxy = behind(ms)
    rpc.add_servers([proxy.endpoint])
    field = [*drafts(files.mtp), *servers(files.mtp, directory, behind, ms)]
    prompt = files.cycle[:64].tolist()
    contest = Contest(files.trunk, field, prompt, 64, n_ctx=1024, n_gpu_layers=-1, **THREADS)
    measure(benchmark, table, f"planted, 500 MB, acceptance 0.8, {ms} ms each way, 64 tokens", contest, [proxy], 63)


@pytest.mark.parametrize("where", ["here", "there"])
def test_where_the_head_lies(
    benchmark: Any, table: Callable[[str], None], behind: Callable[..., Proxy], where: str
) -> None:
    proxy = behind(1.0)
    rpc.add_servers([proxy.endpoint])
    field = drafts(HEAD, **({"n_gpu_layers": -1} if where == "there" else {}))
    contest = Contest(BASE, field, PROMPTS["code"], 128, n_ctx=1024, n_gpu_layers=-1, **THREADS)
    measure(benchmark, table, f"ds4-mini, code, 1 ms each way, the head {where}, 128 tokens", contest, [proxy], 127)


@pytest.mark.parametrize("last", ["there", "here"])
def test_two_servers(
    benchmark: Any, table: Callable[[str], None], directory: Path, behind: Callable[..., Proxy], last: str
) -> None:
    """Half the layers on each of two servers, of which the second is far away or here; the head is in the file."""
    files = plant(directory, "qwen35", family=HALF_A_GIGABYTE)
    proxies = [behind(1.0), behind(1.0 if last == "there" else 0.0)]
    rpc.add_servers([proxy.endpoint for proxy in proxies])
    options = {"n_ctx": 1024, "n_gpu_layers": -1, "tensor_split": [1, 1], **THREADS}
    contest = Contest(files.trunk, drafts(None), files.prompt(64), 64, **options)
    title = f"planted hybrid (qwen35), 500 MB, two servers, 1 ms each way, the last layers {last}, 64 tokens"
    measure(benchmark, table, title, contest, proxies, 63)
