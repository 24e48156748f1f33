"""The rules of DeepSeek-V4: what the engine needs of its files (llama.cpp, src/models/deepseek4.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .header import Header, shown

if TYPE_CHECKING:
    from .heads import Model

__all__ = ["INSIDE", "MAY_DIFFER", "NAME", "SEVERAL", "WIDEST_WINDOW", "check_base", "check_head"]

NAME = "DeepSeek-V4"
# In the model's own file both would share one output mixing.
INSIDE = False
SEVERAL = False

# They count or list blocks, or tell apps something.
MAY_DIFFER: tuple[str, ...] = (
    *("block_count", "nextn_predict_layers", "attention.compress_ratios", "swiglu_clamp_exp", "swiglu_clamp_shexp"),
    *("context_length", "vocab_size", "embedding_length_out"),
)

# What the engine reads of an MTP-only file, except the routing bias, whose name depends on the layer.
_ROOT = ("token_embd", "output_norm", "output", "output_hc_fn", "output_hc_base", "output_hc_scale")
_BLOCK = (
    *("attn_norm", "attn_sinks", "attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv", "attn_kv_a_norm"),
    *("attn_output_a", "attn_output_b", "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base"),
    *("hc_ffn_scale", "ffn_gate_inp", "ffn_norm", "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps", "ffn_gate_shexp"),
    *("ffn_down_shexp", "ffn_up_shexp", "nextn.eh_proj", "nextn.enorm", "nextn.hnorm"),
)

_MAX_LAYERS = 512  # the engine's LLAMA_MAX_LAYERS
WIDEST_WINDOW = 4096  # rows: the head's context is three windows, and a damaged file may ask for gigabytes


def check_head(header: Header, head: Model) -> None:
    """Refuse a head that the engine cannot load or would abort on."""
    path = header.path
    names = {*(f"{name}.weight" for name in _ROOT), *(f"blk.{head.n_layer}.{name}.weight" for name in _BLOCK)}
    missing = sorted(names - set(header.tensors))
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing[:6])}{' ...' if missing[6:] else ''} (block_count - 1 is "
            f"{head.n_layer}); expected an MTP GGUF with the trunk's embedding and output in it, as "
            "'convert_hf_to_gguf.py --mtp' writes it"
        )
    if head.head_dim == head.indexer_head_dim:
        raise ValueError(
            f"{path}: attention.key_length and attention.indexer.key_length are both {shown(head.head_dim)}, which "
            "makes the engine divide by zero; expected different ones (512 and 128 in DeepSeek-V4)"
        )
    n_ratios = header.lengths.get("deepseek4.attention.compress_ratios", 0)
    if n_ratios > _MAX_LAYERS:
        raise ValueError(
            f"{path} has compress ratios for {n_ratios} layers; expected {_MAX_LAYERS} at most: the engine aborts on "
            "more"
        )


def check_base(header: Header, base: Model) -> None:
    """Refuse a model that the engine aborts on, or that a head's context does not fit."""
    path = header.path
    if base.n_hc != 4:
        raise ValueError(
            f"{path} has {shown(base.n_hc)} hyper-connection streams; expected 4: the engine aborts on any other number"
        )
    if not isinstance(base.window, int) or not 0 < base.window <= WIDEST_WINDOW:
        raise ValueError(
            f"{path} has a sliding window of {shown(base.window)} rows; expected 1 to {WIDEST_WINDOW} (128 in "
            "DeepSeek-V4): the head's context is three windows"
        )
    if 4 not in base.ratios[: base.n_layer]:
        raise ValueError(
            f"{path}: no layer has a compress ratio of 4 ({shown(base.ratios)}), which makes the engine divide by "
            "zero; expected a DeepSeek-V4 model, where every second layer has one"
        )
