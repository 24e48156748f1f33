"""The rules of DSpark heads (llama.cpp, src/models/dflash.cpp): what the engine needs of the file, and of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .deepseek4 import WIDEST_WINDOW
from .header import Header, shown

if TYPE_CHECKING:
    from .heads import Model

__all__ = ["ARCHITECTURE", "check_head", "check_pair", "n_block"]

ARCHITECTURE = "dflash"

_CONVERT = "convert_hf_to_gguf.py --dspark --target-model-dir DIR"
_ROOT = ("fc", "enc.output_norm", "output_norm", "output_hc_fn", "output_hc_base", "output_hc_scale")
_MARKOV = ("markov_w1", "markov_w2")
_BLOCK = ("attn_norm", "attn_sinks", "attn_kv", "attn_kv_a_norm", "ffn_gate_inp", "ffn_norm", "ffn_gate_shexp")
_SIZES = (
    *("embedding_length", "block_count", "attention.head_count", "attention.key_length", "attention.q_lora_rank"),
    *("attention.output_group_count", "attention.output_lora_rank", "rope.dimension_count"),
    *("expert_count", "expert_used_count", "expert_feed_forward_length"),
)
_MOST = 64  # tokens of a block, stages, layers of the target: a damaged file may ask for any number


def n_block(header: Header) -> int:
    """Tokens that the head drafts in one decode; 0 where the file does not say."""
    value = header.metadata.get("dflash.block_size", 0)
    return value if isinstance(value, int) else 0


def check_head(header: Header, head: Model) -> None:
    """Refuse a head that the engine cannot load, would abort on, or that this package does not drive."""
    path = header.path
    if head.architecture != ARCHITECTURE or head.n_hc is None:
        raise ValueError(
            f"{path} is a DSpark or DFlash head of architecture {shown(head.architecture)!r} without hyper-connection "
            "streams; expected the DSpark head of a DeepSeek-V4 model: this package drives no other"
        )
    if head.n_hc != 4:
        raise ValueError(
            f"{path} has {shown(head.n_hc)} hyper-connection streams; expected 4: the engine aborts on others"
        )
    _check_sizes(header)
    _check_tensors(header, head)
    if not 1 <= n_block(header) <= _MOST:
        raise ValueError(
            f"{path}: block_size is {shown(header.metadata.get('dflash.block_size'))}; expected 1 to {_MOST} (5 in "
            "DeepSeek-V4): the engine aborts without one"
        )
    for key, expected in (("attention.head_count_kv", 1), ("embedding_length_out", head.n_embd)):
        if (value := header.metadata.get(f"dflash.{key}", expected)) != expected:
            raise ValueError(f"{path}: {key} is {shown(value)}; expected {shown(expected)}")
    if header.metadata.get("dflash.sample_from_anchor", True) is False:
        raise ValueError(f"{path}: sample_from_anchor is false, which DeepSeek-V4's heads are not; expected true")
    if not isinstance(header.metadata.get("tokenizer.ggml.mask_token_id"), int):
        raise ValueError(f"{path} names no mask token; expected a DSpark head as '{_CONVERT}' writes it")
    if not isinstance(head.window, int) or not n_block(header) <= head.window <= WIDEST_WINDOW:
        raise ValueError(
            f"{path} has a sliding window of {shown(head.window)} rows; expected {n_block(header)}, its block, to "
            f"{WIDEST_WINDOW}"
        )
    layers = header.metadata.get("dflash.target_layers", ())
    width = header.tensors["fc.weight"][0]
    if not isinstance(layers, tuple) or not 1 <= len(layers) <= _MOST or width != len(layers) * (head.n_embd or 0):
        raise ValueError(
            f"{path}: target_layers is {shown(layers)}, and fc reads {width} values; expected {shown(head.n_embd)} for "
            "each layer"
        )


def _check_sizes(header: Header) -> None:
    path = header.path
    sizes: dict[str, int] = {}
    for key in _SIZES:
        value = header.metadata.get(f"dflash.{key}")
        if isinstance(value, tuple) and value:  # one for each stage
            value = min(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key} is {shown(value)}; expected 1 or more: the engine aborts on any other")
        sizes[key] = value
    if sizes["block_count"] > _MOST:
        raise ValueError(f"{path}: block_count is {sizes['block_count']}; expected {_MOST} at most (3 in DeepSeek-V4)")
    for more, less, divides in (
        ("expert_count", "expert_used_count", False),
        ("attention.key_length", "rope.dimension_count", False),
        ("attention.head_count", "attention.output_group_count", True),
    ):
        if sizes[less] > sizes[more] or (divides and sizes[more] % sizes[less]):
            raise ValueError(
                f"{path}: {less} is {sizes[less]} with {more} {sizes[more]}, which the engine aborts on; expected a "
                f"DSpark head as '{_CONVERT}' writes it"
            )


def _check_tensors(header: Header, head: Model) -> None:
    path = header.path
    n_layer = head.n_layer or 0
    names = {f"{name}.weight" for name in (*_ROOT, *_MARKOV)}
    names |= {f"blk.{i}.{name}.weight" for i in range(n_layer) for name in _BLOCK}
    if missing := sorted(names - set(header.tensors)):
        raise ValueError(
            f"{path} lacks {', '.join(missing[:6])}{' ...' if missing[6:] else ''}; expected a DSpark head as "
            f"'{_CONVERT}' writes it"
        )
    for name in ("fc.weight", *(f"{each}.weight" for each in _MARKOV)):
        if len(header.tensors[name]) != 2:
            raise ValueError(f"{path}: {name} has {len(header.tensors[name])} dimensions; expected 2")


def check_pair(of_base: Header, base: Model, of_head: Header, head: Model) -> None:
    """Refuse a head that belongs to another model."""
    differences = [
        f"{what} {shown(ours)}, expected {shown(theirs)}"
        for what, ours, theirs in (
            ("width", head.n_embd, base.n_embd),
            ("hyper-connection streams", head.n_hc, base.n_hc),
            ("sliding window", head.window, base.window),
            ("vocabulary", head.n_vocab, base.n_vocab),
            ("vocabulary of its Markov chain", of_head.tensors["markov_w1.weight"][1], base.n_vocab),
        )
        if ours != theirs
    ]
    if base.architecture != "deepseek4":
        differences.append(f"a model of architecture {shown(base.architecture)!r}, expected 'deepseek4'")
    layers = of_head.metadata["dflash.target_layers"]
    if isinstance(layers, tuple) and not all(0 <= layer <= (base.n_layer or 0) for layer in layers):
        differences.append(f"target_layers {shown(layers)}, expected 0 to {base.n_layer}")
    if not differences and of_head.vocabulary != of_base.vocabulary:
        differences = ["its vocabulary has other tokens"]
    if differences:
        raise ValueError(
            f"{head.path} does not belong to {base.path}: {'; '.join(differences)}. Take the DSpark GGUF that was "
            f"converted with '{_CONVERT}' from the same checkpoint"
        )
