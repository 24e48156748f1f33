"""The families that have MTP blocks with a graph in llama.cpp (``src/models/*.cpp``), DeepSeek-V4 apart.

Their heads are as a rule in the model's own file (``convert_hf_to_gguf.py``), or beside it (``--mtp``, ``--no-mtp``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .deepseek4 import WIDEST_WINDOW
from .header import Header, shown

if TYPE_CHECKING:
    from .heads import Model

__all__ = ["FAMILIES", "WITHOUT_GRAPH", "Family"]

_NEXTN = ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm")


@dataclass(frozen=True)
class Family:
    """The rules of a family.

    Attributes:
        NAME: models of it that people know.
        MAY_DIFFER: keys, without the architecture's prefix, that may differ between a model and a head's own file: they
            count or list blocks, or tell apps something.
        INSIDE: a head in the model's own file can be used.
        SEVERAL: there may be several heads, one for each draft.
        needs: what a head's block has to have beside nextn's tensors, where the engine asserts it.
        refuse: why the engine would abort on a head, None where it would not.
    """

    NAME: str
    needs: tuple[str, ...] = ()
    refuse: Callable[[Header, Model], str | None] = lambda header, head: None
    INSIDE: bool = True
    SEVERAL: bool = False
    MAY_DIFFER: tuple[str, ...] = (
        *("block_count", "nextn_predict_layers", "context_length", "vocab_size", "embedding_length_out"),
        *("attention.head_count", "attention.head_count_kv", "attention.recurrent_layers"),
        *("attention.sliding_window_pattern", "swiglu_clamp_exp", "swiglu_clamp_shexp"),
        *("feed_forward_length", "expert_feed_forward_length", "leading_dense_block_count"),
    )

    def check_head(self, header: Header, head: Model) -> None:
        """Refuse a head that the engine cannot load or would abort on."""
        names = {f"{block}{name}.weight" for block in head.blocks for name in (*_NEXTN, *self.needs)}
        names |= {"token_embd.weight", "output_norm.weight"}
        missing = sorted(names - set(header.tensors))
        if missing:
            raise ValueError(
                f"{header.path} lacks {', '.join(missing[:6])}{' ...' if missing[6:] else ''} (block_count less the "
                f"MTP blocks is {head.n_layer}); expected a GGUF as convert_hf_to_gguf.py writes it"
            )
        if (why := self.refuse(header, head)) is not None:
            raise ValueError(f"{header.path}: {why}")

    def check_base(self, header: Header, base: Model) -> None:
        """Nothing that is not the engine's own to refuse."""


def _glm4moe(header: Header, head: Model) -> str | None:
    if "glm4moe.rope.dimension_sections" in {*header.metadata, *header.lengths}:
        return (
            "its rotary dimensions are in sections (GLM-4.5V), for which the engine's MTP graph has no positions; "
            "expected a GLM-4.5 or 4.6 model for text"
        )
    return None


def _mla(header: Header, head: Model) -> str | None:
    dense, scale = (
        header.metadata.get(f"{head.architecture}.{key}", 0)
        for key in ("leading_dense_block_count", "attention.temperature_scale")
    )
    if isinstance(dense, int) and dense > (head.n_layer or 0):
        return f"leading_dense_block_count is {dense}; expected {head.n_layer} at most: the MTP block has experts"
    if scale and head.architecture == "deepseek2":
        return f"attention.temperature_scale is {shown(scale)}, for which the engine has no MTP graph; expected 0"
    for key in ("attention.q_lora_rank", "attention.key_length_mla"):
        value = header.metadata.get(f"{head.architecture}.{key}", 0)
        if not isinstance(value, int) or value < 1:
            return f"{key} is {shown(value)}; the engine's MTP graph needs one, as of GLM-4.7-Flash"
    return None


def _hy_v3(header: Header, head: Model) -> str | None:
    return _ffn(header, head, merged=True)


def _ffn(header: Header, head: Model, *, merged: bool) -> str | None:
    """Each block has all of its experts, which may have two matrices `merged` in one, or of its dense network."""
    needed: tuple[str, ...]
    for block in head.blocks:
        if f"{block}ffn_gate_inp.weight" not in header.tensors:
            needed = _DENSE
        elif merged and f"{block}ffn_gate_up_exps.weight" in header.tensors:
            needed = _EXPERTS[2:]
        else:
            needed = _EXPERTS
        missing = [name for name in needed if f"{block}{name}.weight" not in header.tensors]
        if missing:
            return f"its MTP block {block.removesuffix('.')} lacks {', '.join(missing)}"
    return None


def _windowed(header: Header, head: Model) -> str | None:
    window = head.window
    if not isinstance(window, int) or not 0 < window <= WIDEST_WINDOW:
        return f"attention.sliding_window is {shown(window)}; expected 1 to {WIDEST_WINDOW} rows"
    for block in head.blocks:
        if not {"output.weight", f"{block}nextn.shared_head_head.weight"} & set(header.tensors):
            return f"neither output.weight nor {block}nextn.shared_head_head.weight is there; expected one of them"
    return None


def _step35(header: Header, head: Model) -> str | None:
    return _windowed(header, head) or _ffn(header, head, merged=False)


_MLA = ("attn_q_a", "attn_k_b", "attn_v_b", "ffn_gate_inp")
_DENSE = ("ffn_gate", "ffn_up", "ffn_down")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_GLM = ("ffn_gate_inp", "ffn_gate_shexp")

#: By architecture.
FAMILIES = {
    "qwen35": Family("Qwen3.5, 3.6 and 3.8, dense"),
    "qwen35moe": Family("Qwen3.5 and 3.6 with experts", ("ffn_gate_inp",)),
    "qwen3next": Family("Qwen3-Next", ("ffn_gate_inp",)),
    "glm4moe": Family("GLM-4.5 and 4.6", _GLM, _glm4moe),
    "deepseek2": Family("GLM-4.7-Flash", _MLA, _mla),
    "deepseek32": Family("DeepSeek-V3.2", _MLA, _mla),
    "glm-dsa": Family("GLM-5", _MLA, _mla),
    "hy_v3": Family("Hunyuan V3", (), _hy_v3, SEVERAL=True),
    "nemotron_h_moe": Family("Nemotron 3 with experts", ("ffn_gate_inp", "nextn.shared_head_norm")),
    "bailingmoe3": Family("Ling 3", _MLA[1:]),
    "cohere2moe": Family("Command A with experts", ("ffn_gate_inp",)),
    "step35": Family("Step-3.5 and 3.7", (), _step35, SEVERAL=True),
    "mimo2": Family("MiMo-V2 and V2.5", ("attn_qkv", *_DENSE), _windowed, SEVERAL=True),
}

#: Architectures whose MTP tensors the engine keeps, or leaves out, without a graph that this package drives.
WITHOUT_GRAPH = {
    **dict.fromkeys(
        ("dots3note", "exaone-moe", "bailingmoe2", "glm4", "exaone4", "glm5-next"),
        "llama.cpp keeps its MTP tensors, but has no graph for them",
    ),
    **dict.fromkeys(
        ("ernie4_5", "ernie4_5-moe", "hy_v4", "qwen4exp", "minicpm", "minicpm3"),
        "convert_hf_to_gguf.py leaves its MTP head out",
    ),
    "gemma4-assistant": "its head reads the memory of its model, which this package does not share",
}
