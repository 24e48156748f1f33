"""Kernels for interleaved weights of 4 bits: upstream's bits, by each set of instructions they are written for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from tests.fixtures.kernels import AVX2, AVX512, compiled, installed

# By its name in the kernels': the number in ggml.h, and how 8 columns' scales are written.
TYPES = {"q4_0": (2, np.float16), "iq4_nl": (20, np.float16), "mxfp4": (39, np.uint8)}

FLAVOURS = {
    "as installed": (),
    "AVX2": AVX2,
    "AVX-VNNI": (*AVX2, "avxvnni"),
    "AVX-512": AVX512,
    "AVX-512 beside AVX-VNNI": (*AVX512, "avxvnni"),
    "AVX-512 with VNNI": (*AVX512, "avx512vnni"),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The library with the kernels of a flavour, which is compiled."""
    engines = installed("ds4_mtp_gemv_rows")

    def kernels(flavour: str) -> ctypes.CDLL:
        wanted = FLAVOURS[flavour]
        return compiled("arch/x86/repack.cpp", wanted, tmp_path_factory.mktemp("kernels")) if wanted else engines

    return kernels


def weights(name: str, n: int, nc: int) -> npt.NDArray[np.uint8]:
    """Random blocks of 8 columns. A single one has MXFP4's least scales alone, beside which others would be all."""
    random, n_blocks = np.random.default_rng(n), n // 32 * nc // 8
    if TYPES[name][1] is np.uint8:
        scales = random.integers(0, 4 if n == 32 else 150, (n_blocks, 8), np.uint8)
    else:
        scales = random.normal(size=(n_blocks, 8)).astype(np.float16).view(np.uint8)
    return np.concatenate([scales, random.integers(0, 256, (n_blocks, 128), np.uint8)], axis=1)


def row(n: int, seed: int) -> npt.NDArray[np.uint8]:
    """A random row of Q8_0; one that is all of the greatest or the least numbers for the first two seeds."""
    random = np.random.default_rng(seed)
    scales = random.normal(size=(n // 32, 1)).astype(np.float16).view(np.uint8)
    numbers = random.integers(-127, 128, (n // 32, 32), np.int8)
    if seed < 2:
        numbers[:] = (-127, 127)[seed]
    return np.concatenate([scales, numbers.view(np.uint8)], axis=1)


def pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_several_rows_have_the_bits_of_single_ones(kernels: Callable[[str], ctypes.CDLL], flavour: str) -> None:
    library = kernels(flavour)
    library.ds4_mtp_gemv_rows.restype = ctypes.c_bool
    taken = set()
    for name, (number, _) in TYPES.items():
        upstream = getattr(library, f"ggml_gemv_{name}_8x8_q8_0")
        for n, nc in ((32, 8), (96, 24), (4096, 16), (512 * 32, 8), (513 * 32, 8)):
            packed = np.ascontiguousarray(weights(name, n, nc))
            rows = [np.ascontiguousarray(row(n, seed)) for seed in range(4)]
            expected = np.zeros((4, nc), np.float32)
            for each, out in zip(rows, expected):
                upstream(n, pointer(out), ctypes.c_size_t(nc), pointer(packed), pointer(each), 1, nc)
            for nr in (1, 2, 3, 4):
                found = np.zeros((nr, nc), np.float32)
                outs = (ctypes.c_void_p * nr)(*(out.ctypes.data for out in found))
                ins = (ctypes.c_void_p * nr)(*(each.ctypes.data for each in rows[:nr]))
                if library.ds4_mtp_gemv_rows(number, n, outs, pointer(packed), ins, nr, nc):
                    taken.add((name, n))
                    assert found.tobytes() == expected[:nr].tobytes(), (name, n, nr)
                else:
                    assert not found.any()
    assert {n for name, n in taken if name == "mxfp4"} == {32, 96, 4096, 512 * 32}
    if flavour != "as installed":
        assert (("iq4_nl", 32) in taken) == (flavour in ("AVX-VNNI", "AVX-512 with VNNI"))
    assert not library.ds4_mtp_gemv_rows(8, 32, None, None, None, 1, 8)  # Q8_0
