"""Generating token by token, as the host's own completion does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import Llama, LogitsProcessorList

from tests.fixtures import GPU_LAYERS


def generate(llm: Llama, prompt: Sequence[int], n: int, **sampling: Any) -> list[int]:
    """n tokens behind the prompt, greedy unless `sampling` says otherwise; the generation is closed behind them."""
    sampling.setdefault("temp", 0.0)
    tokens: list[int] = []
    generator = llm.generate(list(prompt), **sampling)
    for token in generator:
        tokens.append(token)
        if len(tokens) == n:
            generator.close()
            break
    return tokens


def text_and_logits(llm: Llama, prompt: Sequence[int], n: int, **sampling: Any) -> tuple[list[int], Any]:
    """As `generate`, and the logits that each token was chosen by, shape (n, n_vocab)."""
    rows: list[Any] = []

    def keep(_: Any, scores: Any) -> Any:
        rows.append(np.array(scores, dtype=np.float32))
        return scores

    text = generate(llm, prompt, n, logits_processor=LogitsProcessorList([keep]), **sampling)
    return text, np.stack(rows[:n])


def check_plain(plain: tuple[list[int], Any], ours: tuple[list[int], Any], *, exact: bool = True) -> None:
    """Text and logits (`text_and_logits`) are plain decoding's, bit for bit where that is promised (`exact`).

    On a GPU that does not promise it rows round otherwise, and at a near tie texts part. But as long as they are the
    same, their logits are nearly.
    """
    if exact or GPU_LAYERS == 0:
        assert plain[0] == ours[0]
        np.testing.assert_array_equal(plain[1], ours[1])
        return
    same = next((i for i, (a, b) in enumerate(zip(plain[0], ours[0])) if a != b), len(plain[0]) - 1)
    rows = [each[1][: same + 1] for each in (plain, ours)]
    off = np.abs(rows[0] - rows[1]).max(1) / np.ptp(rows[0], axis=1)
    assert np.quantile(off, 0.9) < 0.03, off
