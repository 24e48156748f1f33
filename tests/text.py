"""Generating token by token, as the host's own completion does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_cpp import Llama


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
