"""What a GGUF file holds, read from its header alone: whether it is whole, which model, and whether two fit together.

Format: ``ggml/include/gguf.h`` of llama.cpp, versions 2 and 3. Only numbers, strings and short arrays are kept; a
vocabulary is stepped over, which is most of the time a header takes (20 ms for 129,280 tokens and as many merges).
"""

from __future__ import annotations

import dataclasses as _dataclasses
import functools as _functools
import hashlib as _hashlib
import mmap as _mmap
import os as _os
import pathlib as _pathlib
import re as _re
import struct as _struct
import sys as _sys
import typing as _t

Path = _t.Union[str, "_os.PathLike[str]"]
Value = _t.Union[int, float, bool, str, "tuple[int | float | bool, ...]"]

#: Kinds of file, as `Model.kind` names them.
TRUNK, HEAD, TRUNK_AND_HEAD = "a model", "an MTP head", "a model with an MTP block"
DSPARK, DS4_HEAD, OTHER = "a DSpark or DFlash head", "an MTP head in the layout of antirez/ds4", "something else"

_ARCHITECTURES = ("deepseek4",)
_CONVERT = "convert_hf_to_gguf.py --mtp"

# Format characters of struct by number of the value's type; 8 is a string, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_ARRAY_KEPT = 1024

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

# What the engine reads of an MTP-only file (llama.cpp, src/models/deepseek4.cpp), less the routing bias, whose name
# depends on the layer.
_ROOT = ("token_embd", "output_norm", "output", "output_hc_fn", "output_hc_base", "output_hc_scale")
_BLOCK = (
    *("attn_norm", "attn_sinks", "attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv", "attn_kv_a_norm"),
    *("attn_output_a", "attn_output_b", "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base"),
    *("hc_ffn_scale", "ffn_gate_inp", "ffn_norm", "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps", "ffn_gate_shexp"),
    *("ffn_down_shexp", "ffn_up_shexp", "nextn.eh_proj", "nextn.enorm", "nextn.hnorm"),
)

# Types that no matrix of a model is of: integers, F64, and what activations are turned into. The engine does not refuse
# them, it has no kernels for them.
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")

# Keys of the architecture that may differ between a model and its head: they count or list blocks, or tell apps
# something.
_MAY_DIFFER = (
    *("block_count", "nextn_predict_layers", "attention.compress_ratios", "swiglu_clamp_exp", "swiglu_clamp_shexp"),
    *("context_length", "vocab_size", "embedding_length_out"),
)
_MAX_LAYERS = 512  # the engine's LLAMA_MAX_LAYERS
_WIDEST_WINDOW = 4096  # rows; a context of three windows, far from a damaged file's gigabytes

# Beginnings of files that are taken for a GGUF.
_LOOKS_LIKE = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: run 'git lfs pull'"),
    (rb"\s*(<!doctype|<html|<\?xml)", "a web page: the download got something else, check its address and your access"),
    (rb"[\s\S]{8}\{\s*\"", "a safetensors file: convert the checkpoint"),
    (rb"PK\x03\x04|\x80\x02", "a PyTorch file: convert the checkpoint"),
    (rb"ggml|fmgg|tjgg|lmgg", "a GGML file of before August 2023: convert the checkpoint"),
    (rb"FUGG", "a GGUF with its bytes in another order: convert the checkpoint on a machine like this"),
)


@_dataclasses.dataclass(frozen=True)
class Header:
    """The header of a GGUF file, or of all parts of one that is split.

    Attributes:
        metadata: keys and values; of an array of strings or a long one, nothing.
        lengths: keys of arrays and how many elements they have.
        tensors: names and shapes, the fastest dimension first.
        types: names of tensors and of their types.
        vocabulary: a digest of the tokens' texts, empty where there are none.
        n_bytes: size of the file, or of all parts.
    """

    path: str
    metadata: dict[str, Value]
    lengths: dict[str, int]
    tensors: dict[str, tuple[int, ...]]
    types: dict[str, str]
    vocabulary: str
    n_bytes: int


