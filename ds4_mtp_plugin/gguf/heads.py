"""Which head a GGUF file holds, whether this package can draft with it, and for which model.

What is true of one family of models only is in `deepseek4` and `families`, listed in `_FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from . import deepseek4, dspark
from .families import FAMILIES, WITHOUT_GRAPH
from .header import Header, Overrides, PathLike, Value, read_header, shown

__all__ = [
    "DS4_HEAD",
    "DSPARK",
    "HEAD",
    "OTHER",
    "TRUNK",
    "TRUNK_AND_HEAD",
    "Model",
    "check_base",
    "check_head",
    "check_inside",
    "check_pair",
    "read_model",
]

#: Kinds of file, as `Model.kind` names them.
TRUNK, HEAD, TRUNK_AND_HEAD = "a model", "an MTP head", "a model with an MTP block"
DSPARK, DS4_HEAD, OTHER = "a DSpark head", "an MTP head in the layout of antirez/ds4", "something else"

_CONVERT = "convert_hf_to_gguf.py --mtp"
_SAME_CHECKPOINT = "Take the MTP GGUF that was converted from the same checkpoint"

# Types that activations are turned into, or that hold no weights. The engine loads matrices of them, but has no kernels
# to multiply with.
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")


@dataclasses.dataclass(frozen=True)
class Model:
    """What decides whether a head belongs to a model. None: the file does not say.

    Attributes:
        path: the file, or its first part.
        kind: one of this module's constants.
        architecture: the engine's name of the family, empty where the file has none.
        n_layer: layers of the trunk; for a head alone, those of the trunk that it goes on top of.
        n_nextn: MTP blocks in the file; several are several heads, one for each draft.
        n_vocab: tokens.
        n_embd: width of a stream, in elements; n_hc streams make a hidden row.
        n_head, head_dim: attention heads and their width; of some families, heads of each block.
        window: rows that sliding window attention sees.
        ratios: how many rows each layer compresses into one, 0 for none.
        quant: the type that most elements are stored in.
        n_bytes: size of the file, or of all parts.
        n_block: the most tokens that a DSpark head drafts, 0 for any other.
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
    n_block: int = 0

    @property
    def blocks(self) -> list[str]:
        """What the names of its MTP blocks' tensors begin with."""
        n_layer = self.n_layer or 0
        return [f"blk.{i}." for i in range(n_layer, n_layer + self.n_nextn)]


class _Family(Protocol):
    """The rules of one family.

    The checks raise a ValueError where the engine could not run the file. Its message names the file, what was found
    and what was expected.
    """

    @property
    def NAME(self) -> str: ...  # noqa: N802

    @property
    def INSIDE(self) -> bool:  # noqa: N802
        """Whether a head in the model's own file can be used."""

    @property
    def SEVERAL(self) -> bool:  # noqa: N802
        """Whether there may be several heads, one for each draft."""

    @property
    def MAY_DIFFER(self) -> tuple[str, ...]:  # noqa: N802
        """Keys, without the architecture's prefix, that may differ between a model and a head's own file."""

    def check_head(self, header: Header, head: Model) -> None: ...

    def check_base(self, header: Header, base: Model) -> None: ...


_FAMILIES: dict[str, _Family] = {"deepseek4": deepseek4, **FAMILIES}


def read_model(path: PathLike, overrides: Overrides | None = None) -> Model:
    """What `path` holds, to an engine that is told `overrides` in place of its metadata (llama.h, kv_overrides).

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `read_header`.
    """
    return _model(read_header(path).overridden(overrides))


def check_head(path: PathLike, overrides: Overrides | None = None) -> Model:
    """Whether the engine, told `overrides`, can draft with the MTP-only GGUF `path`.

    Raises:
        FileNotFoundError, PermissionError: as `read_header`.
        ValueError: it cannot; the message says what the file is, what is expected, and what to do.
    """
    return _head(read_header(path).overridden(overrides))


def check_base(path: PathLike, overrides: Overrides | None = None) -> Model:
    """Whether `path` is a model that the engine, told `overrides`, can run and draft for.

    Raises:
        FileNotFoundError, PermissionError: as `read_header`.
        ValueError: it is not; the message says what was found and expected.
    """
    return _base(read_header(path).overridden(overrides))


