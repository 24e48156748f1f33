"""Quantised DeepSeek-V4 loads and decodes at the host's defaults, whatever buffers the CPU backend puts weights into.

Where a weight lands in a buffer whose kernels cannot take it, the engine aborts the process, so each type runs in a
process of its own. Rows of 512 and blocks of 32 rows, so that AMX takes the weights where there is AMX.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import TINY, Planted

WIDE = replace(TINY, n_embd=512, q_lora_rank=256, o_lora_rank=128, n_head=8, head_dim=128, n_ff_exp=256)

SCRIPT = """
import sys
from ds4_mtp_plugin import MtpDraft
from llama_cpp import Llama
trunk, mtp, start, n_gpu_layers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
draft = MtpDraft(mtp, num_pred_tokens=3)
llm = Llama(trunk, n_ctx=512, verbose=False, draft_model=draft, n_gpu_layers=n_gpu_layers)
tokens = []
for token in llm.generate([start], temp=0.0):
    tokens.append(token)
    if len(tokens) == 150:
        break
print(*tokens)
"""


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q4_1", "MXFP4", "Q4_K", "Q6_K", "IQ4_XS"])
def test_loads_and_walks(plant: Callable[..., Planted], quant: str) -> None:
    files = plant(config=WIDE, quant=quant, acceptance=0.8)
    start = int(files.cycle[0])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(files.trunk), str(files.mtp), str(start), str(GPU_LAYERS)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(token) for token in done.stdout.split()] == files.follow(start, 150)