@_dataclasses.dataclass(frozen=True)
class Model:
    """What of a model decides whether a head belongs to it. None: the file does not say.

    Attributes:
        kind: one of this module's constants.
        n_layer: layers of the trunk; of a head alone, those of the trunk that it goes on top of.
        n_nextn: MTP blocks in the file.
        n_vocab: tokens.
        n_embd: width of a stream, in elements; n_hc streams make a hidden row.
        n_head, head_dim: heads of attention and their width; all share one KV head.
        window: rows that sliding window attention sees.
        ratios: how many rows each layer compresses to one, 0 for none.
        quant: the type that most bytes are stored in.
    """

    path: str
    kind: str
    architecture: str
    n_layer: int | None
    n_nextn: int
    n_vocab: int | None
    n_embd: Value | None
    n_hc: Value | None
    n_head: Value | None
    head_dim: Value | None
    indexer_head_dim: Value | None
    window: Value | None
    ratios: tuple[int, ...]
    quant: str
    n_bytes: int


def read_header(path: Path) -> Header:
    """The header of `path`, with its other parts' tensors if it is the first part of a split GGUF.

    Raises:
        FileNotFoundError: no such file, or a part of it is not there.
        PermissionError: it may not be read.
        ValueError: it is no GGUF, is of another version or byte order, or is cut off or damaged.
    """
    first = _read(path)
    n_parts = first.metadata.get("split.count", 0)
    if not isinstance(n_parts, int) or n_parts < 2:
        return first
    name = _re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", first.path, _re.DOTALL)
    if name is None or int(name[3]) != n_parts:
        raise ValueError(
            f"{path}: part of a GGUF that is split in {n_parts}, with another name than it was given; expected "
            f"'NAME-00001-of-{n_parts:05}.gguf' and the other parts beside it"
        )
    if first.metadata.get("split.no", 0) != 0:
        raise ValueError(f"{path}: not the first part of a split GGUF; give '{name[1]}-00001-of-{name[3]}.gguf'")
    parts = [first, *(_read(f"{name[1]}-{i:05}-of-{name[3]}.gguf") for i in range(2, n_parts + 1))]
    return _dataclasses.replace(
        first,
        tensors={tensor: shape for part in parts for tensor, shape in part.tensors.items()},
        types={tensor: kind for part in parts for tensor, kind in part.types.items()},
        n_bytes=sum(part.n_bytes for part in parts),
    )


def read_model(path: Path, overrides: _t.Mapping[str, Value] | None = None) -> Model:
    """What `path` holds, to an engine that is told `overrides` in place of its metadata (llama.h, kv_overrides).

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `read_header`.
    """
    header = read_header(path)
    if overrides:
        header = _dataclasses.replace(header, metadata={**header.metadata, **overrides})
    architecture = str(header.metadata.get("general.architecture", ""))

    def value(key: str) -> Value | None:
        return header.metadata.get(f"{architecture}.{key}")

    def integer(key: str) -> int | None:
        number = value(key)
        return number if isinstance(number, int) else None

    n_nextn = sum(name.endswith(".nextn.eh_proj.weight") for name in header.tensors)
    has_trunk = "blk.0.attn_norm.weight" in header.tensors
    n_block = integer("block_count")
    embedding = header.tensors.get("token_embd.weight", ())
    ratios = value("attention.compress_ratios")
    if architecture == "dflash" or any("markov_w1" in name for name in header.tensors):
        kind = DSPARK
    elif any(name.startswith("mtp.0.") for name in header.tensors):
        kind = DS4_HEAD
    elif n_nextn:
        kind = TRUNK_AND_HEAD if has_trunk else HEAD
    else:
        kind = TRUNK if has_trunk else OTHER
    return Model(
        path=header.path,
        kind=kind,
        architecture=architecture,
        n_layer=None if n_block is None else n_block - n_nextn,
        n_nextn=n_nextn,
        n_vocab=embedding[1] if len(embedding) == 2 else header.lengths.get("tokenizer.ggml.tokens"),
        n_embd=value("embedding_length"),
        n_hc=value("hyper_connection.count"),
        n_head=value("attention.head_count"),
        head_dim=value("attention.key_length"),
        indexer_head_dim=value("attention.indexer.key_length"),
        window=value("attention.sliding_window"),
        ratios=tuple(r for r in ratios if isinstance(r, int)) if isinstance(ratios, tuple) else (),
        quant=_quant(header),
        n_bytes=header.n_bytes,
    )


