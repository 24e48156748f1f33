"""Text over servers is plain decoding's over the same servers, in bits: they compute rows as this CPU does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, NgramDraft, engine, host, rpc
from ds4_mtp_plugin.draft import Draft
from ds4_mtp_plugin.gguf import read_header
from tests.fixtures.dspark_gguf import write_dspark
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import BY_CONTEXT, TINY, Planted
from tests.rpc.servers import Server
from tests.text import check_plain, generate, text_and_logits

Make = Callable[..., Llama]
Plant = Callable[..., Planted]

SAMPLED = {"temp": 0.9, "top_k": 50, "repeat_penalty": 1.1}


@pytest.fixture(scope="module")
def two() -> Iterator[list[Server]]:
    with Server() as first, Server() as second:
        yield [first, second]


@pytest.fixture
def over(two: list[Server], llama: Make) -> Make:
    """Makes Llamas of which all layers lie on two servers."""
    rpc.add_servers([server.endpoint for server in two])
    return lambda path, **options: llama(path, **{"n_gpu_layers": -1, **options})


def same(llm: Llama, drafting: Llama, prompt: list[int], n: int, **sampling: Any) -> None:
    for each in (llm, drafting):
        each.set_seed(7)
    plain = text_and_logits(llm, prompt, n, **sampling)
    check_plain(plain, text_and_logits(drafting, prompt, n, **sampling))
    stats = drafting.draft_model.stats
    assert stats.exact and stats.accepted > 0


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("layers", [-1, 2])
def test_deepseek4(over: Make, plant: Plant, sampling: dict[str, Any], layers: int) -> None:
    files = plant(**BY_CONTEXT)
    draft = MtpDraft(files.mtp, num_pred_tokens=3, exact=True)
    options = {"n_gpu_layers": layers}
    same(
        over(files.trunk, **options), over(files.trunk, draft_model=draft, **options), [300, 301, 302], 120, **sampling
    )


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
def test_running_states_and_a_head_in_the_models_file(over: Make, tmp_path: Path, sampling: dict[str, Any]) -> None:
    files = plant_family(tmp_path, "qwen35")
    draft = MtpDraft(num_pred_tokens=3, exact=True)
    same(over(files.trunk), over(files.trunk, draft_model=draft), files.prompt(40), 80, **sampling)


def test_a_head_on_the_servers(over: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    draft = MtpDraft(files.mtp, num_pred_tokens=2, n_gpu_layers=-1)
    same(over(files.trunk), over(files.trunk, draft_model=draft), [300, 301], 60)


def test_a_head_here_shares_what_is_here_alone(over: Make, llama: Make, plant: Plant) -> None:
    """Its model's embedding is on this machine, its model's output on a server."""
    files, library = plant(), engine.Library(host.library_path())
    weights: list[int] = []
    for make in (llama, over):
        theirs = engine.Model.borrowed(library, make(files.trunk)._model.model, str(files.trunk))
        options = {"target": theirs, "shared": ("token_embd.weight", "output.weight"), "load_mode": 0}
        head = engine.Model(library, str(files.mtp), load_mtp=True, **options)
        context = head.new_context(mtp=True, n_ctx=256)
        weights.append(context.memory.weights)
        context.close()
        head.close()
    n_output = read_header(str(files.mtp)).places["output.weight"].n_bytes
    assert weights[1] - weights[0] == pytest.approx(n_output, rel=0.1)


def test_a_dspark_head(over: Make, plant: Plant, tmp_path: Path) -> None:
    files = plant(acceptance=0.7)
    draft = MtpDraft(write_dspark(tmp_path / "dspark.gguf", files, TINY), adaptive=False)
    same(over(files.trunk), over(files.trunk, draft_model=draft), files.cycle[:40].tolist(), 60)


@pytest.mark.parametrize("draft", [MtpDraft, NgramDraft])
def test_a_state_goes_on_where_it_was_saved(over: Make, plant: Plant, draft: Callable[..., Draft]) -> None:
    files = plant(**BY_CONTEXT)
    chosen = draft(files.mtp) if draft is MtpDraft else draft()
    llm = over(files.trunk, draft_model=chosen)
    prompt = files.cycle[:60].tolist()
    llm.eval(prompt)
    state = llm.save_state()
    first = text_and_logits(llm, prompt, 40)
    llm.load_state(state)
    check_plain(first, text_and_logits(llm, prompt, 40))


def test_a_prompt_goes_on_from_a_checkpoint(over: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    options = {"n_batch": 256, "n_ubatch": 256}
    llm = over(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2), **options)
    prompt = np.random.default_rng(1).integers(300, 500, 600).tolist()
    text_and_logits(llm, prompt, 4)
    edited = [*prompt[:550], 301, 302]
    evaluated: list[int] = []
    decode = llm._ctx.decode
    llm._ctx.decode = lambda batch: (evaluated.append(batch.n_tokens()), decode(batch))[1]  # type: ignore[method-assign]
    ours = text_and_logits(llm, edited, 30)
    assert 0 < sum(evaluated) < 300
    check_plain(text_and_logits(over(files.trunk, **options), edited, 30), ours)


def test_two_llamas_over_the_same_servers_at_once(over: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    plain = generate(over(files.trunk), [300, 301], 100)
    both = [over(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=k)) for k in (1, 3)]
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda llm: generate(llm, [300, 301], 100), both))
    assert texts == [plain, plain]
