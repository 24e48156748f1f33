"""Tiny Hugging Face checkpoints with an MTP head, in the layout that their families are published in, and what
``transformers`` makes of them.

The model is ``transformers``' own, of random weights, with a layer more than it says: that one is the head's block. So
what is compared with the engine is another implementation, and what is converted is what it writes itself
(``save_pretrained``), under the names that a head has in checkpoints. ``transformers`` is imported when it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

N_VOCAB = 300
_PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
SPECIAL = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>", "<|im_end|>")

_SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
}
_GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 32}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}


@dataclass(frozen=True)
class Kind:
    """A family in ``transformers``.

    Attributes:
        model: the name of its class.
        config: its configuration, except the number of layers; what is of each layer has the head's too.
        n_layer: layers of the trunk.
        published: what config.json has beside that.
        head: the head's own tensors in checkpoints.
        block: what the names of the head's layer begin with in checkpoints, or of each of its layers.
        pre: the engine's name of the pre-tokenizer that the family has.
        stem: what the names of layers begin with.
    """

    model: str
    config: Mapping[str, Any]
    n_layer: int
    published: Mapping[str, Any]
    head: Mapping[str, str]
    block: tuple[str, ...] = ("model.layers.{n_layer}.",)
    pre: str = "qwen2"
    stem: str = "model.layers."


_NUMBERED = {
    "eh_proj": "model.layers.{n_layer}.eh_proj.weight",
    "enorm": "model.layers.{n_layer}.enorm.weight",
    "hnorm": "model.layers.{n_layer}.hnorm.weight",
    "norm": "model.layers.{n_layer}.shared_head.norm.weight",
}
_QWEN = {
    "eh_proj": "mtp.fc.weight",
    "enorm": "mtp.pre_fc_norm_embedding.weight",
    "hnorm": "mtp.pre_fc_norm_hidden.weight",
    "norm": "mtp.norm.weight",
}

_HYBRID: dict[str, Any] = {
    **_SIZES,
    **_GQA,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
_MROPE = {**_HYBRID["rope_parameters"], "mrope_section": [3, 3, 2], "mrope_interleaved": True}
_QWEN_EXPERTS: dict[str, Any] = {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}
_GLM_EXPERTS: dict[str, Any] = {**_EXPERTS, "n_routed_experts": 4, "num_nextn_predict_layers": 1}
# Of 16 heads, because ReLU makes exact ties of the scores of few.
_INDEXER: dict[str, Any] = {
    "index_topk": 32,
    "index_head_dim": 128,
    "index_n_heads": 16,
    "first_k_dense_replace": 1,
}

#: By the engine's names.
KINDS: dict[str, Kind] = {
    "qwen35": Kind(
        "Qwen3_5ForCausalLM",
        {**_HYBRID, "rope_parameters": _MROPE},
        4,
        {"mtp_num_hidden_layers": 1},
        _QWEN,
        ("mtp.layers.0.",),
        "qwen35",
    ),
    "qwen35moe": Kind(
        "Qwen3_5MoeForCausalLM",
        {**_HYBRID, **_QWEN_EXPERTS, "rope_parameters": _MROPE},
        4,
        {"mtp_num_hidden_layers": 1},
        _QWEN,
        ("mtp.layers.0.",),
        "qwen35",
    ),
    "qwen3next": Kind("Qwen3NextForCausalLM", {**_HYBRID, **_QWEN_EXPERTS}, 4, {}, _QWEN, ("mtp.layers.0.",)),
    "glm4moe": Kind(
        "Glm4MoeForCausalLM", {**_SIZES, **_GQA, **_GLM_EXPERTS, "use_qk_norm": True}, 3, {}, _NUMBERED, pre="glm4"
    ),
    "deepseek2": Kind(
        "Glm4MoeLiteForCausalLM",
        {**_SIZES, **_MLA, **_GLM_EXPERTS},
        3,
        # The engine knows GLM-4.7-Flash's gating by its size; any other model has to say it.
        {"first_k_dense_replace": 1, "scoring_func": "sigmoid"},
        _NUMBERED,
        pre="glm4",
    ),
    "glm-dsa": Kind(
        "GlmMoeDsaForCausalLM", {**_SIZES, **_MLA, **_GLM_EXPERTS, **_INDEXER}, 3, {}, _NUMBERED, pre="glm4"
    ),
    "deepseek32": Kind(
        "DeepseekV32ForCausalLM",
        {**_SIZES, **_MLA, **_GLM_EXPERTS, **_INDEXER, "n_group": 1, "topk_group": 1},
        3,
        {"scoring_func": "sigmoid"},
        _NUMBERED,
        pre="deepseek-v3",
    ),
    "hy_v3": Kind(
        "HYV3ForCausalLM",
        {**_SIZES, **_GQA, **_EXPERTS, "num_experts": 4, "num_nextn_predict_layers": 1},
        3,
        {},
        _NUMBERED,
        pre="hunyuan",
    ),
    "cohere2moe": Kind(
        "Cohere2MoeForCausalLM",
        {
            **_SIZES,
            **_GQA,
            "num_experts_per_tok": 2,
            "num_experts": 4,
            "num_shared_experts": 1,
            "expert_selection_fn": "sigmoid",
            "first_k_dense_replace": 1,
            "prefix_dense_intermediate_size": 96,
            "sliding_window": 16,
            "logit_scale": 0.25,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        },
        3,
        {"num_nextn_predict_layers": 1},
        _NUMBERED,
        pre="tekken",
    ),
    "nemotron_h_moe": Kind(
        "NemotronHForCausalLM",
        {
            **{name: value for name, value in {**_SIZES, **_GQA}.items() if name != "vocab_size"},
            **_EXPERTS,
            "vocab_size": 304,  # the converter makes it a multiple of 8
            "layers_block_type": ["linear_attention", "full_attention", "moe"] * 2 + ["full_attention", "moe"],
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 2,
            "chunk_size": 32,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        },
        6,
        {"num_nextn_predict_layers": 1, "hybrid_override_pattern": "M*EM*E"},
        {
            **{name: f"mtp.layers.0.{name}.weight" for name in ("eh_proj", "enorm", "hnorm")},
            "norm": "mtp.layers.1.final_layernorm.weight",
        },
        ("mtp.layers.0.", "mtp.layers.1."),
        "pixtral",
        "backbone.layers.",
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and what the model in it computes.

    Attributes:
        tokens: a text, shape (n,).
        logits: of the trunk, shape (n, n_vocab).
        hidden: rows that the head is fed, behind the trunk's last norm, shape (n, n_embd).
        drafts: logits of the head at positions 1 to n - 1, each fed its token and the row before, (n - 1, n_vocab).
    """

    folder: Path
    tokens: npt.NDArray[np.int64]
    logits: F32
    hidden: F32
    drafts: F32