def check_head(path: Path, overrides: _t.Mapping[str, Value] | None = None) -> Model:
    """Whether the engine, told `overrides`, can draft with the MTP-only GGUF `path`.

    Raises:
        FileNotFoundError, PermissionError: as `read_header`.
        ValueError: it cannot; the message says what the file is, what is expected, and what to do.
    """
    head = read_model(path, overrides)
    expected = f"expected an MTP GGUF, as '{_CONVERT}' writes it"
    if head.kind == DSPARK:
        raise ValueError(
            f"{path} is {DSPARK}, which this plugin does not run; expected an MTP head. DeepSeek-V4 checkpoints from "
            f"0731 on come with DSpark alone: take one of before, and convert its head with '{_CONVERT}'"
        )
    if head.kind == DS4_HEAD:
        raise ValueError(
            f"{path} is {DS4_HEAD} (tensors 'mtp.0.*'), which llama.cpp does not read; {expected} from the checkpoint"
        )
    if head.kind == TRUNK_AND_HEAD:
        raise ValueError(
            f"{path} is {TRUNK_AND_HEAD}: they would share one output mixing (output_hc_*), and drafts would be poor; "
            f"{expected}"
        )
    if head.kind != HEAD:
        of = f" of architecture {head.architecture!r}" if head.architecture else ""
        raise ValueError(f"{path} has no MTP (NextN) block: it is {head.kind}{of}; {expected}")
    if head.architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{path} is an MTP head of architecture {head.architecture!r}; expected DeepSeek-V4's ('deepseek4'), the "
            "only one that this plugin drafts for"
        )
    header = read_header(path)
    n_nextn = header.metadata.get("deepseek4.nextn_predict_layers", 0)
    if head.n_nextn != 1 or n_nextn != 1:
        raise ValueError(
            f"{path} has {head.n_nextn} MTP blocks and nextn_predict_layers {n_nextn}; expected 1 and 1: {expected}"
        )
    names = {*(f"{name}.weight" for name in _ROOT), *(f"blk.{head.n_layer}.{name}.weight" for name in _BLOCK)}
    missing = sorted(names - set(header.tensors))
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing[:6])}{' ...' if missing[6:] else ''} (block_count - 1 is "
            f"{head.n_layer}); {expected}, with the trunk's embedding and output in it"
        )
    if head.head_dim == head.indexer_head_dim:
        raise ValueError(
            f"{path}: attention.key_length and attention.indexer.key_length are both {head.head_dim}, which makes the "
            "engine divide by zero; expected different ones (of DeepSeek-V4: 512 and 128)"
        )
    if header.lengths.get("deepseek4.attention.compress_ratios", 0) > _MAX_LAYERS:
        raise ValueError(f"{path} has compress ratios for more than {_MAX_LAYERS} layers, or the engine aborts")
    for name, shape in header.tensors.items():
        kind = header.types[name]
        if len(shape) < 2 and kind != "F32":
            raise ValueError(f"{path}: {name} is of type {kind}; expected F32, or the engine aborts")
        if kind in _NO_WEIGHTS:
            raise ValueError(f"{path}: {name} is of type {kind}, which the engine cannot multiply with")
    return head


def check_base(path: Path, overrides: _t.Mapping[str, Value] | None = None) -> Model:
    """Whether `path` is a model that the engine, told `overrides`, can run and draft for.

    Raises:
        FileNotFoundError, PermissionError: as `read_header`.
        ValueError: it is not; the message says what was found and expected.
    """
    base = read_model(path, overrides)
    if base.kind not in (TRUNK, TRUNK_AND_HEAD):
        raise ValueError(f"{path} is {base.kind}; expected the model that an MTP head belongs to")
    if base.architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{path} is of architecture {base.architecture!r}; expected DeepSeek-V4's ('deepseek4'), the only one that "
            "this plugin drafts for"
        )
    if base.n_hc != 4:
        raise ValueError(f"{path} has {base.n_hc} hyper-connection streams; expected 4, or the engine aborts")
    if not isinstance(base.window, int) or not 0 < base.window <= _WIDEST_WINDOW:
        raise ValueError(
            f"{path} has a sliding window of {_shown(base.window)} rows; expected 1 to {_WIDEST_WINDOW} "
            "(of DeepSeek-V4: 128), because a head's context is three windows"
        )
    if {**read_header(path).metadata, **(overrides or {})}.get("deepseek4.attention.causal", True) is not True:
        raise ValueError(f"{path}: its attention is not causal: tokens evaluated ahead would change those before them")
    if 4 not in base.ratios[: base.n_layer]:
        raise ValueError(
            f"{path}: no layer has a compress ratio of 4 ({list(base.ratios)}), which makes the engine divide by "
            "zero; expected a DeepSeek-V4 model, where every second layer has"
        )
    return base


