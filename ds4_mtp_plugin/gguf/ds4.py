"""antirez/ds4's own file of an MTP head, and the file that the engine reads in its place.

ds4's file (``mtp_weights_bind`` in its ds4.c) has 32 tensors ``mtp.0.*`` of the one block, and nothing that says of
which model they are. The engine's (``graph_mtp`` in llama.cpp's src/models/deepseek4.cpp) has them as the block behind
the trunk's last, beside the trunk's embedding, output and metadata. Only names differ, and that ds4's two input
projections are one matrix there: each of its rows is the row for the embedding and behind it the one for the hidden
row. Blocks of quantised types do not cross a row, so no value changes.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from . import deepseek4, heads
from .header import NUMBERS, TYPES, Header, PathLike, Place, Value, read_header, shown

__all__ = ["Plan", "plan", "write"]

_PREFIX = "mtp.0."
# The embedding's first.
_PROJECTIONS = (f"{_PREFIX}e_proj.weight", f"{_PREFIX}h_proj.weight")
# The output mixing is the head's own, and lies where a trunk has its own.
_ROOT = {f"hc_head_{part}.weight": f"output_hc_{part}.weight" for part in ("fn", "base", "scale")}
_NEXTN = {
    f"{theirs}.weight": f"nextn.{ours}.weight"
    for theirs, ours in (("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "shared_head_norm"))
}
_BLOCK = (*(f"{name}.weight" for name in deepseek4.BLOCK), "exp_probs_b.bias")
_OF_BASE = ("token_embd.weight", "output.weight", "output_norm.weight")

_UINT32 = 4  # of the format's numbers for types of values
_GATING = "deepseek4.expert_gating_func"
_SQRT_SOFTPLUS = 4  # of the engine's numbers, the only one that it takes
_CHUNK = 1 << 23  # bytes that are in memory at once


@dataclasses.dataclass(frozen=True)
class Plan:
    """A head's file before it is written.

    Attributes:
        header: what `read_header` will say of it, except the places and sizes.
        keys: the metadata, as the file has it.
        sources: names of tensors, and where their bytes come from; of two places rows are taken in turn.
        n_bytes: its size.
    """

    header: Header
    keys: tuple[bytes, ...]
    sources: dict[str, tuple[Place, ...]]

    @property
    def n_bytes(self) -> int:
        return sum(len(part) for part in _beginning(self)) + sum(map(self._padded, self.sources.values()))

    def _padded(self, places: tuple[Place, ...]) -> int:
        n_bytes = sum(place.n_bytes for place in places)
        return n_bytes + -n_bytes % _alignment(self.header)


def plan(ds4_path: PathLike, base_path: PathLike) -> Plan:
    """How the engine's file is made of ds4's file and the model's. Only headers are read.

    Raises:
        FileNotFoundError, PermissionError: as `read_header`.
        ValueError: one of the files is another one, damaged or cut off, or they do not belong together.
    """
    found = heads.read_model(ds4_path)
    if found.kind in (heads.HEAD, heads.DSPARK):
        raise ValueError(f"{ds4_path} is {found.kind} as the engine reads it: there is nothing to convert")
    if found.kind != heads.DS4_HEAD:
        raise ValueError(f"{ds4_path} is {found.kind}; expected {heads.DS4_HEAD}, with 32 tensors 'mtp.0.*'")
    trunk = heads.check_base(base_path)
    if trunk.architecture != "deepseek4" or trunk.kind != heads.TRUNK or not trunk.n_layer:
        raise ValueError(
            f"{base_path} is {trunk.kind} of architecture {shown(trunk.architecture)!r} with {trunk.n_layer} layers; "
            f"expected the DeepSeek-V4 model that {ds4_path} belongs to"
        )
    head, base = read_header(ds4_path), read_header(base_path)
    _check_tensors(head, base, trunk.n_layer)
    result = _planned(head, base, trunk.n_layer)
    # A model without the key is told it when it is loaded, and so is its head then.
    heads.check_headers(base.overridden({_GATING: _SQRT_SOFTPLUS}), result.header)
    return result


def write(planned: Plan, file: IO[bytes], progress: Callable[[int], None]) -> None:
    """Write the head to the empty `file`; `progress` is told the bytes of tensors, a few megabytes at a time.

    Raises:
        OSError: of the disk.
        ValueError: a source became shorter.
    """
    for part in _beginning(planned):
        file.write(part)
    alignment = _alignment(planned.header)
    for name, places in planned.sources.items():
        n_bytes = 0
        for chunk in _chunks(places, planned.header.tensors[name]):
            file.write(chunk)
            progress(len(chunk))
            n_bytes += len(chunk)
        file.write(bytes(-n_bytes % alignment))


def _check_tensors(head: Header, base: Header, n_layer: int) -> None:
    """Whether the file has the tensors of a head, and those the shapes of this model's."""
    if lacking := [name for name in _OF_BASE if name not in base.tensors]:
        raise ValueError(f"{base.path} lacks {', '.join(lacking)}; expected a whole DeepSeek-V4 model")
    n_embd = base.tensors["output_norm.weight"]
    last = f"blk.{n_layer - 1}."
    expected = {
        **dict.fromkeys(_PROJECTIONS, n_embd * 2),
        **{f"{_PREFIX}{name}": base.tensors.get(ours) for name, ours in _ROOT.items()},
        **{f"{_PREFIX}{name}": n_embd for name in _NEXTN},
        **{f"{_PREFIX}{name}": base.tensors.get(f"{last}{name}") for name in _BLOCK},
    }
    missing, unknown = sorted(expected.keys() - head.tensors), sorted(head.tensors.keys() - expected)
    if missing or unknown:
        names = ", ".join((missing or unknown)[:6])
        raise ValueError(
            f"{head.path} {'lacks' if missing else 'has'} {shown(names)}; expected {heads.DS4_HEAD}, with "
            f"{len(expected)} tensors 'mtp.0.*' and no others: take the file that was published for antirez/ds4"
        )
    differences = [
        f"{name} is {list(head.tensors[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if shape is not None and head.tensors[name] != shape
    ]
    if differences:
        raise ValueError(
            f"{head.path} does not belong to {base.path}: {'; '.join(differences[:6])}. Take the MTP file that was "
            "published for this model"
        )
    if len({head.types[name] for name in _PROJECTIONS}) > 1:
        kinds = " and ".join(head.types[name] for name in _PROJECTIONS)
        raise ValueError(f"{head.path}: {' and '.join(_PROJECTIONS)} are of types {kinds}; expected one type")
    for header, name in (*((head, name) for name in expected), *((base, name) for name in _OF_BASE)):
        if header.types[name] not in TYPES:
            raise ValueError(f"{header.path}: {name} is of {header.types[name]}, whose size is not known here")