def write(kind: str, folder: Path, *, n_tokens: int = 80, seed: int = 0) -> Checkpoint:
    """Write the checkpoint to the folder, and compute what it is."""
    import torch
    import transformers

    family = KINDS[kind]
    torch.manual_seed(seed)
    n_layer = family.n_layer
    model_class = getattr(transformers, family.model)
    n_all = n_layer + len(family.block)
    model = model_class(model_class.config_class(**family.config, num_hidden_layers=n_all)).eval()
    config, base = model.config, model.model
    width, last_norm = config.hidden_size, getattr(base, _norm(base))
    eps = next(getattr(config, name) for name in _EPSILONS if getattr(config, name, None))
    head = {name: type(last_norm)(width, eps=eps) for name in ("enorm", "hnorm", "norm")}
    if kind == "nemotron_h_moe":
        # As the engine has it (src/models/nemotron-h-moe.cpp). NVIDIA's TensorRT-LLM has an RMS norm there.
        head["norm"] = torch.nn.LayerNorm(width, eps, bias=False)
        for layer in base.layers:
            # The published limit. transformers takes time_step_min, of the initialisation, and the engine none.
            layer.mixer.time_step_limit = tuple(config.time_step_limit)
    head["eh_proj"] = torch.nn.Linear(2 * width, width, bias=False)
    for module in (model, *head.values()):
        randomise(module)
    model.save_pretrained(folder)
    _publish(folder, family, head)
    write_tokenizer(folder)

    tokens = torch.randint(len(SPECIAL), N_VOCAB, (1, n_tokens))
    blocks = base.layers[n_layer:]
    with torch.no_grad():
        hidden = _run(model, base.layers[:n_layer], slice(n_layer), last_norm, input_ids=tokens)
        fed = torch.cat([head["enorm"](model.get_input_embeddings()(tokens[:, 1:])), head["hnorm"](hidden[:, :-1])], -1)
        positions = torch.arange(1, n_tokens)[None]
        # The engine's heads attend to all that came before, with rotated positions.
        for module in blocks.modules():
            if hasattr(module, "index_topk"):
                module.index_topk = n_tokens
            if hasattr(module, "force_rope"):
                module.force_rope = True
        fed = head["eh_proj"](fed)
        out = _run(model, blocks, slice(n_layer, None), head["norm"], inputs_embeds=fed, position_ids=positions)
        logits, drafts = (model.lm_head(rows) * getattr(config, "logit_scale", 1.0) for rows in (hidden, out))
    return Checkpoint(folder, tokens[0].numpy(), *(rows[0].numpy() for rows in (logits, hidden, drafts)))


