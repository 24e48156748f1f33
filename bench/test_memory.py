"""What a draft takes of memory at a long context: the peak of a process that loads, reads a prompt and decodes.

python -m pytest bench/test_memory.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.planted import FLASH, SMALL, planted

_CHILD = """
import json, resource, sys

import ds4_mtp_plugin
from llama_cpp import Llama

trunk, draft, n_ctx, n = json.loads(sys.argv[1])
llm = Llama(trunk, n_ctx=n_ctx, verbose=False, draft_model=eval(draft, vars(ds4_mtp_plugin)))
for i, _ in enumerate(llm.generate([300 + i % 1000 for i in range(n)], temp=0.0)):
    if i == 64:
        break
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.parametrize("n", [64, 8000])
def test_memory(table: Callable[[str], None], directory: Path, n: int) -> None:
    files = planted(directory, config=dataclasses.replace(SMALL, n_vocab=FLASH.n_vocab), acceptance=0.8, quant="Q8_0")
    head = files.mtp.stat().st_size / 2**20
    lines = [f"n_ctx 32768, {FLASH.n_vocab} tokens of vocabulary, a prompt of {n}; the head's file has {head:.0f} MB"]
    plain = 0.0
    for draft in (
        "None",
        "NgramDraft()",
        f"MtpDraft({str(files.mtp)!r}, checkpoints_mb=0)",
        f"MtpDraft({str(files.mtp)!r})",
    ):
        command = [sys.executable, "-c", _CHILD, json.dumps([str(files.trunk), draft, 32768, n])]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
        peak = float(done.stdout)
        plain = plain or peak
        lines.append(f"  {draft.replace(str(files.mtp), 'HEAD'):36} {peak:7.0f} MB, {peak - plain:+.0f} MB")
    table("\n".join(lines))