def check_inside(path: PathLike, overrides: Overrides | None = None) -> Model:
    """Whether `path` is a model with an MTP head in its own file that the engine, told `overrides`, can draft with.

    Raises:
        FileNotFoundError, PermissionError: as `read_header`.
        ValueError: it is not; the message says what was found and what to do.
    """
    header = read_header(path).overridden(overrides)
    base = _base(header)
    if base.kind == TRUNK:
        declared = header.metadata.get(f"{base.architecture}.nextn_predict_layers", 0)
        raise ValueError(
            f"{path} has no MTP block in it"
            + (f", though nextn_predict_layers is {shown(declared)}" if declared else "")
            + f". Take a GGUF that has one ('{_CONVERT.removesuffix(' --mtp')}' keeps it), or the head's own file: "
            "MtpDraft('...-MTP.gguf')"
        )
    family = _family(base, "")
    if not family.INSIDE:
        raise ValueError(
            f"{path} is {TRUNK_AND_HEAD}: both would share one output mixing (output_hc_*), and drafts would be poor; "
            f"expected the head in a file of its own, as '{_CONVERT}' writes it: MtpDraft('...-MTP.gguf')"
        )
    _check_block(header, base, family)
    return base


def check_pair(base_path: PathLike, head_path: PathLike, overrides: Overrides | None = None) -> tuple[Model, Model]:
    """Whether the MTP head `head_path` goes on top of the model `base_path`, and the engine can run both.

    Args:
        overrides: metadata that the engine is told to take in place of both files' own.

    Raises:
        FileNotFoundError, PermissionError: as `read_header`.
        ValueError: it does not, or the engine cannot; the message names the file, what was found and expected.
    """
    of_base = read_header(base_path).overridden(overrides)
    base = _base(of_base)
    of_head = read_header(head_path).overridden(overrides)
    head = _head(of_head)
    if head.kind == DSPARK:
        dspark.check_pair(of_base, base, of_head, head)
        return base, head
    differences = [
        f"{what} {getattr(head, name)}, expected {getattr(base, name)}"
        for name, what in (
            ("architecture", "architecture"),
            ("n_vocab", "vocabulary"),
            ("n_embd", "width"),
            ("n_hc", "hyper-connection streams"),
            ("n_head", "attention heads"),
            ("head_dim", "head width"),
            ("window", "sliding window"),
            ("n_layer", "layers below the head"),
        )
        if _of_trunk(head, name) != _of_trunk(base, name)
    ]
    # The engine would compute the head otherwise than its model: drafts would be poor, and many a value aborts it.
    ours, theirs = _shared_keys(of_head), _shared_keys(of_base)
    if not differences:
        differences = [
            f"{shown(key)} is {shown(ours.get(key))}, expected {shown(theirs.get(key))}"
            for key in sorted({*ours, *theirs})
            if not _same(ours.get(key), theirs.get(key))
        ]
    if not differences and of_head.vocabulary != of_base.vocabulary:
        differences = ["its vocabulary has other tokens"]
    if differences:
        more = "; ..." if differences[8:] else ""
        raise ValueError(
            f"{head.path} does not belong to {base.path}: {'; '.join(differences[:8])}{more}. {_SAME_CHECKPOINT}"
        )
    return base, head


def _model(header: Header) -> Model:
    architecture = str(header.metadata.get("general.architecture", ""))

    def value(key: str) -> Value | None:
        return header.metadata.get(f"{architecture}.{key}")

    n_nextn = sum(name.endswith(".nextn.eh_proj.weight") for name in header.tensors)
    has_trunk = "blk.0.attn_norm.weight" in header.tensors
    n_block = value("block_count")
    embedding = header.tensors.get("token_embd.weight", ())
    ratios = value("attention.compress_ratios")
    if architecture == dspark.ARCHITECTURE or any("markov_w1" in name for name in header.tensors):
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
        n_layer=n_block - n_nextn if isinstance(n_block, int) else None,
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
        n_block=dspark.n_block(header) if kind == DSPARK else 0,
    )


