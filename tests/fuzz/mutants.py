"""Damaged GGUF files, each decided by a seed: what a broken download, converter or disk, or malice, makes of one.

A file is taken apart into keys and tensors, some of which are changed, and put together again so that the rest still
stands where a reader looks for it; so a mutation reaches the code behind the parser. Others cut, flip and shift bytes
without regard to what they mean. Format: ``ggml/include/gguf.h`` of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Format characters of struct by number of a value's type; 8 is a string, 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

#: What a length, a count, an id or a position may be read wrongly for.
INTEGERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000, 4096),
    *(65535, 65536, 10**6, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(-1, -2, -128, -(2**31), -(2**63)),
)
REALS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 3.4e38, float("inf"), float("-inf"), float("nan"), 0.5, 1e4)
STRINGS = (b"", b"\0", b"a\0b", b"\xff\xfe", b"%s%n", b"x" * 70_000, "▁ü🜁".encode(), b"none", b"yarn", b"llama")

#: Types of tensors: all there are, those that were, and some that never will be.
TYPES = (*range(44), 99, 2**31, 2**32 - 1)

#: (elements, bytes) of a block by type, where a tensor of it is to be written in full.
BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 30: (1, 2), 28: (1, 8), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8)},
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 20: (32, 18), 39: (32, 17)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 21: (256, 110), 22: (256, 82), 23: (256, 136)},
    **{29: (256, 56), 34: (256, 54), 35: (256, 66), 40: (64, 36), 41: (128, 18), 42: (64, 18)},
}

#: Keys that the engine looks for and these files have not: (key, type, values).
MORE_KEYS: tuple[tuple[str, int, Sequence[Any]], ...] = (
    ("general.alignment", 4, (0, 1, 2, 3, 8, 31, 64, 4096, 2**31)),
    ("general.alignment", 10, (32,)),
    ("general.type", STRING, (b"adapter", b"mmproj")),
    ("split.count", 2, (0, 1, 2, 65535)),
    ("split.no", 2, (0, 1, 65535)),
    ("split.tensors.count", 5, (0, -1, 7)),
    ("deepseek4.rope.scaling.type", STRING, (b"none", b"linear", b"yarn", b"longrope", b"what")),
    ("deepseek4.rope.scaling.factor", 6, REALS),
    ("deepseek4.rope.scaling.original_context_length", 4, (0, 1, 2**32 - 1)),
    ("deepseek4.rope.scaling.yarn_log_multiplier", 6, REALS),
    ("deepseek4.rope.scaling.yarn_beta_fast", 6, REALS),
    ("deepseek4.rope.scaling.attn_factor", 6, REALS),
    ("deepseek4.rope.dimension_sections", ARRAY, ()),
    ("deepseek4.rope.dimension_count_swa", 4, (0, 1, 3, 8, 64, 2**31)),
    ("deepseek4.rope.freq_base_swa", 6, REALS),
    ("deepseek4.attention.key_length_swa", 4, (0, 1, 16, 64, 2**31)),
    ("deepseek4.attention.value_length_swa", 4, (0, 1, 16, 64, 2**31)),
    ("deepseek4.attention.key_length_mla", 4, (0, 1, 16, 32, 64, 2**31)),
    ("deepseek4.attention.value_length_mla", 4, (0, 1, 16, 32, 64, 2**31)),
    ("deepseek4.attention.kv_lora_rank", 4, (0, 1, 64)),
    ("deepseek4.attention.causal", 7, (False, True)),
    ("deepseek4.attention.clamp_kqv", 6, REALS),
    ("deepseek4.attention.max_alibi_bias", 6, REALS),
    ("deepseek4.attention.sliding_window_pattern", 4, (0, 1, 2, 6)),
    ("deepseek4.attention.group_norm_groups", 4, (0, 1, 2**32 - 1)),
    ("deepseek4.pooling_type", 4, (0, 1, 2, 3, 4, 9)),
    ("deepseek4.leading_dense_block_count", 4, (0, 1, 99)),
    ("deepseek4.feed_forward_length", 4, (0, 64, 2**31)),
    ("deepseek4.expert_group_count", 4, (0, 1, 2, 3, 8, 2**31)),
    ("deepseek4.expert_group_used_count", 4, (0, 1, 2, 3, 8, 2**31)),
    ("deepseek4.decoder_block_count", 4, (0, 1, 99)),
    ("deepseek4.ssm.state_size", 4, (0, 1, 2**31)),
    ("deepseek4.embedding_length_per_layer_input", 4, (0, 64, 2**31)),
    ("deepseek4.use_parallel_residual", 7, (True,)),
    ("deepseek4.tensor_data_layout", STRING, (b"Meta AI original pth", b"x")),
    ("deepseek4.classifier.output_labels", ARRAY, ()),
    ("tokenizer.ggml.unknown_token_id", 4, (0, 511, 512, 2**31, 2**32 - 1)),
    ("tokenizer.ggml.eot_token_id", 4, (0, 511, 512, 2**31, 2**32 - 1)),
    ("tokenizer.ggml.fim_pre_token_id", 4, (0, 512, 2**32 - 1)),
    ("tokenizer.ggml.mask_token_id", 4, (0, 512, 2**32 - 1)),
    ("tokenizer.ggml.token_type_count", 4, (0, 1, 2**31)),
    ("tokenizer.ggml.remove_extra_whitespaces", 7, (True,)),
    ("tokenizer.ggml.precompiled_charsmap", ARRAY, ()),
    ("tokenizer.ggml.scores", ARRAY, ()),
    ("adapter.type", STRING, (b"lora",)),
    ("quantize.imatrix.file", STRING, (b"x",)),
)

#: Tensors that the engine looks for in a head and these files have not: (name behind "blk.<n>.", from which one).
MORE_TENSORS = (
    ("nextn.embed_tokens.weight", "token_embd.weight"),
    ("nextn.shared_head_head.weight", "output.weight"),
    ("exp_probs_b_vl.bias", "exp_probs_b.bias"),
    ("nextn.eh_proj.scale", "attn_norm.weight"),
    ("attn_q_a.scale", "attn_norm.weight"),
    ("ffn_gate_inp.scale", "output_hc_scale.weight"),
    ("ffn_down_exps.scale", "exp_probs_b.bias"),
    ("ffn_gate_tid2eid.weight", "token_embd.weight"),
    ("attn_compressor_kv.weight", "attn_kv.weight"),
    ("rope_freqs.weight", "attn_norm.weight"),
)


@dataclasses.dataclass
class Key:
    name: bytes
    kind: int
    value: Any  # a number, bytes, or (kind, list) of an array
    length: int | None = None  # what is written for the length of a string or array, if not the true one


@dataclasses.dataclass
class Tensor:
    name: bytes
    shape: list[int]
    kind: int
    data: bytes
    offset: int | None = None  # None: behind the tensor before
    n_dims: int | None = None


@dataclasses.dataclass
class File:
    keys: list[Key]
    tensors: list[Tensor]
    version: int = 3
    magic: bytes = b"GGUF"
    n_keys: int | None = None
    n_tensors: int | None = None


def read(path: Path) -> File:
    """A whole and sound GGUF of version 3."""
    data = path.read_bytes()
    at = 0

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def string() -> bytes:
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n : at]

    def value(kind: int) -> Any:
        if kind == STRING:
            return string()
        if kind != ARRAY:
            return take(NUMBERS[kind])
        kind, n = take("I"), take("Q")
        return kind, [value(kind) for _ in range(n)]

    at += 8
    n_tensors, n_keys = take("Q"), take("Q")
    keys = []
    for _ in range(n_keys):
        name, kind = string(), take("I")
        keys.append(Key(name, kind, value(kind)))
    infos = []
    for _ in range(n_tensors):
        name, n_dims = string(), take("I")
        infos.append((name, [take("Q") for _ in range(n_dims)], take("I"), take("Q")))
    start = -(-at // 32) * 32
    ends = [offset for *_, offset in infos[1:]] + [len(data) - start]
    tensors = [Tensor(n, s, k, data[start + o : start + end]) for (n, s, k, o), end in zip(infos, ends)]
    return File(keys, tensors)


def number(code: str, value: Any) -> bytes:
    """`value` as struct packs `code`, cut to what that can hold."""
    if code == "?":
        return bytes([int(bool(value))])
    if code in "fd":
        try:
            return struct.pack("<" + code, float(value))
        except OverflowError:
            return struct.pack("<" + code, float("inf"))
    n = struct.calcsize("<" + code)
    if isinstance(value, float):
        value = int(value) if abs(value) < 1e30 else 0
    return bytes((int(value) % (1 << 8 * n)).to_bytes(n, "little"))


def written(file: File) -> bytes:
    def integer(code: str, value: int) -> bytes:
        return number(code, value)

    def string(text: bytes, length: int | None = None) -> bytes:
        return integer("Q", len(text) if length is None else length) + text

    def value(kind: int, value_: Any, length: int | None) -> bytes:
        if kind == STRING:
            return string(value_, length)
        if kind == ARRAY:
            of, items = value_
            head = integer("I", of) + integer("Q", len(items) if length is None else length)
            return head + b"".join(value(of, item, None) for item in items)
        return number(NUMBERS[kind], value_) if kind in NUMBERS else b"\0\0\0\0"

    out = [file.magic, integer("I", file.version)]
    out.append(integer("Q", len(file.tensors) if file.n_tensors is None else file.n_tensors))
    out.append(integer("Q", len(file.keys) if file.n_keys is None else file.n_keys))
    alignment = 32
    for key in file.keys:
        out += [string(key.name), integer("I", key.kind), value(key.kind, key.value, key.length)]
        if key.name == b"general.alignment" and key.kind == 4 and key.value:
            alignment = min(int(key.value), 1 << 16)
    offset = 0
    for tensor in file.tensors:
        out += [string(tensor.name), integer("I", len(tensor.shape) if tensor.n_dims is None else tensor.n_dims)]
        out += [integer("Q", extent) for extent in tensor.shape]
        out += [integer("I", tensor.kind), integer("Q", offset if tensor.offset is None else tensor.offset)]
        offset += -(-len(tensor.data) // alignment) * alignment
    header = b"".join(out)
    body = [header, bytes(-len(header) % alignment)]
    for tensor in file.tensors:
        body += [tensor.data, bytes(-len(tensor.data) % alignment)]
    return b"".join(body)


# -- mutations: each changes a File in place and says what it did --

Rng = random.Random


def _scalar(rng: Rng, kind: int) -> Any:
    if kind == STRING:
        return rng.choice(STRINGS)
    if kind in (6, 12):
        return rng.choice(REALS)
    return rng.choice(INTEGERS) if kind != 7 else rng.choice((0, 1))


def _model_key(rng: Rng, file: File) -> Key:
    """Any key, those of the architecture more often."""
    own = [key for key in file.keys if key.name.startswith(b"deepseek4.")]
    return rng.choice(own if own and rng.random() < 0.7 else file.keys)


def value_of_a_key(rng: Rng, file: File) -> str:
    key = _model_key(rng, file)
    if key.kind == ARRAY:
        kind, items = key.value
        if not items:
            return "nothing"
        items = list(items)
        for _ in range(rng.choice((1, 1, 3))):
            items[rng.randrange(len(items))] = _scalar(rng, kind)
        key.value = kind, items
        return f"an element of {key.name!r}"
    before = key.value
    near = isinstance(before, int) and rng.random() < 0.5
    key.value = rng.choice((before - 1, before + 1, before * 2, before // 2)) if near else _scalar(rng, key.kind)
    return f"{key.name!r} = {key.value!r:.40}"


def type_of_a_key(rng: Rng, file: File) -> str:
    key = _model_key(rng, file)
    kind = rng.choice((*NUMBERS, STRING, ARRAY, 13, 99))
    old = key.value if key.kind in NUMBERS else 1
    if kind == ARRAY:
        of = rng.choice((*NUMBERS, STRING))
        n = rng.choice((0, 1, 2, 5, 64, 600, 2000))
        key.value = of, [_scalar(rng, of) if rng.random() < 0.5 or of == STRING else old for _ in range(n)]
    elif kind == STRING:
        key.value = rng.choice(STRINGS)
    else:
        key.value = old
    key.kind = kind
    return f"{key.name!r} is of type {kind}: {key.value!r:.40}"


def a_key_gone_or_twice_or_renamed(rng: Rng, file: File) -> str:
    key = _model_key(rng, file)
    what = rng.choice(("gone", "twice", "renamed"))
    if what == "gone":
        file.keys.remove(key)
    elif what == "twice":
        file.keys.insert(rng.randrange(len(file.keys) + 1), dataclasses.replace(key))
    else:
        key.name = rng.choice((b"", key.name + b"x", key.name[:-1], b"a\0b", b"k" * 70_000, rng.choice(file.keys).name))
    return f"{key.name[:40]!r} {what}"


def length_of_a_value(rng: Rng, file: File) -> str:
    key = rng.choice([key for key in file.keys if key.kind in (STRING, ARRAY)] or file.keys)
    if key.kind == ARRAY and rng.random() < 0.6:
        kind, items = key.value
        n = rng.choice((0, 1, 2, len(items) - 1, len(items) + 1, 2 * len(items), 600, 1025))
        key.value = kind, (list(items) * (n // max(1, len(items)) + 1))[: max(0, n)] if items else items
        return f"{key.name!r} has {len(key.value[1])} elements"
    key.length = rng.choice(INTEGERS)
    return f"{key.name!r} says it has a length of {key.length}"


def one_more_key(rng: Rng, file: File) -> str:
    name, kind, values = rng.choice(MORE_KEYS)
    if kind == ARRAY:
        of = rng.choice((*NUMBERS, STRING))
        value: Any = of, [_scalar(rng, of) for _ in range(rng.choice((0, 1, 4, 100)))]
    else:
        value = rng.choice(list(values))
    file.keys.insert(rng.randrange(len(file.keys) + 1), Key(name.encode(), kind, value))
    return f"{name} = {value!r:.40}"


def counts(rng: Rng, file: File) -> str:
    n = rng.choice(INTEGERS)
    if rng.random() < 0.5:
        file.n_keys = rng.choice((n, len(file.keys) - 1, len(file.keys) + 1))
        return f"{file.n_keys} keys"
    file.n_tensors = rng.choice((n, len(file.tensors) - 1, len(file.tensors) + 1))
    return f"{file.n_tensors} tensors"


def version_or_magic(rng: Rng, file: File) -> str:
    if rng.random() < 0.7:
        file.version = rng.choice((0, 1, 2, 4, 2**31, 2**32 - 1, 3 << 24, 2 << 16))
        return f"version {file.version}"
    file.magic = rng.choice((b"FUGG", b"GGUf", b"ggml", b"\0\0\0\0", b"PK\x03\x04"))
    return f"magic {file.magic!r}"


def _fits(tensor: Tensor) -> None:
    """Give the tensor the data that its type and shape ask for, if that is not much."""
    elements, n_bytes = BLOCKS.get(tensor.kind, (1, 4))
    n = 1
    for extent in tensor.shape:
        n *= max(0, extent)
    n = -(-n // elements) * n_bytes
    if n <= 1 << 23:
        data = tensor.data or b"\0"
        tensor.data = (data * (n // len(data) + 1))[:n]


def type_of_a_tensor(rng: Rng, file: File) -> str:
    tensor = rng.choice(file.tensors)
    tensor.kind = rng.choice(TYPES)
    if rng.random() < 0.9:
        _fits(tensor)
    return f"{tensor.name!r} is of type {tensor.kind}"


def types_of_all_tensors(rng: Rng, file: File) -> str:
    kind = rng.choice(tuple(BLOCKS))
    part = rng.choice(("attn", "ffn", "hc", "norm", "nextn", "output", ""))
    for tensor in file.tensors:
        if part.encode() in tensor.name and tensor.shape and tensor.shape[0] % BLOCKS[kind][0] == 0:
            tensor.kind = kind
            _fits(tensor)
    return f"every {part!r} is of type {kind}"


def shape_of_a_tensor(rng: Rng, file: File) -> str:
    tensor = rng.choice(file.tensors)
    shape = tensor.shape
    what = rng.randrange(7)
    i = rng.randrange(len(shape)) if shape else 0
    if what == 0:
        shape.reverse()
    elif what == 1 and shape:
        shape[i] = rng.choice(INTEGERS)
    elif what == 2 and shape:
        shape[i] += rng.choice((-1, 1, 32, -32, 256))
    elif what == 3:
        shape.append(rng.choice((0, 1, 2, 2**62)))
    elif what == 4 and shape:
        shape.pop()
    elif what == 5 and len(shape) > 1:
        shape[:2] = [shape[0] * 2, shape[1] // 2]
    else:
        tensor.n_dims = rng.choice((0, 1, 5, 255, 2**31, 2**32 - 1))
    if rng.random() < 0.8:
        _fits(tensor)
    return f"{tensor.name!r} is {shape}, n_dims {tensor.n_dims}"


def a_tensor_gone_or_twice_or_renamed(rng: Rng, file: File) -> str:
    tensor = rng.choice(file.tensors)
    what = rng.choice(("gone", "twice", "renamed"))
    if what == "gone":
        file.tensors.remove(tensor)
    elif what == "twice":
        file.tensors.insert(rng.randrange(len(file.tensors) + 1), dataclasses.replace(tensor))
    else:
        other = rng.choice(file.tensors).name
        tensor.name = rng.choice((b"", b"x" * 63, b"x" * 64, b"y" * 70_000, tensor.name[:-1], other, b"blk.99.x\0"))
    return f"tensor {tensor.name[:40]!r} {what}"


def one_more_tensor(rng: Rng, file: File) -> str:
    name, source = rng.choice(MORE_TENSORS)
    (block, *_) = [t.name.decode().split(".")[1] for t in file.tensors if b".attn_norm." in t.name] or ["0"]
    like = [tensor for tensor in file.tensors if tensor.name.decode("latin1").endswith(source)]
    if not like:
        return "nothing"
    tensor = dataclasses.replace(like[0], name=f"blk.{block}.{name}".encode(), shape=list(like[0].shape))
    if rng.random() < 0.5:
        tensor.kind = rng.choice(tuple(BLOCKS))
        _fits(tensor)
    file.tensors.append(tensor)
    return f"one more tensor, {tensor.name!r} of type {tensor.kind}"


def two_tensors_swapped(rng: Rng, file: File) -> str:
    one, other = rng.sample(file.tensors, 2)
    one.name, other.name = other.name, one.name
    return f"{one.name!r} and {other.name!r} swapped"


def offset_of_a_tensor(rng: Rng, file: File) -> str:
    tensor = rng.choice(file.tensors)
    tensor.offset = rng.choice((*INTEGERS, 96, 1 << 20, 2**64 - 32, 2**63 - 32))
    return f"{tensor.name!r} is at {tensor.offset}"


def data_of_a_tensor(rng: Rng, file: File) -> str:
    tensor = rng.choice(file.tensors)
    n = len(tensor.data)
    fill = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", struct.pack("<f", float("inf")), b"\xff\xff\x7f\x7f", None))
    tensor.data = rng.randbytes(n) if fill is None else (fill * (n // 4 + 1))[:n]
    return f"{tensor.name!r} is all {fill!r}"


STRUCTURED: tuple[Callable[[Rng, File], str], ...] = (
    *(value_of_a_key, value_of_a_key, value_of_a_key, type_of_a_key, a_key_gone_or_twice_or_renamed),
    *(length_of_a_value, one_more_key, one_more_key, counts, version_or_magic, type_of_a_tensor, type_of_a_tensor),
    *(types_of_all_tensors, shape_of_a_tensor, shape_of_a_tensor, a_tensor_gone_or_twice_or_renamed),
    *(one_more_tensor, two_tensors_swapped, offset_of_a_tensor, data_of_a_tensor),
)


def bytes_flipped(rng: Rng, data: bytearray) -> str:
    n_header = data.find(b"output_hc_scale.weight") + 64  # about
    end = n_header if rng.random() < 0.7 else len(data)
    n = rng.choice((1, 1, 2, 8, 64))
    for _ in range(n):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return f"{n} bits flipped before {end}"


def an_integer_written(rng: Rng, data: bytearray) -> str:
    n_header = data.find(b"output_hc_scale.weight") + 64
    at, code = rng.randrange(4, n_header), rng.choice("IQ")
    value = rng.choice(INTEGERS)
    packed = number(code, value)
    data[at : at + len(packed)] = packed
    return f"{value} written at {at}"


def cut(rng: Rng, data: bytearray) -> str:
    n = rng.choice((rng.randrange(len(data)), rng.randrange(64), len(data) - rng.randrange(1, 64)))
    del data[n:]
    return f"cut off at {n}"


def a_slice_moved(rng: Rng, data: bytearray) -> str:
    at, n = rng.randrange(len(data)), rng.choice((1, 4, 8, 32, 1000))
    if rng.random() < 0.5:
        del data[at : at + n]
        return f"{n} bytes gone at {at}"
    data[at:at] = data[max(0, at - n) : at]
    return f"{n} bytes twice at {at}"


def zeros(rng: Rng, data: bytearray) -> str:
    """As a disk or a download that has holes leaves them."""
    at, n = rng.randrange(len(data)), rng.choice((512, 4096, 65536))
    n = min(n, len(data) - at)
    data[at : at + n] = bytes(n)
    return f"{n} bytes of zeros at {at}"


BYTES: tuple[Callable[[Rng, bytearray], str], ...] = (bytes_flipped, an_integer_written, cut, a_slice_moved, zeros)


def mutated(seed: int, source: Path) -> tuple[bytes, str]:
    """`source` as `seed` would have it, and what was done to it."""
    rng = Rng(seed)
    if rng.random() < 0.2:
        data = bytearray(source.read_bytes())
        what = [rng.choice(BYTES)(rng, data) for _ in range(rng.choice((1, 1, 2))) if len(data) > 100]
        return bytes(data), ", ".join(what)
    file, what = read(source), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if file.keys and len(file.tensors) > 1:
            what.append(rng.choice(STRUCTURED)(rng, file))
    return written(file), ", ".join(what)