def check_pair(
    base_path: Path, head_path: Path, overrides: _t.Mapping[str, Value] | None = None
) -> tuple[Model, Model]:
    """Whether the MTP head `head_path` goes on top of the model `base_path`, and the engine can run both.

    Args:
        overrides: metadata that the engine is told to take in place of both files' own.

    Raises:
        FileNotFoundError, PermissionError: as `read_header`.
        ValueError: it does not, or the engine cannot; the message names the file, what was found and expected.
    """
    base, head = check_base(base_path, overrides), check_head(head_path, overrides)
    differences = [
        f"{what} {getattr(head, name)}, expected {getattr(base, name)}"
        for name, what in (
            ("n_vocab", "vocabulary"),
            ("n_embd", "width"),
            ("n_hc", "hyper-connection streams"),
            ("n_head", "attention heads"),
            ("head_dim", "head width"),
            ("window", "sliding window"),
            ("n_layer", "layers below the head"),
        )
        if getattr(head, name) != getattr(base, name)
    ]
    if differences:
        raise ValueError(
            f"{head_path} does not belong to {base_path}: {'; '.join(differences)}. Take the MTP GGUF that was "
            "converted from the same checkpoint"
        )
    of_base, of_head = read_header(base_path), read_header(head_path)
    # What the engine would compute with otherwise than the model does: drafts would be poor, and many a value makes the
    # engine abort.
    ours, theirs = (
        {
            key: of.metadata.get(key, of.lengths.get(key))
            for key in (*of.metadata, *of.lengths)
            if key.startswith("deepseek4.") and key.partition(".")[2] not in _MAY_DIFFER
        }
        for of in (of_head, of_base)
    )
    for key in sorted({*ours, *theirs}):
        if not _same(ours.get(key), theirs.get(key)):
            raise ValueError(
                f"{head_path} does not belong to {base_path}: {_shown(key)} is {_shown(ours.get(key))}, expected "
                f"{_shown(theirs.get(key))}. Take the MTP GGUF that was converted from the same checkpoint"
            )
    if of_head.vocabulary != of_base.vocabulary:
        raise ValueError(
            f"{head_path} does not belong to {base_path}: it has other tokens. Take the MTP GGUF that was converted "
            "from the same checkpoint"
        )
    return base, head


def _same(one: Value | None, other: Value | None) -> bool:
    return one == other or (one != one and other != other)  # a NaN is what it is


def _shown(value: Value | None) -> str:
    """A value in a message: a damaged file has keys and strings of any length."""
    text = "not there" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _quant(header: Header) -> str:
    elements: dict[str, int] = {}
    for name, shape in header.tensors.items():
        n = 1
        for extent in shape:
            n *= extent
        elements[header.types[name]] = elements.get(header.types[name], 0) + n
    return max(elements, key=lambda name: elements[name]) if elements else "no tensors"


def _read(path: Path) -> Header:
    file = _pathlib.Path(path)
    if not file.is_file():
        found = "it is a directory" if file.is_dir() else "no such file"
        raise FileNotFoundError(f"{file}: {found}; expected a GGUF file")
    state = file.stat()
    try:
        return _read_as_of(str(file), state.st_size, state.st_mtime_ns)
    except PermissionError:
        raise PermissionError(f"{file}: no permission to read it") from None


