"""The GGUF format, read from a file's header alone, and whether the file is whole.

Format: ``ggml/include/gguf.h`` of llama.cpp, versions 2 and 3. Only numbers, strings and short arrays are kept. A
vocabulary is skipped, which takes most of the time (20 ms for 129,280 tokens and as many merges).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import math
import mmap
import os
import re
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union

__all__ = [
    "NUMBERS",
    "TYPES",
    "Header",
    "Overrides",
    "PathLike",
    "Place",
    "Value",
    "read_header",
    "same_tensors",
    "shown",
]

PathLike = Union[str, "os.PathLike[str]"]
Value = Union[int, float, bool, str, "tuple[int | float | bool, ...]"]
#: An app's ``kv_overrides``: what the engine is told to take in place of a file's own metadata.
Overrides = Mapping[str, Value]

#: Format characters of struct by number of the value's type; 8 is a string, 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_ARRAY_KEPT = 1024
_AT_ONCE = 1 << 20

# (name, elements, bytes) of a block by number of the tensor's type (ggml.h, ggml-common.h).
_BLOCKS = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)},
    9: ("Q8_1", 32, 36),
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)},
    **{14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82), 18: ("IQ3_XXS", 256, 98)},
    **{21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56), 20: ("IQ4_NL", 32, 18)},
    **{23: ("IQ4_XS", 256, 136), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
    **{42: ("Q2_0", 64, 18)},
}

#: Numbers of tensors' types by name.
TYPES = {name: number for number, (name, _, _) in _BLOCKS.items()}

# How files begin that users take for a GGUF.
_LOOKS_LIKE = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: run 'git lfs pull'"),
    (rb"\s*(<!doctype|<html|<\?xml)", "a web page: the download went wrong, check its address and your access rights"),
    (rb"[\s\S]{8}\{\s*\"", "a safetensors file: convert the checkpoint"),
    (rb"PK\x03\x04|\x80\x02", "a PyTorch file: convert the checkpoint"),
    (rb"ggml|fmgg|tjgg|lmgg", "a GGML file from before August 2023: convert the checkpoint"),
    (rb"FUGG", "a GGUF in another byte order: convert the checkpoint on a machine like this"),
)


class Place(NamedTuple):
    """Where the bytes of a tensor are: from `offset` on in the file `path`. 0 of them are known of an unknown type."""

    path: str
    offset: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a GGUF file, or of all parts of a split one.

    Attributes:
        path: the file, or its first part.
        metadata: keys and values. Arrays of strings and long arrays are left out.
        lengths: keys of arrays, and how many elements they have.
        tensors: names and shapes, the fastest dimension first.
        types: names of tensors, and of their types.
        spans: keys, and where each with its value begins and ends in the (first) file, in bytes.
        places: names of tensors, and where their bytes are.
        vocabulary: a digest of the tokens' texts; empty where the file has none.
        n_bytes: size of the file, or of all parts.
    """

    path: str
    metadata: dict[str, Value]
    lengths: dict[str, int]
    tensors: dict[str, tuple[int, ...]]
    types: dict[str, str]
    spans: dict[str, tuple[int, int]]
    places: dict[str, Place]
    vocabulary: str
    n_bytes: int

    def overridden(self, overrides: Overrides | None) -> Header:
        """This header as the engine reads it when it is told `overrides`.

        Mirrors ``GGUFMeta::GKV::set`` in src/llama-model-loader.cpp: an override is taken where the file has no such
        key or a value of the same kind. One of another kind is ignored with a warning, and arrays are never
        overridden. Values become what the engine keeps, an unsigned 32-bit integer or a float. What is no override at
        all is left to the host, which refuses it.
        """
        taken: dict[str, Value] = {}
        for key, given in (overrides or {}).items():
            value: Value
            if isinstance(given, (bool, str)):
                value = given
            elif isinstance(given, int):
                value = ctypes.c_uint32(given).value
            elif isinstance(given, float):
                value = ctypes.c_float(given).value
            else:
                continue
            own = self.metadata.get(key)
            if key not in self.lengths and (own is None or type(own) is type(value)):
                taken[key] = value
        return dataclasses.replace(self, metadata={**self.metadata, **taken})