def _head(header: Header) -> Model:
    path, head = header.path, _model(header)
    expected = f"expected an MTP GGUF, as '{_CONVERT}' writes it"
    if head.kind == DSPARK:
        dspark.check_head(header, head)
        _check_types(header, ("",))
        return head
    if head.kind == DS4_HEAD:
        raise ValueError(
            f"{path} is {DS4_HEAD} (tensors 'mtp.0.*'), which llama.cpp does not read; {expected} from the checkpoint"
        )
    if head.kind == TRUNK_AND_HEAD:
        family = _FAMILIES.get(head.architecture)
        raise ValueError(
            f"{path} is {TRUNK_AND_HEAD}: "
            + (
                "give it to the Llama, and the draft no path: MtpDraft()"
                if family is not None and family.INSIDE
                else f"both would share one output mixing (output_hc_*), and drafts would be poor; {expected}"
            )
        )
    if head.kind != HEAD:
        of = f" of architecture {shown(head.architecture)!r}" if head.architecture else ""
        raise ValueError(f"{path} has no MTP (NextN) block: it is {head.kind}{of}; {expected}")
    _check_block(header, head, _family(head, "an MTP head"))
    return head


def _check_block(header: Header, head: Model, family: _Family) -> None:
    """Whether the engine can run the MTP block that is in the file."""
    path = header.path
    n_nextn = header.metadata.get(f"{head.architecture}.nextn_predict_layers", 0)
    if head.n_nextn != n_nextn or (head.n_nextn != 1 and not family.SEVERAL):
        raise ValueError(
            f"{path} has {head.n_nextn} MTP blocks and nextn_predict_layers {shown(n_nextn)}; expected "
            f"{'as many of one as of the other' if family.SEVERAL else '1 and 1'}, as '{_CONVERT}' writes them"
        )
    family.check_head(header, head)
    # What the engine makes of a trunk it makes of it without a draft too.
    _check_types(header, tuple(head.blocks) if head.kind == TRUNK_AND_HEAD else ("",))


def _check_types(header: Header, prefixes: tuple[str, ...]) -> None:
    """Whether the engine can multiply with the tensors whose names begin so."""
    path = header.path
    for name, shape in header.tensors.items():
        kind = header.types[name]
        if not name.startswith(prefixes):
            continue
        if len(shape) < 2 and kind != "F32":
            raise ValueError(f"{path}: {shown(name)} is of type {kind}; expected F32: the engine aborts on any other")
        if kind in _NO_WEIGHTS:
            raise ValueError(
                f"{path}: {shown(name)} is of type {kind}, which the engine cannot multiply with; expected a type that "
                "models are stored in, such as F16 or Q4_K"
            )


def _base(header: Header) -> Model:
    base = _model(header)
    if base.kind not in (TRUNK, TRUNK_AND_HEAD):
        raise ValueError(f"{header.path} is {base.kind}; expected the model that an MTP head belongs to")
    family = _family(base, "")
    if header.metadata.get(f"{base.architecture}.attention.causal", True) is False:
        raise ValueError(
            f"{header.path}: its attention is not causal, so drafts would change the tokens before them; expected a "
            "model with causal attention"
        )
    family.check_base(header, base)
    return base


def _family(model: Model, what: str) -> _Family:
    family = _FAMILIES.get(model.architecture)
    if family is None:
        known = " or ".join(f"{name!r} ({each.NAME})" for name, each in _FAMILIES.items())
        why = WITHOUT_GRAPH.get(model.architecture, "this package drives no other head")
        raise ValueError(
            f"{model.path} is {f'{what} ' if what else ''}of architecture {shown(model.architecture)!r}; expected "
            f"{known}: {why}. NgramDraft() drafts from the text of any model"
        )
    return family


def _shared_keys(header: Header) -> dict[str, Value | None]:
    """What a head and its model have to agree on; of an array that is not kept, its length."""
    architecture = str(header.metadata["general.architecture"])
    may_differ = {f"{architecture}.{key}" for key in _FAMILIES[architecture].MAY_DIFFER}
    return {
        key: header.metadata.get(key, header.lengths.get(key))
        for key in (*header.metadata, *header.lengths)
        if key.startswith(f"{architecture}.") and key not in may_differ
    }


def _of_trunk(model: Model, name: str) -> object:
    """An attribute; where it has a value for each block, those of the trunk's."""
    value = getattr(model, name)
    return value[: model.n_layer] if isinstance(value, tuple) else value


def _same(one: Value | None, other: Value | None) -> bool:
    return one == other or (one != one and other != other)  # NaN is equal to NaN here


def _quant(header: Header) -> str:
    elements: dict[str, int] = {}
    for name, shape in header.tensors.items():
        elements[header.types[name]] = elements.get(header.types[name], 0) + math.prod(shape)
    return max(elements, key=lambda name: elements[name]) if elements else "no tensors"
