"""Dot products of several rows at once: the bits of one after the other, by each set of instructions."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.kernels import AVX2, AVX512, compiled, installed

FLAVOURS = {"as installed": (), "AVX2": AVX2, "AVX-512": AVX512, "AVX-512 with FP16": (*AVX512, "avx512fp16")}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rows_of_f16_have_the_bits_of_single_ones(tmp_path: Path, flavour: str) -> None:
    engines, wanted = installed("ds4_mtp_vec_dots_f16"), FLAVOURS[flavour]
    library = compiled("vec.cpp", wanted, tmp_path) if wanted else engines
    one, several = library.ggml_vec_dot_f16, library.ds4_mtp_vec_dots_f16
    count, size, at = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    one.argtypes = [count, at, size, at, size, at, size, count]
    several.argtypes = [count, at, size, at, size, count, at, size, count]
    random = np.random.default_rng(1)
    for n in (1, 32, 64, 100, 512, 1023, 1024, 1025, 3000):
        x, y = (random.normal(size=(rows, n + 8)).astype(np.float16) for rows in (16, 4))
        expected = np.zeros((4, 16), np.float32)
        for c in range(4):
            for r in range(16):
                one(n, expected[c, r:].ctypes.data, 0, x[r].ctypes.data, 0, y[c].ctypes.data, 0, 1)
        np.testing.assert_allclose(expected, y[:, :n].astype(np.float32) @ x[:, :n].astype(np.float32).T, atol=1e-2)
        for nx in (1, 2, 3, 4, 7, 16):
            for ny in (1, 2, 3, 4):
                found = np.full((4, 16), np.nan, np.float32)
                where = (found.ctypes.data, 16, x.ctypes.data, x.strides[0], nx, y.ctypes.data, y.strides[0], ny)
                several(n, *where)
                assert found[:ny, :nx].tobytes() == expected[:ny, :nx].tobytes(), (n, nx, ny)
                assert np.isnan(found[ny:]).all() and np.isnan(found[:, nx:]).all()