def read_header(path: PathLike) -> Header:
    """The header of `path`, with its other parts' tensors if it is the first part of a split GGUF.

    Raises:
        FileNotFoundError: the file or one of its parts does not exist.
        PermissionError: it may not be read.
        ValueError: it is not a GGUF, has another version or byte order, or is cut off or damaged.
    """
    first = _read(path)
    n_parts = first.metadata.get("split.count", 0)
    if not isinstance(n_parts, int) or n_parts < 2:
        return first
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", first.path, re.DOTALL)
    if name is None or int(name[3]) != n_parts:
        raise ValueError(
            f"{path} is one of {n_parts} parts of a split GGUF and was renamed; expected "
            f"'NAME-00001-of-{n_parts:05}.gguf' and the other parts beside it"
        )
    if first.metadata.get("split.no", 0) != 0:
        raise ValueError(f"{path} is not the first part of a split GGUF; give '{name[1]}-00001-of-{name[3]}.gguf'")
    parts = [first, *(_read(f"{name[1]}-{i:05}-of-{name[3]}.gguf") for i in range(2, n_parts + 1))]
    return dataclasses.replace(
        first,
        tensors={tensor: shape for part in parts for tensor, shape in part.tensors.items()},
        types={tensor: kind for part in parts for tensor, kind in part.types.items()},
        places={tensor: place for part in parts for tensor, place in part.places.items()},
        n_bytes=sum(part.n_bytes for part in parts),
    )


def same_tensors(one: Header, other: Header, names: Iterable[str]) -> list[str]:
    """Those of `names` that both files have, of the same type and shape, and with the same bytes.

    Raises:
        OSError: a file cannot be read.
    """

    def same(name: str) -> bool:
        if (one.types[name], one.tensors[name]) != (other.types[name], other.tensors[name]):
            return False
        ours, theirs = one.places[name], other.places[name]
        with open(ours.path, "rb") as a, open(theirs.path, "rb") as b:
            a.seek(ours.offset)
            b.seek(theirs.offset)
            # Read, not mapped: what is mapped counts as the process's memory.
            sizes = (min(_AT_ONCE, ours.n_bytes - at) for at in range(0, ours.n_bytes, _AT_ONCE))
            return all(a.read(size) == b.read(size) for size in sizes)

    return [name for name in names if name in one.tensors and name in other.tensors and same(name)]


def shown(value: Value | None) -> str:
    """A value in a message, shortened: a damaged file has keys and strings of any length."""
    text = "not there" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _read(path: PathLike) -> Header:
    file = Path(path)
    if not file.is_file():
        found = "it is a directory" if file.is_dir() else "no such file"
        raise FileNotFoundError(f"{file}: {found}; expected a GGUF file")
    state = file.stat()
    try:
        return _read_as_of(str(file), state.st_size, state.st_mtime_ns)
    except PermissionError:
        raise PermissionError(f"{file}: no permission to read it") from None