@_functools.lru_cache(maxsize=32)  # a pair is looked at when the draft is made and when a Llama takes it
def _read_as_of(path: str, n_bytes: int, modified: int) -> Header:
    if n_bytes == 0:
        raise ValueError(f"{path}: the file is empty; expected a GGUF file: download or copy it again")
    with open(path, "rb") as file, _mmap.mmap(file.fileno(), 0, access=_mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            beginning = data[:64]
            for pattern, what in _LOOKS_LIKE:
                if _re.match(pattern, beginning, _re.IGNORECASE):
                    raise ValueError(f"{path} is {what}; expected a GGUF file")
            raise ValueError(f"{path} begins with {beginning[:4]!r}, which no GGUF file does; expected 'GGUF'")
        try:
            return _parse(path, data)
        except (_struct.error, OverflowError):
            raise ValueError(
                f"{path} is cut off or damaged: it ends after {n_bytes} bytes, inside its header; download or copy "
                "it again"
            ) from None


def _parse(path: str, data: _mmap.mmap) -> Header:
    def damaged(what: str) -> ValueError:
        return ValueError(f"{path} is damaged: {what}; download or copy it again")

    at = 4

    def number(code: str) -> _t.Any:
        nonlocal at
        (result,) = _struct.unpack_from("=" + code, data, at)
        at += _struct.calcsize("=" + code)
        return result

    def string() -> str:
        nonlocal at
        n = number("Q")
        if n > len(data) - at:
            raise _struct.error
        result = data[at : at + n].decode("utf-8", "replace")
        at += n
        return result

    version = number("I")
    if version & 0xFFFF == 0:
        other = "big" if _sys.byteorder == "little" else "little"
        raise ValueError(
            f"{path}: a GGUF in {other}-endian byte order, this machine is {_sys.byteorder}-endian; expected a file "
            "converted for it"
        )
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version}; expected 2 or 3: convert the checkpoint with this llama.cpp")
    n_tensors, n_keys = number("Q"), number("Q")

    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    vocabulary = ""
    for _ in range(n_keys):
        key = string()
        if not key or key in metadata or key in lengths:
            raise damaged(f"the key {_shown(key)!r} comes twice" if key else "a key without a name")
        kind = number("I")
        if kind == _STRING:
            metadata[key] = string()
        elif kind in _NUMBERS:
            metadata[key] = number(_NUMBERS[kind])
        elif kind != _ARRAY:
            raise damaged(f"the key {_shown(key)!r} is of type {kind}, which there is not")
        else:
            kind, n = number("I"), number("Q")
            lengths[key] = n
            if kind == _STRING:
                length = _struct.Struct("=Q").unpack_from
                first = at
                for _ in range(n):
                    at += 8 + length(data, at)[0]
                if key == "tokenizer.ggml.tokens":
                    vocabulary = _hashlib.sha256(data[first:at]).hexdigest()
            elif kind in _NUMBERS:
                code = f"={n}{_NUMBERS[kind]}" if n <= _LONGEST_ARRAY_KEPT else ""
                if code:
                    metadata[key] = _struct.unpack_from(code, data, at)
                at += n * _struct.calcsize("=" + _NUMBERS[kind])
            else:
                raise damaged(f"the key {_shown(key)!r} is an array of type {kind}, which there is not")

    tensors: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    end = 0
    for _ in range(n_tensors):
        name = string()
        n_dims = number("I")
        if name in tensors or n_dims > 4:
            raise damaged(
                f"the tensor {_shown(name)!r} {'has more than 4 dimensions' if n_dims > 4 else 'comes twice'}"
            )
        shape = tuple(number("Q") for _ in range(n_dims))
        kind, offset = number("I"), number("Q")
        # A type that is not known here is the engine's to refuse.
        types[name], per_block, block = _BLOCKS.get(kind, (f"type {kind}", 1, 0))
        n = 1
        for extent in shape:
            n *= extent
        tensors[name] = shape
        end = max(end, offset + n // per_block * block)

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise damaged(f"general.alignment is {alignment}")
    if end:
        end += -(-at // alignment) * alignment
    if end > len(data):
        raise ValueError(
            f"{path} is cut off: it has {len(data)} bytes, its tensors need {end}; download or copy it again"
        )
    return Header(path, metadata, lengths, tensors, types, vocabulary, len(data))
