"""A row's logits do not depend, in a single bit, on how many rows were decoded with it: on CPUs, and on some GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from ds4_mtp_plugin import engine, host
from ds4_mtp_plugin.host.opening import GPU_BLOCK
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, SMALL, Planted
from tests.fixtures.row_engine import RowEngine

LIBRARY = engine.Library(host.library_path())
GPU_ROWS = LIBRARY.gpu_rows if GPU_LAYERS else None

pytestmark = pytest.mark.skipif(GPU_ROWS == 0, reason="this GPU does not promise it: bench/device counts what differs")

# Past the marks at 128, 256 and 512, where the compressed layers change their state and the raw window is full; with
# 3, 5 and 17 rows at a time, so that a batch begins at every position mod 4 and mod 128. On a GPU with 2 to 5.
N = 560
WIDTHS = (3, 5, 17) if GPU_ROWS is None else range(2, GPU_ROWS + 1)
TEXT = np.random.default_rng(0).integers(260, 500, N).tolist()

# Rows of 256 and more, which the K- and I-quants need, and layers of every kind.
WIDE = dataclasses.replace(
    SMALL, q_lora_rank=256, compress_ratios=(0, 4, 128, 4), n_hash_layers=1, n_expert=8, n_expert_used=2
)

# What llama.cpp's quantisation writes (enum llama_ftype of llama.h), by the types of which it is mixed, but for Q2_0,
# which the gguf package does not know.
WRITTEN = [
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4", "Q1_0", "TQ1_0", "TQ2_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
    *("IQ1_S", "IQ1_M"),
]

Plant = Callable[..., Planted]
Rows = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def decode(files: Planted, k: int, prompt: int = 0, **params: Any) -> Rows:
    """(logits, hidden rows) of the text behind its first `prompt` tokens, k rows at a time."""
    with RowEngine(files.trunk, n_batch=max(prompt, k), **params) as rows:
        if prompt:
            rows.decode(TEXT[:prompt])
        logits, hidden = rows.decode_by(k, TEXT, prompt, within=GPU_ROWS and GPU_BLOCK)
    assert np.isfinite(logits).all() and np.ptp(logits) > 0
    return logits, hidden


def differing(a: Rows, b: Rows) -> list[int]:
    return np.flatnonzero((a[0] != b[0]).any(1) | (a[1] != b[1]).any(1)).tolist()


@pytest.mark.parametrize("quant", WRITTEN)
def test_k_rows_are_k_single_rows(plant: Plant, quant: str) -> None:
    files = plant(**BY_CONTEXT, config=WIDE, quant=quant)
    alone = decode(files, 1)
    assert {k: differing(alone, decode(files, k)) for k in WIDTHS} == {k: [] for k in WIDTHS}


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_K", "MXFP4"])
def test_as_on_cpus_that_repack_no_weights(plant: Plant, quant: str) -> None:
    files = plant(**BY_CONTEXT, config=WIDE, quant=quant)
    alone = decode(files, 1, repack=False)
    widths = (*WIDTHS, 2, 4)
    assert {k: differing(alone, decode(files, k, repack=False)) for k in widths} == {k: [] for k in widths}


@pytest.mark.parametrize("quant", ["Q4_0", "IQ4_NL", "MXFP4"])
def test_repacked_weights_are_the_same_weights(plant: Plant, quant: str) -> None:
    """Other kernels add in another order. In single rows a wrong input would be the same in every width."""
    files = plant(**BY_CONTEXT, config=WIDE, quant=quant)
    (there, _), (here, _) = decode(files, 1, repack=False), decode(files, 1)
    apart = np.abs(here - there).max(1)
    assert np.median(apart) < 0.02 * np.abs(there).max()


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("threads", [(1, 2), (2, 1), (2, 3)])
def test_on_any_threads_with_and_without_flash_attention(
    plant: Plant, quant: str, flash: bool, threads: tuple[int, int]
) -> None:
    """The engine takes n_threads for a single row and n_threads_batch for more, and splits a long cache over them."""
    files = plant(**BY_CONTEXT, config=WIDE, quant=quant)
    params = {"prompt": 512, "flash": flash, "n_threads": threads[0], "n_threads_batch": threads[1]}
    assert differing(decode(files, 1, **params), decode(files, 5, **params)) == []


def test_every_type_that_the_engine_writes_is_among_them() -> None:
    """A type that comes to the gguf package, which follows the engine, has to be looked at here."""
    others = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}  # of products in the making, and of no products
    assert {quant.name for quant in GGMLQuantizationType} - others == set(WRITTEN)