def _planned(head: Header, base: Header, n_layer: int) -> Plan:
    sources: dict[str, tuple[Place, ...]] = {name: (base.places[name],) for name in _OF_BASE}
    names = {name: name for name in _OF_BASE}  # whose shape and type each has
    block = f"blk.{n_layer}."
    for theirs, ours in (
        *_ROOT.items(),
        *((name, f"{block}{name}") for name in _BLOCK),
        *((name, f"{block}{ours}") for name, ours in _NEXTN.items()),
    ):
        sources[ours], names[ours] = (head.places[f"{_PREFIX}{theirs}"],), f"{_PREFIX}{theirs}"
    eh_proj = f"{block}nextn.eh_proj.weight"
    sources[eh_proj], names[eh_proj] = tuple(head.places[name] for name in _PROJECTIONS), _PROJECTIONS[0]
    n_embd = head.tensors[_PROJECTIONS[0]][0]
    shapes, types = {**base.tensors, **head.tensors}, {**base.types, **head.types}
    keys, metadata, lengths = _metadata(base, n_layer)
    header = dataclasses.replace(
        base,
        path=head.path,
        metadata=metadata,
        lengths=lengths,
        tensors={ours: shapes[names[ours]] for ours in sources} | {eh_proj: (2 * n_embd, n_embd)},
        types={ours: types[names[ours]] for ours in sources},
        places={},
    )
    return Plan(header, keys, sources)