def _norm(base: Any) -> str:
    return "norm" if hasattr(base, "norm") else "norm_f"


def _run(model: Any, layers: Any, which: slice, norm: Any, **inputs: Any) -> Any:
    """The rows behind some of the layers and a norm, with positions and masks as the model makes them."""
    import torch

    base, config = model.model, model.config
    of_all = {name: getattr(config, name) for name in _PER_LAYER if getattr(config, name, None) is not None}
    base.layers, config.num_hidden_layers = torch.nn.ModuleList(layers), len(layers)
    setattr(base, _norm(base), norm)
    for name, values in of_all.items():
        setattr(config, name, values[which])
    rows = base(**inputs, use_cache=False).last_hidden_state
    for name, values in of_all.items():
        setattr(config, name, values)
    return rows


def randomise(module: Any) -> None:
    """Weights by which every part has a say in the logits."""
    import torch

    with torch.no_grad():
        for name, values in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("e_score_correction_bias") or values.ndim == 1 and values.is_floating_point():
                if "inv_freq" not in name:
                    values.add_(0.1 * torch.randn(values.shape))
            elif values.ndim >= 2 and values.is_floating_point():
                values.copy_(torch.randn(values.shape) * values.shape[-1] ** -0.5)


def _publish(folder: Path, family: Kind, head: Mapping[str, Any]) -> None:
    """Name the last layers, and the head's own tensors, as a checkpoint has them."""
    from safetensors.torch import load_file, save_file

    n_layer, path = family.n_layer, folder / "model.safetensors"
    names = {f"{family.stem}{n_layer + i}.": block.format(n_layer=n_layer) for i, block in enumerate(family.block)}

    def published(name: str) -> str:
        for ours, theirs in names.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    tensors = {published(name): values for name, values in load_file(path).items()}
    tensors |= {family.head[name].format(n_layer=n_layer): module.weight.detach() for name, module in head.items()}
    save_file({name: values.contiguous() for name, values in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": n_layer, **family.published}
    for name in _PER_LAYER:
        if config.get(name) is not None:
            config[name] = config[name][:n_layer]
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE of the bytes, behind special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merge = characters[40], characters[41]
    vocab = {text: i for i, text in enumerate((*SPECIAL, *characters, "".join(merge)))}
    tokenizer = Tokenizer(models.BPE(vocab, [merge]))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), SPECIAL[0]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
