"""Rows to decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from .library import ffi

Floats = npt.NDArray[np.float32]


class HiddenRows:
    """Room for hidden rows, outside of the context that they are of.

    Attributes:
        array: shape (n_max, n_hidden).
        ptrs: a pointer to each.
    """

    def __init__(self, n_max: int, n_hidden: int) -> None:
        self.array: Floats = np.zeros((n_max, n_hidden), dtype=np.float32)
        self.ptrs = [ffi.from_buffer("float[]", row) for row in self.array]


class Batch:
    """A reusable batch of up to `n_max` rows of one sequence (llama.h, llama_batch).

    The arrays are numpy's; the struct points into them, so both live exactly as long as this object. `n_embd_out` > 0
    adds hidden rows, which an MTP context takes together with the tokens, or, without `tokens`, in their place.
    """

    def __init__(self, n_max: int, *, n_embd_out: int = 0, tokens: bool = True) -> None:
        self.n_max = n_max
        self._token = np.zeros(n_max, dtype=np.int32)
        self._pos = np.zeros(n_max, dtype=np.int32)
        self._n_seq_id = np.ones(n_max, dtype=np.int32)
        self._output = np.zeros(n_max, dtype=np.int8)
        self._seq_id = np.zeros(1, dtype=np.int32)
        self._seq_ids = ffi.new("llama_seq_id *[]", [ffi.from_buffer("llama_seq_id[]", self._seq_id)] * n_max)
        self._embd = np.zeros((n_max, n_embd_out), dtype=np.float32) if n_embd_out else None
        self._steps = np.arange(n_max, dtype=np.int32)
        # What `set` finds set already.
        self._shape: tuple[int, str] | None = None
        self.struct = ffi.new("llama_batch *")
        if tokens:
            self.struct.token = ffi.from_buffer("llama_token[]", self._token)
        self.struct.pos = ffi.from_buffer("llama_pos[]", self._pos)
        self.struct.n_seq_id = ffi.from_buffer("int32_t[]", self._n_seq_id)
        self.struct.seq_id = self._seq_ids
        self.struct.logits = ffi.from_buffer("int8_t[]", self._output)
        if self._embd is not None:
            self.struct.embd = ffi.from_buffer("float[]", self._embd)

    @property
    def embd(self) -> Floats:
        """Hidden rows to fill before a decode, shape (n_max, n_embd_out)."""
        assert self._embd is not None
        return self._embd

    def set(
        self, tokens: Sequence[int], n_past: int, seq_id: int, *, outputs: Literal["last", "all"] = "last"
    ) -> Batch:
        """Rows `tokens` at positions n_past, n_past + 1, ... of `seq_id`; outputs of the "last" or of "all" rows.

        Raises:
            ValueError: more rows than the batch has.
        """
        n = len(tokens)
        if not 0 < n <= self.n_max:
            raise ValueError(f"{n} rows in a batch of {self.n_max}")
        self._seq_id[0] = seq_id
        if n == 1:
            self._token[0], self._pos[0] = tokens[0], n_past
        else:
            self._token[:n] = tokens
            np.add(self._steps[:n], n_past, out=self._pos[:n])
        if self._shape != (n, outputs):
            self._shape = None
            self._output[:n] = outputs == "all"
            self._output[n - 1] = 1
            self.struct.n_tokens = n
            self._shape = n, outputs
        return self
