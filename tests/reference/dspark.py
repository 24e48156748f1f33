"""DeepSeek-V4's DSpark head in PyTorch: a block of drafts at once, written to be the explanation of it.

Shapes as in :mod:`tests.reference.model`; n is the number of tokens of a block, W the attention window, R the rank of
the Markov chain.

**What it reads.** Of some of the trunk's layers the input, averaged over the streams, one behind the other; through
``fc`` and a norm that is the *row* g of a position. Position by position it is all that the head knows of the text.

**Stages.** Each is a layer like the trunk's (hyper-connections, attention without compression, experts), but for what
it attends to: of committed positions the keys are ``norm(kv @ g)``, turned as ever. A block's rows see those of the
last W positions, and each other in both directions.

**A block** at anchor a, whose token is the last that is known: rows at positions a .. a + n - 1, the first the anchor's
embedding, the others the mask token's. The streams behind the last stage are mixed as in the trunk's head; that is the
*state* s of a row. Row i stands for the token at a + i + 1.

**Markov chain.** ``logits_i = output @ norm(s_i) + w2 @ w1[t_i]``, where t_0 is the anchor's token and t_i the best
of logits_(i-1): so a draft knows the one before it, although all rows were computed at once.

**Confidence.** ``sigmoid(conf_proj @ concat(s_i, w1[t_i]) + bias)``: how likely the trunk says the same.

Sources: the DSpark release of DeepSeek-V4; as the engine implements it, ``src/models/dflash.cpp`` of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fixtures.ds4_gguf import Ds4Config
from tests.reference.model import (
    Block,
    Ds4,
    Weight,
    _linear,
    _low,
    hc_post,
    mean_square,
    norm,
    norm_rotate,
    rms_rotate,
    rotate,
    sink_softmax,
)

N_BLOCK, N_STAGE, RANK = 5, 3, 32


def stage_config(cfg: Ds4Config, n_stage: int = N_STAGE, n_expert: int | None = None) -> Ds4Config:
    """The stages' own configuration: the trunk's widths, no compression, no routing by token."""
    return dataclasses.replace(
        cfg, compress_ratios=(0,) * n_stage, n_hash_layers=0, n_expert=cfg.n_expert if n_expert is None else n_expert
    )


def read(model: Ds4, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(hidden rows [B, T, S * D], what a head reads [B, T, len(layers) * D]) of tokens [B, T]; layer n_layer is behind
    the last one."""
    b, t = tokens.shape
    x = model.token_embd(tokens).flatten(0, 1)[:, None].expand(-1, model.cfg.hc_mult, -1).contiguous()
    inputs = []
    for block in model.blk[: model.n_layer]:
        inputs.append(x)
        x = model._layer(cast(Block, block), x, tokens)
    inputs.append(x)
    return x.view(b, t, -1), torch.cat([inputs[i].float().mean(1) for i in layers], -1).view(b, t, -1)


