"""What crosses the wire between a Llama and its server in a cycle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llama_cpp import Llama

from bench.proxy import Crossed, Proxy
from ds4_mtp_plugin import MtpDraft, rpc
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import TINY, Planted
from tests.rpc.servers import Server
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]

N = 60


def per_decode(llm: Llama, proxy: Proxy, prompt: list[int]) -> tuple[Crossed, int]:
    """What crossed while N tokens were generated whose graphs are built, and in how many decodes that was."""
    generate(llm, prompt, N)
    llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
    tokens = llm.generate(prompt, temp=0.0)
    next(tokens)
    before, stats = proxy.crossed, getattr(llm.draft_model, "stats", None)
    for _ in range(N):
        next(tokens)
    if stats is None:
        return proxy.crossed.since(before), N
    now = llm.draft_model.stats.since(stats)
    return proxy.crossed.since(before), now.iters + now.plain


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_decode_waits_for_one_answer_and_its_graph_stays_there(llama: Make, plant: Plant, k: int) -> None:
    """A verify with its hidden rows too; and the head's own steps do not cross at all."""
    files = plant(acceptance=0.8)
    options = {"draft_model": MtpDraft(files.mtp, num_pred_tokens=k, ngram=False, adaptive=False)} if k else {}
    with Server() as server, Proxy(server.port, ms=0) as proxy:
        rpc.add_servers([proxy.endpoint])
        llm = llama(files.trunk, n_gpu_layers=-1, **options)
        crossed, decodes = per_decode(llm, proxy, files.cycle[:64].tolist())
        assert crossed.answers <= 1.05 * decodes
        rows = 1 + k
        # Inputs. A graph would be 400,000, the rotation of the indexers 16,000.
        assert crossed.up < (18_000 + 3_000 * rows) * decodes
        assert crossed.down <= decodes * rows * 4 * (TINY.n_vocab + TINY.hc_dim) * 1.05


def test_the_graphs_of_a_model_and_of_a_head_on_its_server_stay_there(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=0.8)
    with Server() as server, Proxy(server.port, ms=0) as proxy:
        rpc.add_servers([proxy.endpoint])
        draft = MtpDraft(files.mtp, num_pred_tokens=1, ngram=False, adaptive=False, n_gpu_layers=-1)
        crossed, decodes = per_decode(
            llama(files.trunk, n_gpu_layers=-1, draft_model=draft), proxy, files.cycle[:64].tolist()
        )
        assert crossed.up < 100_000 * decodes  # inputs; with three graphs it would be 400,000


def test_over_two_servers_graphs_stay_there_too(llama: Make, tmp_path: Path) -> None:
    """Of a cycle with a verify of 4 rows and 3 steps of a head, which lies where the last layers do."""
    files = plant_family(tmp_path, "qwen35")
    with Server() as one, Server() as other, Proxy(one.port, ms=0) as first, Proxy(other.port, ms=0) as second:
        rpc.add_servers([first.endpoint, second.endpoint])
        draft = MtpDraft(num_pred_tokens=3, ngram=False, adaptive=False)
        llm = llama(files.trunk, n_gpu_layers=-1, draft_model=draft)
        crossed, decodes = per_decode(llm, second, files.prompt(64))
        assert crossed.up < 55_000 * decodes  # 80,000 where the graphs are built anew


def test_prompts_send_the_logits_of_their_last_row_alone(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=0.8)
    with Server() as server, Proxy(server.port, ms=0) as proxy:
        rpc.add_servers([proxy.endpoint])
        llm = llama(files.trunk, n_gpu_layers=-1)
        before = proxy.crossed
        generate(llm, files.cycle[:64].tolist(), 1)
        assert proxy.crossed.since(before).down < 3 * 4 * TINY.n_vocab
