"""Generating token by token, as the host's own completion does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import Llama, LogitsProcessorList


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