class Dspark(nn.Module):
    """A DSpark head; its parameters carry the tensor names of the GGUF file, but for ``.`` in ``enc.output_norm``."""

    def __init__(self, cfg: Ds4Config, layers: Sequence[int], n_block: int = N_BLOCK, rank: int = RANK) -> None:
        super().__init__()
        self.cfg, self.layers, self.n_block = cfg, tuple(layers), n_block
        dim, streams = cfg.n_embd, cfg.hc_mult * cfg.n_embd
        self.fc = _linear(len(self.layers) * dim, dim)
        self.enc_output_norm, self.output_norm = Weight(dim), Weight(dim)
        self.output_hc_fn, self.output_hc_base, self.output_hc_scale = (
            Weight(cfg.hc_mult, streams),
            Weight(cfg.hc_mult),
            Weight(1),
        )
        self.blk = nn.ModuleList([Block(cfg, i) for i in range(len(cfg.compress_ratios))])
        self.markov_w1, self.markov_w2 = Weight(cfg.n_vocab, rank), Weight(cfg.n_vocab, rank)
        self.conf_proj = nn.Linear(dim + rank, 1)
        self.n_layer = len(self.blk)
        self.expert_counts: dict[int, Tensor] = {}
        self._tables: dict[object, object] = {}

    # A stage is a layer of the trunk, but for what it attends to.
    _rope, _mix, _ffn, balance = Ds4._rope, Ds4._mix, Ds4._ffn, Ds4.balance  # type: ignore[assignment]

    @torch.no_grad()
    def init_weights(self, model: Ds4, generator: torch.Generator | None = None) -> None:
        """Draw weights to train from; the stages are copies of a trunk's MTP block as far as shapes agree."""
        for name, p in self.named_parameters():
            kind = name.split(".")[-2]
            if kind.endswith("norm"):
                p.fill_(1.0)
            elif kind.endswith(("_sinks", "hc_base", "conf_proj")) or p.ndim < 2 and not kind.endswith("_scale"):
                p.zero_()
            elif kind.endswith("_scale"):
                p.fill_(0.1)
            elif kind == "markov_w2":
                p.zero_()
            elif kind == "markov_w1":
                p.copy_(torch.randn(p.shape, generator=generator))
            else:
                deep = 2 * self.n_layer if kind in ("attn_output_b", "ffn_down_exps", "ffn_down_shexp") else 1
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1] * deep))
        s = self.cfg.hc_mult
        mtp = dict(model.blk[model.n_layer].named_parameters())
        for i, block in enumerate(self.blk):
            for j, part in enumerate(("attn", "ffn")):
                base = cast(Tensor, getattr(block, f"hc_{part}_base").weight)
                base.zero_()
                base[:s] = -2.0
                base[(2 * i + j) % s] = 2.0
                base[2 * s :] = 4.0 * torch.eye(s).flatten()
            for name, p in block.named_parameters():
                if "hc_" not in name and name in mtp and mtp[name].shape == p.shape:
                    p.copy_(mtp[name])

    def rows(self, features: Tensor) -> Tensor:
        """What is kept of committed positions: features [B, T, len(layers) * D] -> g [B, T, D]."""
        return norm(self.fc(features.to(_low())), self.enc_output_norm.weight, self.cfg.rms_eps, _low())

    def states(self, g: Tensor, embedded: Tensor, anchors: Tensor) -> Tensor:
        """States [B, A, n, D] of blocks at `anchors` [A]; g [B, T, D], embedded [B, A, n, D] what their rows hold."""
        cfg, low = self.cfg, _low()
        b, a, n, _ = embedded.shape
        h, d, w = cfg.n_head, cfg.head_dim, cfg.n_swa
        x = embedded.reshape(-1, 1, cfg.n_embd).expand(-1, cfg.hc_mult, -1).contiguous()
        nothing = torch.zeros(b * a * n, dtype=torch.long)
        t = g.shape[1]
        cos, sin = self._rope(max(t, int(anchors.max()) + n), False)
        at = anchors[:, None] + torch.arange(n)
        before = anchors[:, None] - w + torch.arange(w)
        seen = (before >= 0)[:, None] & (at[:, :, None] - before[:, None] < w)
        bias = torch.where(F.pad(seen, (0, n), value=True), 0.0, -1e30)[:, :, None]
        table = cos[at], sin[at]
        for module in self.blk:
            block = cast(Block, module)
            cur, post, comb = self._mix(block, "attn", x, block.attn_norm.weight)
            cur = cur.view(b, a, n, -1)
            qr = norm(block.attn_q_a(cur), block.attn_q_a_norm.weight, cfg.rms_eps, low)
            turn = (table[0][:, :, None], table[1][:, :, None])
            q = rms_rotate(block.attn_q_b(qr).view(b, a, n, h, d), *turn, cfg.rms_eps, low)
            own = norm_rotate(block.attn_kv(cur), block.attn_kv_a_norm.weight, *table, cfg.rms_eps, low)
            known = norm_rotate(block.attn_kv(g), block.attn_kv_a_norm.weight, cos[:t], sin[:t], cfg.rms_eps, low)
            keys = torch.cat((known[:, before.clamp(min=0)], own), 2)
            scores = (q.reshape(b, a, n * h, d) * (1 / math.sqrt(d))) @ keys.mT
            prob = sink_softmax(scores.view(b, a, n, h, -1), bias, block.attn_sinks.weight)
            out = (prob.reshape(b, a, n * h, -1) @ keys).view(b, a, n, h, d)
            out = rotate(out, turn[0], -turn[1], low)
            groups = out.reshape(b * a * n, cfg.o_group_count, -1).transpose(0, 1)
            wo_a = block.attn_output_a.weight.view(cfg.o_group_count, cfg.o_lora_rank, -1)
            mid = torch.bmm(groups, wo_a.mT.to(groups.dtype)).transpose(0, 1).reshape(b * a * n, -1)
            x = hc_post(block.attn_output_b(mid), x, post, comb)
            cur, post, comb = self._mix(block, "ffn", x, block.ffn_norm.weight)
            x = hc_post(self._ffn(block, cur, nothing), x, post, comb)
        flat = x.flatten(1)
        with torch.autocast("cpu", enabled=False):
            mixes = (self.output_hc_fn.weight @ flat.t()) * torch.rsqrt(mean_square(flat) + cfg.rms_eps)
            pre = torch.sigmoid(mixes * self.output_hc_scale.weight + self.output_hc_base.weight[:, None]) + cfg.hc_eps
            state = (x * pre.t()[:, :, None]).sum(1)
        return state.view(b, a, n, -1)

    def chained(self, output: nn.Linear, states: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [..., V], confidences' logits [...]) of states [..., D] behind the tokens `before` [...]."""
        base = output(norm(states, self.output_norm.weight, self.cfg.rms_eps, _low()))
        known = self.markov_w1.weight[before]
        logits = base.float() + F.linear(known.to(_low()), self.markov_w2.weight.to(_low())).float()
        with torch.autocast("cpu", enabled=False):
            sure = self.conf_proj(torch.cat((states.detach().float(), known.detach().float()), -1))
        return logits, sure[..., 0]

    @torch.no_grad()
    def draft(self, model: Ds4, features: Tensor, token: int, mask: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens [n], logits [n, V], confidences [n]) behind `token`, the one that follows features [T, ...]."""
        block = torch.tensor([token, *[mask] * (self.n_block - 1)])
        anchors = torch.tensor([features.shape[0]])
        states = self.states(self.rows(features[None]), model.token_embd(block)[None, None], anchors)[0, 0]
        tokens, logits, sure = [], [], []
        last = torch.tensor(token)
        for state in states:
            row, confident = self.chained(model.output, state, last)
            last = row.argmax(-1)
            tokens.append(last)
            logits.append(row)
            sure.append(torch.sigmoid(confident))
        return torch.stack(tokens), torch.stack(logits), torch.stack(sure)


def tensors(head: Dspark) -> dict[str, object]:
    """GGUF name -> float32 array, everything of the file."""
    named = {name.replace("enc_output_norm", "enc.output_norm"): value for name, value in head.state_dict().items()}
    return {name: value.float().detach().cpu().numpy() for name, value in named.items()}
