"""A tiny DeepSeek-V4 checkpoint, as `checkpoints` makes those of other families.

Its experts are in 4 bits (MXFP4), as published, and the head's projections are values that Q8_0 holds, in which the
converter stores them: so what was converted is, behind all types, what `transformers` computes with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.fixtures.ds4_gguf import finish
from tests.reference.checkpoints import N_VOCAB, SPECIAL, Checkpoint, randomise, write_tokenizer

N_LAYER, _N_EXPERT, _HC = 3, 4, 4
_RATIOS = [0, 4, 128, 0]  # the head's last
_CONFIG: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "n_routed_experts": _N_EXPERT,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 16,
    "max_position_embeddings": 4096,
    "compress_ratios": _RATIOS,
    "num_hash_layers": 1,
    "qk_rope_head_dim": 16,
}
# Values of 4 bits (OCP Microscaling formats, E2M1) by code.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_EXPONENT = -5  # of all blocks' scales


def write(folder: Path, *, n_tokens: int = 300, seed: int = 0) -> Checkpoint:
    """Write the checkpoint to the folder, and compute what it is."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**_CONFIG, num_hidden_layers=N_LAYER + 1)).eval()
    base, width = model.model, model.config.hidden_size
    head: dict[str, Any] = {name: type(base.norm)(width) for name in ("enorm", "hnorm", "norm")}
    head |= {name: torch.nn.Linear(width, width, bias=False) for name in ("e_proj", "h_proj")}
    hc_head = type(base.hc_head)(model.config)
    for module in (model, hc_head, *head.values()):
        randomise(module)
    with torch.no_grad():
        for name in ("e_proj", "h_proj"):
            codes = torch.randint(-127, 128, (width, width))
            codes[:, ::32] = 127
            head[name].weight.copy_(codes * 2.0**-9)
        packed = {f"layers.{i}": _quantise(layer.mlp.experts) for i, layer in enumerate(base.layers)}
        base.layers[0].mlp.gate.tid2eid.copy_(torch.stack([torch.randperm(_N_EXPERT)[:2] for _ in range(N_VOCAB)]))
    model.save_pretrained(folder)
    _publish(folder, packed, head, hc_head)
    write_tokenizer(folder)

    tokens = torch.randint(len(SPECIAL), N_VOCAB, (1, n_tokens))
    block, streams = base.layers[N_LAYER], []
    with torch.no_grad():
        base.layers = base.layers[:N_LAYER]
        base.layers[-1].register_forward_hook(lambda module, args, out: streams.append(out))
        logits = model.lm_head(base(tokens, use_cache=False).last_hidden_state)
        embedded = base.embed_tokens(tokens[:, 1:])
        fed = head["e_proj"](head["enorm"](embedded)).unsqueeze(2) + head["h_proj"](head["hnorm"](streams[0][:, :-1]))
        block.register_forward_pre_hook(lambda module, args: (fed, *args[1:]))
        base.layers, base.hc_head, base.norm = torch.nn.ModuleList([block]), hc_head, head["norm"]
        positions = torch.arange(1, n_tokens)[None]
        out = base(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        drafts = model.lm_head(out)
    hidden = streams[0].flatten(2)
    return Checkpoint(folder, tokens[0].numpy(), *(rows[0].numpy() for rows in (logits, hidden, drafts)))


def _quantise(experts: Any) -> dict[str, npt.NDArray[np.uint8]]:
    """Make the weights of experts some that 4 bits hold, and give them as a checkpoint has them."""
    import torch

    rng = np.random.default_rng(int(torch.randint(1 << 30, ())))
    stored: dict[str, npt.NDArray[np.uint8]] = {}

    def draw(name: str, shape: tuple[int, ...]) -> Any:
        codes = rng.integers(0, 16, shape, np.uint8)
        stored[f"{name}.weight"] = codes[:, ::2] | codes[:, 1::2] << 4
        stored[f"{name}.scale"] = np.full((shape[0], shape[1] // 32), 127 + _EXPONENT, np.uint8)
        return torch.from_numpy(np.where(codes & 8, -1, 1) * _E2M1[codes & 7] * np.float32(2.0**_EXPONENT))

    for i in range(_N_EXPERT):
        n_ff, width = experts.down_proj.shape[2], experts.down_proj.shape[1]
        experts.gate_up_proj[i, :n_ff] = draw(f"ffn.experts.{i}.w1", (n_ff, width))
        experts.gate_up_proj[i, n_ff:] = draw(f"ffn.experts.{i}.w3", (n_ff, width))
        experts.down_proj[i] = draw(f"ffn.experts.{i}.w2", (width, n_ff))
    return stored


def _publish(folder: Path, packed: dict[str, dict[str, Any]], head: dict[str, Any], hc_head: Any) -> None:
    """Name all tensors as DeepSeek does, and put the experts' 4 bits in place of their values."""
    import torch
    from safetensors.torch import load_file, save_file

    path, last = folder / "model.safetensors", f"layers.{N_LAYER}."

    def published(name: str) -> str:
        name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
        name = name.replace(".attn.norm.", ".attn.kv_norm.")
        return f"mtp.0.{name.removeprefix(last)}" if name.startswith(last) else name

    tensors = {published(name): values for name, values in load_file(path).items()}
    for layer, stored in packed.items():
        for name, values in stored.items():
            tensors[published(f"{layer}.{name}")] = torch.from_numpy(values)
    tensors |= {f"mtp.0.{name}.weight": module.weight.detach() for name, module in head.items()}
    tensors |= {f"mtp.0.{name.replace('hc_', 'hc_head_')}": values for name, values in hc_head.state_dict().items()}
    save_file({name: values.contiguous() for name, values in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **_CONFIG, "num_hidden_layers": N_LAYER}, indent=1))


def in_float32(path: Path, out: Path) -> Path:
    """The GGUF with all weights as float32: kernels for quantised ones round what they multiply with."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "deepseek4")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    dequantize: Callable[..., Any] = gguf.quants.dequantize
    for tensor in reader.tensors:
        whole = tensor.tensor_type == gguf.GGMLQuantizationType.I32
        writer.add_tensor(tensor.name, tensor.data if whole else dequantize(tensor.data, tensor.tensor_type))
    finish(writer)
    return out
