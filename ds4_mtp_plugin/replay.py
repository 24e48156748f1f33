"""The replay oracle: how far a text is from the plain one, token by token.

A text that parts from another at one token is another text from there on, so comparing texts says little about how
near they were. Feeding the committed tokens through plain decoding says at each of them what plain decoding would have
chosen there, and by how much (antirez/ds4, pull request 371, measures its near-greedy lane so).
"""

from __future__ import annotations

import ctypes as _ctypes
import dataclasses as _dataclasses
import typing as _t

import numpy as _np


@_dataclasses.dataclass(frozen=True)
class Replay:
    """What plain decoding says of a greedy text.

    Attributes:
        n: tokens that were replayed.
        diverging: how many of them are not plain decoding's choice.
        worst_gap: the most by which plain decoding's best logit is above that of the token in the text; 0 where every
            token is its choice.
        worst_at: the index of that token in the text, None where every token is plain decoding's choice.
    """

    n: int
    diverging: int
    worst_gap: float
    worst_at: int | None


def replay(llm: _t.Any, prompt: _t.Sequence[int], tokens: _t.Sequence[int]) -> Replay:
    """Feed `tokens`, generated greedily behind `prompt`, through `llm`, a Llama without a draft, one by one.

    Raises:
        RuntimeError: a decode failed.
        ValueError: the text does not fit into the context.
    """
    if len(prompt) + len(tokens) > llm.n_ctx():
        raise ValueError(f"{len(prompt)} + {len(tokens)} tokens do not fit into a context of {llm.n_ctx()}")
    llm.reset()
    llm.eval(list(prompt))
    gaps = _np.zeros(len(tokens))
    chosen = _np.zeros(len(tokens), dtype=bool)
    for i, token in enumerate(tokens):
        row = llm._ctx.get_logits_ith(-1)
        logits = _np.ctypeslib.as_array(_ctypes.cast(row, _ctypes.POINTER(_ctypes.c_float)), (llm.n_vocab(),))
        chosen[i] = token == int(logits.argmax())  # of several equal ones the first, as the host's greedy sampler
        gaps[i] = logits.max() - logits[token]
        llm.eval([token])
    if chosen.all():
        return Replay(len(tokens), 0, 0.0, None)
    gaps[chosen] = -1.0
    return Replay(len(tokens), int((~chosen).sum()), float(gaps.max()), int(gaps.argmax()))