def _metadata(base: Header, n_layer: int) -> tuple[tuple[bytes, ...], dict[str, Value], dict[str, int]]:
    """The model's keys for one block more: as they are stored, and as a `Header` has them."""
    counts = {"deepseek4.block_count": n_layer + 1, "deepseek4.nextn_predict_layers": 1}
    if _GATING not in base.spans:
        counts[_GATING] = _SQRT_SOFTPLUS
    # Parts of a split file are the model's own affair.
    spans = {key: span for key, span in base.spans.items() if not key.startswith("split.") and key not in counts}
    metadata = {key: value for key, value in base.metadata.items() if key in spans}
    lengths = {key: n for key, n in base.lengths.items() if key in spans}
    keys = []
    with open(base.path, "rb") as file:
        for key, (start, end) in spans.items():
            file.seek(start)
            stored = file.read(end - start)
            values = metadata.get(key)
            if key.startswith("deepseek4.") and isinstance(values, tuple) and len(values) >= n_layer:
                # A value for each block: the engine wants one for the head's too, which compresses nothing.
                of_head = (0,) if key.endswith("compress_ratios") else values[n_layer : n_layer + 1] or values[-1:]
                metadata[key] = of_all = (*values[:n_layer], *of_head)
                lengths[key] = len(of_all)
                stored = _array(key, stored, of_all)
            keys.append(stored)
    return (*keys, *(_uint32(key, n) for key, n in counts.items())), {**metadata, **counts}, lengths


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("=Q", len(data)) + data


def _uint32(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("=II", _UINT32, value)


def _array(key: str, stored: bytes, values: tuple[int | float | bool, ...]) -> bytes:
    """The key with other values, of the type that they have in `stored`."""
    name = _string(key)
    kind, of_values = struct.unpack_from("=II", stored, len(name))
    return name + struct.pack(f"=IIQ{len(values)}{NUMBERS[of_values]}", kind, of_values, len(values), *values)


def _alignment(header: Header) -> int:
    value = header.metadata.get("general.alignment", 32)
    assert isinstance(value, int)  # `read_header` saw to it
    return value


def _beginning(planned: Plan) -> Iterator[bytes]:
    """The file up to its first tensor."""
    header, alignment = planned.header, _alignment(planned.header)
    parts = [b"GGUF", struct.pack("=IQQ", 3, len(planned.sources), len(planned.keys)), *planned.keys]
    offset = 0
    for name, places in planned.sources.items():
        shape = header.tensors[name]
        parts += [_string(name), struct.pack(f"=I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("=IQ", TYPES[header.types[name]], offset))
        offset += sum(place.n_bytes for place in places)
        offset += -offset % alignment
    yield from parts
    yield bytes(-sum(map(len, parts)) % alignment)


def _chunks(places: tuple[Place, ...], shape: tuple[int, ...]) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time."""
    if len(places) == 1:
        (place,) = places
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            for done in range(0, place.n_bytes, _CHUNK):
                yield _read(file, min(_CHUNK, place.n_bytes - done), place.path)
        return
    n_rows = shape[1]
    n_row = places[0].n_bytes // n_rows
    n_at_once = max(1, _CHUNK // (n_row * len(places)))
    for first in range(0, n_rows, n_at_once):
        n = min(n_at_once, n_rows - first)
        rows = []
        for place in places:
            with open(place.path, "rb") as file:
                file.seek(place.offset + first * n_row)
                rows.append(np.frombuffer(_read(file, n * n_row, place.path), np.uint8).reshape(n, n_row))
        yield np.concatenate(rows, axis=1).tobytes()


def _read(file: IO[bytes], n: int, path: str) -> bytes:
    data = file.read(n)
    if len(data) < n:
        raise ValueError(f"{path} became shorter while it was read; let nothing write to it and try again")
    return data
