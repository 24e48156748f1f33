"""A chain of samplers that only takes the best token gives the one that a search through all candidates gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from llama_cpp import Llama, llama_cpp

from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, TINY, Planted


def first_of_the_greatest(row: list[float]) -> int:
    best = 0
    for i, value in enumerate(row):
        if value > row[best]:  # never true of a NaN
            best = i
    return best


@pytest.mark.parametrize("n_vocab", [512, 509])
@pytest.mark.parametrize("chained", [True, False], ids=["chain", "alone"])
def test_the_best_token_is_the_first_of_the_greatest(
    plant: Callable[..., Planted], chained: bool, n_vocab: int
) -> None:
    """Of a vocabulary that ends with a whole block of logits, and of one that does not."""
    config = dataclasses.replace(TINY, n_vocab=n_vocab)
    llm = Llama(str(plant(config=config, **BY_CONTEXT).trunk), n_ctx=256, n_gpu_layers=GPU_LAYERS, verbose=False)
    llm.eval([300])
    n = llm.n_vocab()
    row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (n,))
    sampler = llama_cpp.llama_sampler_init_greedy()
    if chained:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_penalties(n, 64, 1.0, 0.0, 0.0))
        llama_cpp.llama_sampler_chain_add(chain, sampler)
        sampler = chain
    draw = np.random.default_rng(0)
    rows = {
        "plain": draw.normal(size=n),
        "last": np.arange(n),
        "first": -np.arange(n),
        "ties": draw.integers(0, 3, n),
        "zeros of both signs": np.where(np.arange(n) < n // 2, -0.0, 0.0),
        "nothing finite": np.full(n, -np.inf),
        "infinite": np.where(np.arange(n) == n - 2, np.inf, 0.0),
        "NaN": np.where(draw.random(n) < 0.3, np.nan, draw.normal(size=n)),
        "NaN first": np.where(np.arange(n) == 0, np.nan, 1.0),
        "NaN alone": np.full(n, np.nan),
        "NaN behind the first": np.where(np.arange(n) == 0, -np.inf, np.nan),
    }
    found = {}
    for name, values in rows.items():
        row[:] = values
        found[name] = llama_cpp.llama_sampler_sample(sampler, llm.ctx, -1)
    assert found == {name: first_of_the_greatest(values.astype(np.float32).tolist()) for name, values in rows.items()}
    llama_cpp.llama_sampler_free(sampler)
    llm.close()


def test_a_chain_with_more_in_it_is_asked(plant: Callable[..., Planted]) -> None:
    llm = Llama(str(plant(**BY_CONTEXT).trunk), n_ctx=256, n_gpu_layers=GPU_LAYERS, verbose=False)
    llm.eval([300])
    best = llm.sample(temp=0.0)
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    bias = (llama_cpp.llama_logit_bias * 1)(llama_cpp.llama_logit_bias(best, -1e9))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_logit_bias(llm.n_vocab(), 1, bias))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
    row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()
    row[best] = -np.inf
    assert llama_cpp.llama_sampler_sample(chain, llm.ctx, -1) == int(row.argmax()) != best
    llama_cpp.llama_sampler_free(chain)
    llm.close()