@functools.lru_cache(maxsize=32)  # a head is read when the draft is made, and again when a Llama takes it
def _read_as_of(path: str, n_bytes: int, modified: int) -> Header:
    if n_bytes == 0:
        raise ValueError(f"{path} is empty; expected a GGUF file: download or copy it again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            beginning = data[:64]
            for pattern, what in _LOOKS_LIKE:
                if re.match(pattern, beginning, re.IGNORECASE):
                    raise ValueError(f"{path} is {what}; expected a GGUF file")
            raise ValueError(f"{path} begins with {beginning[:4]!r}, which no GGUF file does; expected 'GGUF'")
        try:
            return _parse(path, data)
        except (struct.error, OverflowError):
            raise ValueError(
                f"{path} is cut off or damaged: it ends after {n_bytes} bytes, inside its header; download or copy "
                "it again"
            ) from None


class _Reader:
    """Reads a header from front to back; struct.error where the file ends."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 4  # behind the magic

    def number(self, code: str) -> Any:
        (result,) = struct.unpack_from("=" + code, self.data, self.at)
        self.at += struct.calcsize("=" + code)
        return result

    def string(self) -> str:
        n = self.number("Q")
        if n > len(self.data) - self.at:
            raise struct.error
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8", "replace")

    def strings(self, n: int) -> bytes:
        """The bytes of n strings, which are stepped over."""
        length, first, at = struct.Struct("=Q").unpack_from, self.at, self.at
        for _ in range(n):
            at += 8 + length(self.data, at)[0]
        self.at = at
        return self.data[first:at]

    def numbers(self, code: str, n: int) -> tuple[int | float | bool, ...] | None:
        """An array of n numbers; None for a long one, which is stepped over."""
        kept = n <= _LONGEST_ARRAY_KEPT
        result = struct.unpack_from(f"={n}{code}", self.data, self.at) if kept else None
        self.at += n * struct.calcsize("=" + code)
        return result

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}; download or copy it again")


def _parse(path: str, data: mmap.mmap) -> Header:
    reader = _Reader(path, data)
    version = reader.number("I")
    if version & 0xFFFF == 0:
        other = "big" if sys.byteorder == "little" else "little"
        raise ValueError(
            f"{path} is a GGUF in {other}-endian byte order; expected {sys.byteorder}-endian, as this machine is: "
            "convert the checkpoint for it"
        )
    if version not in (2, 3):
        raise ValueError(f"{path} is of GGUF version {version}; expected 2 or 3: convert the checkpoint again")
    n_tensors, n_keys = reader.number("Q"), reader.number("Q")
    header = Header(path, {}, {}, {}, {}, {}, {}, "", len(data))
    for _ in range(n_keys):
        header = _read_key(reader, header)
    infos = [_read_tensor(reader, header) for _ in range(n_tensors)]
    alignment = header.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise reader.damaged(f"general.alignment is {shown(alignment)}; expected an integer of 1 or more")
    start = -(-reader.at // alignment) * alignment
    header.places.update({name: Place(path, start + offset, n_bytes) for name, offset, n_bytes in infos})
    end = max((offset + n_bytes for _, offset, n_bytes in infos), default=0)
    if end:
        end += start
    if end > len(data):
        raise ValueError(
            f"{path} is cut off: it has {len(data)} bytes and its tensors need {end}; download or copy it again"
        )
    return header


def _read_key(reader: _Reader, header: Header) -> Header:
    """The header with one key more."""
    start = reader.at
    key = reader.string()
    if not key or key in header.metadata or key in header.lengths:
        raise reader.damaged(f"the key {shown(key)!r} comes twice" if key else "a key has no name")
    kind = reader.number("I")
    if kind == _STRING:
        header.metadata[key] = reader.string()
    elif kind in NUMBERS:
        header.metadata[key] = reader.number(NUMBERS[kind])
    elif kind != _ARRAY:
        raise reader.damaged(f"the key {shown(key)!r} is of type {kind}; expected 0 to 12")
    else:
        kind, n = reader.number("I"), reader.number("Q")
        header.lengths[key] = n
        if kind == _STRING:
            texts = reader.strings(n)
            if key == "tokenizer.ggml.tokens":
                header = dataclasses.replace(header, vocabulary=hashlib.sha256(texts).hexdigest())
        elif kind not in NUMBERS:
            raise reader.damaged(f"the key {shown(key)!r} is an array of type {kind}; expected 0 to 12, except 9")
        elif (values := reader.numbers(NUMBERS[kind], n)) is not None:
            header.metadata[key] = values
    header.spans[key] = (start, reader.at)
    return header


def _read_tensor(reader: _Reader, header: Header) -> tuple[str, int, int]:
    """Add one tensor to the header; its name, where it begins in the tensors' part of the file, and its bytes."""
    name = reader.string()
    n_dims = reader.number("I")
    if name in header.tensors or n_dims > 4:
        what = f"has {n_dims} dimensions; expected up to 4" if n_dims > 4 else "comes twice"
        raise reader.damaged(f"the tensor {shown(name)!r} {what}")
    shape = tuple(reader.number("Q") for _ in range(n_dims))
    kind, offset = reader.number("I"), reader.number("Q")
    # The engine refuses a type that is unknown here.
    header.types[name], per_block, block = _BLOCKS.get(kind, (f"type {kind}", 1, 0))
    header.tensors[name] = shape
    return name, int(offset), math.prod(shape) // per_block * block
