"""DeepSeek-V4 in PyTorch: trainable on a CPU, and written to be the explanation of the model.

Shapes: B sequences of T tokens, D = n_embd, S = hc_mult residual streams (4), H heads of d = head_dim, V = n_vocab.
``rms(x) = x / sqrt(mean(x^2) + rms_eps)`` over the last axis; ``norm(x; w) = w * rms(x)``. No linear layer has a bias.
Parameters carry the tensor names of the GGUF file (``blk.3.attn_q_a.weight``); the MTP head's own mixing, which its
GGUF calls ``output_hc_*``, is ``mtp_output_hc_*`` here.

**Hyper-connections.** The residual is S streams x[0..S-1], each of width D, all equal to the token's embedding at
first. Attention and feed-forward are each wrapped so::

    m     = fn @ rms(concat(x))                              (2 + S) * S numbers per token
    pre   = sigmoid(m[0:S] * scale[0] + base[0:S]) + hc_eps
    post  = 2 * sigmoid(m[S:2S] * scale[1] + base[S:2S])
    comb  = sinkhorn(m[2S:] * scale[2] + base[2S:])          S x S, row = source stream, column = destination
    y     = layer(norm(sum_s pre[s] * x[s]; w))
    x'[t] = post[t] * y + sum_s comb[s, t] * x[s]

Sinkhorn makes comb doubly stochastic: softmax over each row, + hc_eps, columns divided by (sum + hc_eps), and then
hc_sinkhorn_iters - 1 times rows and columns. The streams after the last layer are the *hidden row* that an MTP head
takes (S * D numbers). The head mixes them with ``sigmoid(fn @ rms(concat(x)) * scale + base) + hc_eps`` as weights;
then ``logits = output @ norm(mix; output_norm)``.

**Attention** has many query heads and one key that is also the value::

    qr = norm(q_a @ x)                 low rank, also the indexer's input
    q  = rms(q_b @ qr) per head        no weight
    k  = v = norm(kv @ x)              one head
    score(i, j) = q_i . k_j / sqrt(d)
    o  = sum_j exp(score_j) v_j / (exp(sink of this head) + sum_j exp(score_j))

RoPE turns the *last* n_rot of the d dimensions, pairs interleaved (0,1), (2,3) ... As the value is the turned key, the
output is turned back by the query's position: what is left depends on distance alone. Layers without compression use
rope_base and no scaling; the others use compress_rope_base with YaRN (whose magnitude factor is cancelled).
The output goes through a grouped low-rank product: heads are split in o_group_count groups, each is multiplied by its
own rows of output_a (o_lora_rank outputs per group), and output_b takes the concatenation to D.

**Which keys.** Every layer sees the last n_swa positions, its own included. A layer with ratio r (4 or 128) sees
besides *every completed block* of r positions in compressed form: block b covers positions r*b .. r*b + r-1 and is
visible to positions p with (p + 1) // r > b. It may overlap the window; keys are then seen twice, in two forms.

**Compressor.** ``c = kv @ x`` and ``g = gate @ x + ape[p mod r]`` for each position; a block's key is, channel by
channel, ``sum_p softmax_p(g_p) c_p`` over its positions, then a norm, then RoPE at the block's first position.
With r = 128 those are the block's positions. With r = 4 blocks overlap: c and g are 2d wide, and the softmax runs over
8 positions: the four of the block before with the first d channels, the block's own four with the last d channels. The
first block has nothing before it (weight 0).

**Lightning indexer** (r = 4 only). A second, narrow compressor of the same kind makes a key per block;
``I(i, b) = sum_h w_h relu(qi_h . ki_b)``, with ``qi = rope(indexer.attn_q_b @ qr)`` and
``w = (indexer.proj @ x) / sqrt(indexer_head_dim * indexer_n_head)``. Only the indexer_top_k best visible blocks are
attended. Real inference turns qi and ki by a Hadamard matrix before quantising them; it is orthogonal, so the dot
products are unchanged, and it is left out here. The choice has no gradient: the indexer learns from
:attr:`Ds4.indexer_loss` alone, the KL divergence from the attention's own mass on the blocks (summed over heads,
DeepSeek-V3.2) with a detached input; where top_k is not less than the number of blocks it changes nothing.

**Experts.** ``p = sqrt(softplus(gate_inp @ x))``. The first n_hash_layers layers take their experts from a table by
token id (tid2eid); the others the n_expert_used largest of ``p + exp_probs_b``: the bias selects, the unbiased p
weighs. Weights are p of the chosen, divided by their sum, times expert_weights_scale. A shared expert sees every token.
Each expert is ``down @ (silu(min(gate @ x, c)) * clamp(up @ x, -c, c))`` with c = swiglu_clamp.
:meth:`Ds4.balance` moves the bias against the load of the last forward (DeepSeek-V3, auxiliary-loss-free balancing).

**MTP.** One more layer of the same kind (no compression, never hash-routed) predicts the token after next. Its input
at position t is ``eh_proj @ concat(norm(E[token_t]; enorm), norm(h_{t-1}[s]; hnorm))`` for each stream s of the hidden
row of position t-1; its streams are again a hidden row, on which it can be run once more. It mixes its streams with
its own head mixing and norm, and shares the trunk's embedding and output matrix.

Sources: the DeepSeek-V4 release; DeepSeek-V3 and V3.2 reports; "mHC: Manifold-Constrained Hyper-Connections"; as the
engine implements them: ``src/models/deepseek4.cpp``, ``src/llama-kv-cache-dsv4.cpp`` and ``src/llama-graph.cpp`` of
llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fixtures.ds4_gguf import Ds4Config

_Fn = TypeVar("_Fn", bound=Callable[..., Any])
_fused: dict[str, Callable[..., Any]] = {}
_compile = False


def fused(fn: _Fn) -> _Fn:
    """Mark a pure function of tensors as one that :func:`set_compiled` may fuse."""

    def call(*args: Any) -> Any:
        if not _compile:
            return fn(*args)
        if fn.__name__ not in _fused:
            _fused[fn.__name__] = torch.compile(fn, dynamic=False)
        return _fused[fn.__name__](*args)

    call.__name__, call.__doc__ = fn.__name__, fn.__doc__
    return cast(_Fn, call)


def set_compiled(on: bool) -> None:
    """Fuse the element-wise parts with ``torch.compile`` (wants a C++ compiler); the mathematics are the same."""
    global _compile
    _compile = on
    if on:  # one graph per shape: more shapes than the default allows, past which it would quietly not compile
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 4096


def _low() -> torch.dtype:
    """The type of matrix products: autocast's, or float32."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def rms(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@fused
def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm with a weight, computed in float32."""
    return (rms(x, eps) * weight).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the last ``2 * cos.shape[-1]`` channels of float32 x, interleaved pairs."""
    n_rot = 2 * cos.shape[-1]
    keep, turn = x[..., :-n_rot], x[..., -n_rot:]
    even, odd = turn[..., 0::2], turn[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((keep, turned), -1)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """RoPE; x is [B, T, ..., channels], cos and sin broadcast to [B, T, ..., n_rot / 2]."""
    return _rotate(x.float(), cos, sin).to(dtype)


@fused
def rms_rotate(x: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm without a weight, then RoPE."""
    return _rotate(rms(x, eps), cos, sin).to(dtype)


@fused
def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm with a weight, then RoPE."""
    return _rotate(rms(x, eps) * weight, cos, sin).to(dtype)


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """A nearly doubly stochastic matrix from [source, destination, N] logits."""
    comb = logits.softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb


@fused
def mean_square(x: Tensor) -> Tensor:
    """Mean of squares over the last axis."""
    return x.float().square().mean(-1)


@fused
def hc_mixes(
    mixes: Tensor, mean_sq: Tensor, scale: Tensor, base: Tensor, iters: int, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pre [S, N], post [S, N], comb [S, S, N]) from ``fn @ concat(x)`` [(2 + S) S, N] and mean(x^2) [N]."""
    s = math.isqrt(mixes.shape[0] + 1) - 1
    mixes = mixes.float() * torch.rsqrt(mean_sq + rms_eps)
    base = base[:, None]
    pre = torch.sigmoid(mixes[:s] * scale[0] + base[:s]) + eps
    post = 2 * torch.sigmoid(mixes[s : 2 * s] * scale[1] + base[s : 2 * s])
    comb = sinkhorn((mixes[2 * s :] * scale[2] + base[2 * s :]).view(s, s, -1), iters, eps)
    return pre, post, comb


@fused
def hc_pre(x: Tensor, pre: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """norm(sum_s pre[s] x[s]): x [N, S, D], pre [S, N] -> [N, D]."""
    return (rms((x * pre.t()[:, :, None]).sum(1), eps) * weight).to(dtype)


@fused
def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """post[t] y + sum_s comb[s, t] x[s]: y [N, D], x [N, S, D], post [S, N], comb [S, S, N] -> [N, S, D]."""
    mixed = (comb.permute(2, 0, 1)[:, :, :, None] * x[:, :, None, :]).sum(1)
    return mixed + post.t()[:, :, None] * y.float()[:, None, :]


@fused
def swiglu(gate: Tensor, up: Tensor, clamp: float) -> Tensor:
    """silu(min(gate, clamp)) * clamp(up, -clamp, clamp); clamp 0 means none."""
    g, u = gate.float(), up.float()
    if clamp > 1e-6:
        g, u = g.clamp(max=clamp), u.clamp(-clamp, clamp)
    return (F.silu(g) * u).to(gate.dtype)


@fused
def combine(out: Tensor, weight: Tensor, shared: Tensor) -> Tensor:
    """sum_k weight[k] out[k] + shared: out [N, k, D], weight [N, k], shared [N, D]."""
    return ((out.float() * weight[:, :, None]).sum(1) + shared.float()).to(out.dtype)


@fused
def compress(kv: Tensor, score: Tensor, ape: Tensor, ratio: int) -> Tensor:
    """Weighted means of blocks: kv, score [B, blocks * ratio, c d] -> float32 [B, blocks, d], before norm and RoPE."""
    b, t, width = kv.shape
    v = kv.float().view(b, t // ratio, ratio, width)
    g = score.float().view(b, t // ratio, ratio, width) + ape
    if ratio == 4:  # overlap: the block before, by the first half of the channels
        d = width // 2
        v = torch.cat((F.pad(v[:, :-1, :, :d], (0, 0, 0, 0, 1, 0)), v[..., d:]), 2)
        g = torch.cat((F.pad(g[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=-1e30), g[..., d:]), 2)
    return (g.softmax(2) * v).sum(2)


@fused
def sink_softmax(scores: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    """Softmax over the last axis with one more logit per head that takes mass and gives nothing.

    scores [B, chunks, C, H, keys]; bias broadcasts to it (0 or a large negative number); sinks [H].
    """
    s = scores.float() + bias
    sink = sinks[:, None]
    top = torch.maximum(s.amax(-1, keepdim=True), sink).detach()
    e = torch.exp(s - top)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))).to(scores.dtype)


class _Grouped(torch.autograd.Function):
    """Rows sorted by group times each group's matrix: x [R, in], w [G, out, in], sizes: rows of each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
        low = w.to(x.dtype)
        y = x.new_empty(x.shape[0], w.shape[1])
        at = 0
        for g, n in enumerate(sizes):
            if n:
                torch.mm(x[at : at + n], low[g].t(), out=y[at : at + n])
            at += n
        ctx.save_for_backward(x, low)
        ctx.sizes, ctx.dtype = sizes, w.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, low = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dw = torch.empty_like(x), torch.zeros_like(low)
        at = 0
        for g, n in enumerate(ctx.sizes):
            if n:
                torch.mm(dy[at : at + n], low[g], out=dx[at : at + n])
                torch.mm(dy[at : at + n].t(), x[at : at + n], out=dw[g])
            at += n
        return dx, dw.to(ctx.dtype), None


class _Dispatch(torch.autograd.Function):
    """Rows of x [N, in], each used k times, in the order of ``order`` (a permutation of N * k; source row // k)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, torch.div(order, k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy.index_select(0, inverse).view(-1, ctx.k, dy.shape[-1]).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is dy[inverse] instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy.index_select(0, inverse), None, None


class _HeadLoss(torch.autograd.Function):
    """Mean cross entropy of ``x @ w.T`` against targets (-100: ignored), without keeping the logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, targets: Tensor, rows: int) -> Tensor:
        low = w.to(x.dtype)
        grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx = torch.empty_like(x) if grad else None
        dw = torch.zeros(w.shape, dtype=torch.float32) if grad else None
        count = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32)
        for at in range(0, x.shape[0], rows):
            part, want = x[at : at + rows], targets[at : at + rows]
            logits = (part @ low.t()).float()
            logp = logits.log_softmax(-1)
            valid = want >= 0
            safe = want.clamp(min=0)
            total += -(logp.gather(1, safe[:, None])[:, 0] * valid).sum()
            if dx is not None and dw is not None:
                g = logp.exp_()
                g.scatter_add_(1, safe[:, None], torch.full_like(g[:, :1], -1.0))
                g *= (valid / count)[:, None]
                low_g = g.to(x.dtype)
                torch.mm(low_g, low, out=dx[at : at + rows])
                dw += low_g.t() @ part
        if dx is not None and dw is not None:
            ctx.save_for_backward(dx, dw)
        return total / count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        return dx * dloss, dw * dloss, None, None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return cast(Tensor, function.apply(*args))  # type: ignore[no-untyped-call]


def rope_tables(cfg: Ds4Config, n: int, compressed: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [n, n_rot / 2] for positions 0..n-1 (YaRN: arXiv 2309.00071, without its magnitude factor)."""
    half = torch.arange(cfg.n_rot // 2, dtype=torch.float64)
    base = cfg.compress_rope_base if compressed else cfg.rope_base
    freq = base ** (-2 * half / cfg.n_rot)
    if compressed and cfg.yarn_factor > 1:

        def dim_of(turns: float) -> float:
            return cfg.n_rot * math.log(cfg.yarn_orig_ctx / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(0, math.floor(dim_of(cfg.yarn_beta_fast)))
        high = min(cfg.n_rot - 1, math.ceil(dim_of(cfg.yarn_beta_slow)))
        keep = 1 - ((half - low) / max(0.001, high - low)).clamp(0, 1)
        freq = freq / cfg.yarn_factor * (1 - keep) + freq * keep
    angle = torch.arange(n, dtype=torch.float64)[:, None] * freq
    return angle.cos().float(), angle.sin().float()


class Weight(nn.Module):
    """A bare parameter with the suffix ``.weight``, as GGUF names have it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))


class Bias(nn.Module):
    """A buffer with the suffix ``.bias``: moved by load balancing, not by a gradient."""

    bias: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(*shape))


class Table(nn.Module):
    """An int32 buffer with the suffix ``.weight``."""

    weight: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(*shape, dtype=torch.int32))


def _linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


class Indexer(nn.Module):
    """Parameters of the lightning indexer that GGUF names ``indexer.*``."""

    def __init__(self, cfg: Ds4Config) -> None:
        super().__init__()
        self.proj = _linear(cfg.n_embd, cfg.indexer_n_head)
        self.attn_q_b = _linear(cfg.q_lora_rank, cfg.indexer_n_head * cfg.indexer_head_dim)


class Nextn(nn.Module):
    """Parameters of the MTP block that GGUF names ``nextn.*``."""

    def __init__(self, cfg: Ds4Config) -> None:
        super().__init__()
        self.eh_proj = _linear(2 * cfg.n_embd, cfg.n_embd)
        self.enorm, self.hnorm, self.shared_head_norm = (Weight(cfg.n_embd) for _ in range(3))


class Block(nn.Module):
    """The parameters of one layer; :class:`Ds4` computes with them."""

    def __init__(self, cfg: Ds4Config, layer: int, *, mtp: bool = False) -> None:
        super().__init__()
        d, dim, mix = cfg.head_dim, cfg.n_embd, (2 + cfg.hc_mult) * cfg.hc_mult
        self.layer = layer
        self.ratio = 0 if mtp else cfg.compress_ratios[layer]
        self.hashed = not mtp and layer < cfg.n_hash_layers
        for part in ("attn", "ffn"):
            setattr(self, f"hc_{part}_fn", Weight(mix, cfg.hc_mult * dim))
            setattr(self, f"hc_{part}_base", Weight(mix))
            setattr(self, f"hc_{part}_scale", Weight(3))
        self.attn_norm = Weight(dim)
        self.attn_sinks = Weight(cfg.n_head)
        self.attn_q_a = _linear(dim, cfg.q_lora_rank)
        self.attn_q_a_norm = Weight(cfg.q_lora_rank)
        self.attn_q_b = _linear(cfg.q_lora_rank, cfg.n_head * d)
        self.attn_kv = _linear(dim, d)
        self.attn_kv_a_norm = Weight(d)
        self.attn_output_a = Weight(cfg.o_group_count * cfg.o_lora_rank, cfg.n_head * d // cfg.o_group_count)
        self.attn_output_b = _linear(cfg.o_group_count * cfg.o_lora_rank, dim)
        if self.ratio:
            wide = 2 if self.ratio == 4 else 1
            self.attn_compressor_kv = _linear(dim, wide * d)
            self.attn_compressor_gate = _linear(dim, wide * d)
            self.attn_compressor_ape = Weight(self.ratio, wide * d)
            self.attn_compressor_norm = Weight(d)
        if self.ratio == 4:
            self.indexer = Indexer(cfg)
            self.indexer_compressor_kv = _linear(dim, 2 * cfg.indexer_head_dim)
            self.indexer_compressor_gate = _linear(dim, 2 * cfg.indexer_head_dim)
            self.indexer_compressor_ape = Weight(4, 2 * cfg.indexer_head_dim)
            self.indexer_compressor_norm = Weight(cfg.indexer_head_dim)
        self.ffn_norm = Weight(dim)
        self.ffn_gate_inp = _linear(dim, cfg.n_expert)
        if self.hashed:
            self.ffn_gate_tid2eid = Table(cfg.n_vocab, cfg.n_expert_used)
        else:
            self.exp_probs_b = Bias(cfg.n_expert)
        self.ffn_gate_exps = Weight(cfg.n_expert, cfg.n_ff_exp, dim)
        self.ffn_up_exps = Weight(cfg.n_expert, cfg.n_ff_exp, dim)
        self.ffn_down_exps = Weight(cfg.n_expert, dim, cfg.n_ff_exp)
        shared = cfg.n_ff_exp * cfg.n_expert_shared
        self.ffn_gate_shexp = _linear(dim, shared)
        self.ffn_up_shexp = _linear(dim, shared)
        self.ffn_down_shexp = _linear(shared, dim)
        if mtp:
            self.nextn = Nextn(cfg)


class Ds4(nn.Module):
    """DeepSeek-V4 trunk and, with ``mtp``, its MTP head. Always computes whole sequences from position 0.

    After a forward: ``expert_counts[layer]`` is the number of rows that each expert got (the MTP layer's index is
    n_layer), for :meth:`balance`; ``indexer_loss`` is the sum over ratio-4 layers of the indexer's KL divergence
    while training with ``indexer_queries`` > 0 sampled positions, else 0.
    """

    def __init__(self, cfg: Ds4Config, mtp: bool = True) -> None:
        super().__init__()
        self.cfg = cfg
        streams = cfg.hc_mult * cfg.n_embd
        self.token_embd = nn.Embedding(cfg.n_vocab, cfg.n_embd)
        self.output_norm = Weight(cfg.n_embd)
        self.output = _linear(cfg.n_embd, cfg.n_vocab)
        self.output_hc_fn, self.output_hc_base, self.output_hc_scale = (
            Weight(cfg.hc_mult, streams),
            Weight(cfg.hc_mult),
            Weight(1),
        )
        n_layer = len(cfg.compress_ratios)
        self.blk = nn.ModuleList([Block(cfg, i) for i in range(n_layer)])
        if mtp:
            self.blk.append(Block(cfg, n_layer, mtp=True))
            self.mtp_output_hc_fn, self.mtp_output_hc_base, self.mtp_output_hc_scale = (
                Weight(cfg.hc_mult, streams),
                Weight(cfg.hc_mult),
                Weight(1),
            )
        self.has_mtp = mtp
        self.n_layer = n_layer
        self.expert_counts: dict[int, Tensor] = {}
        self.indexer_queries = 0
        self.indexer_loss = torch.zeros(())
        self._tables: dict[tuple[Any, ...], Any] = {}
        self.init_weights()

    # -- weights ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw weights to train from.

        Matrices 1/sqrt(fan in), those that write into the residual 1/sqrt(2 layers) less; embeddings 1, output
        small. Hyper-connections start as a plain residual (comb near the identity, post 1), each layer reading
        mostly one stream, layer after layer another (as in "Hyper-Connections", arXiv 2409.19606): without that the
        streams would stay equal for ever.
        """
        cfg, s = self.cfg, self.cfg.hc_mult
        gen = generator

        def draw(p: Tensor, std: float) -> None:
            p.copy_(torch.randn(p.shape, generator=gen) * std)

        for name, p in self.named_parameters():
            last = name.split(".")[-2]
            if last.endswith("norm"):
                p.fill_(1.0)
            elif last.endswith(("_sinks", "_ape", "hc_base")):
                p.zero_()
            elif last.endswith(("_scale",)):
                p.fill_(0.1)
            elif last.endswith("_fn"):
                draw(p, 0.02)
            elif last == "token_embd":
                draw(p, 1.0)
            elif last == "output":
                draw(p, 0.2 / math.sqrt(cfg.n_embd))
            elif last in ("attn_output_b", "ffn_down_exps", "ffn_down_shexp"):
                draw(p, 1 / math.sqrt(p.shape[-1] * 2 * (self.n_layer + 1)))
            elif last == "ffn_gate_inp":
                draw(p, 0.5 / math.sqrt(p.shape[-1]))
            elif p.dim() > 1:
                draw(p, 1 / math.sqrt(p.shape[-1]))
        for i, module in enumerate(self.blk):
            block = cast(Block, module)
            for j, part in enumerate(("attn", "ffn")):
                base = cast(Tensor, getattr(block, f"hc_{part}_base").weight)
                base.zero_()
                base[:s] = -2.0
                base[(2 * i + j) % s] = 2.0
                base[2 * s :] = 4.0 * torch.eye(s).flatten()
            if block.hashed:
                keys = torch.rand(cfg.n_vocab, cfg.n_expert, generator=gen)
                block.ffn_gate_tid2eid.weight.copy_(keys.argsort(-1)[:, : cfg.n_expert_used].int())
            else:
                block.exp_probs_b.bias.zero_()

    @torch.no_grad()
    def balance(self, step: float = 1e-3) -> None:
        """Move each router bias by ``step`` towards the experts that the last forward gave too few rows."""
        for i, counts in self.expert_counts.items():
            block = cast(Block, self.blk[i])
            if not block.hashed:
                bias = block.exp_probs_b.bias
                bias += step * torch.sign(counts.float().mean() - counts.float())
                bias -= bias.mean()

    # -- tables -------------------------------------------------------------------------------------------------

    def _rope(self, t: int, compressed: bool) -> tuple[Tensor, Tensor]:
        key = ("rope", t, compressed)
        if key not in self._tables:
            self._tables[key] = rope_tables(self.cfg, t, compressed)
        return cast("tuple[Tensor, Tensor]", self._tables[key])

    def _window_bias(self, t: int, ratio: int) -> Tensor:
        """[chunks, C, 1, 2 C + blocks]: 0 where a query may look, a large negative number elsewhere.

        Queries come in chunks of C = n_swa, whose windows lie within the chunk and the one before.
        """
        key = ("bias", t, ratio)
        if key not in self._tables:
            c = self.cfg.n_swa
            chunks = -(-t // c)
            query = torch.arange(chunks * c).view(chunks, c, 1)
            at = (torch.arange(chunks) * c - c).view(chunks, 1, 1) + torch.arange(2 * c)
            seen = (at >= 0) & (at <= query) & (query - at < c)
            if ratio:
                block = torch.arange(t // ratio)
                seen = torch.cat((seen, ((query + 1) // ratio > block)), -1)
            self._tables[key] = torch.where(seen, 0.0, -1e30).unsqueeze(2)
        return cast(Tensor, self._tables[key])

    # -- parts --------------------------------------------------------------------------------------------------

    def _compressed(self, x: Tensor, kv: nn.Linear, gate: nn.Linear, ape: Weight, weight: Weight, ratio: int) -> Tensor:
        """The keys of all completed blocks: x [B, T, D] -> [B, T // ratio, channels]."""
        n = x.shape[1] // ratio
        part = x[:, : n * ratio]
        cos, sin = (table[: n * ratio : ratio] for table in self._rope(x.shape[1], True))
        mean = compress(kv(part), gate(part), ape.weight, ratio)
        return norm_rotate(mean, weight.weight, cos, sin, self.cfg.rms_eps, _low())

    def _indexer_scores(self, block: Block, x: Tensor, qr: Tensor) -> Tensor:
        """I [B, T, blocks] in float32; blocks that are not visible yet are not masked."""
        cfg = self.cfg
        b, t, _ = x.shape
        cos, sin = self._rope(t, True)
        q = block.indexer.attn_q_b(qr).view(b, t, cfg.indexer_n_head, cfg.indexer_head_dim)
        q = rotate(q, cos[:, None], sin[:, None], _low())
        k = self._compressed(
            x,
            block.indexer_compressor_kv,
            block.indexer_compressor_gate,
            block.indexer_compressor_ape,
            block.indexer_compressor_norm,
            4,
        )
        w = block.indexer.proj(x).float() / math.sqrt(cfg.indexer_head_dim * cfg.indexer_n_head)
        scores = F.relu((q.flatten(1, 2) @ k.transpose(1, 2)).float()).view(b, t, cfg.indexer_n_head, -1)
        return torch.einsum("bthk,bth->btk", scores, w)

    def _select(self, block: Block, x: Tensor, qr: Tensor, q: Tensor, comp: Tensor, bias: Tensor) -> Tensor:
        """``bias`` with the blocks that the indexer does not choose masked too; trains the indexer on the way."""
        cfg = self.cfg
        b, t, _ = x.shape
        blocks = comp.shape[1]
        train = self.training and self.indexer_queries > 0 and torch.is_grad_enabled()
        if blocks == 0 or (blocks <= cfg.indexer_top_k and not train):
            return bias
        scores = self._indexer_scores(block, x.detach(), qr.detach())
        seen = (torch.arange(t)[:, None] + 1) // 4 > torch.arange(blocks)
        if train:
            rows = torch.randint(4, t, (min(self.indexer_queries, t),))
            with torch.no_grad():
                logits = torch.einsum("brhd,bkd->brhk", q[:, rows].float(), comp.float())
                logits = logits / math.sqrt(cfg.head_dim)
                target = logits.masked_fill(~seen[rows][:, None], -1e30).softmax(-1).mean(2)
            logp = scores[:, rows].masked_fill(~seen[rows], -1e30).log_softmax(-1)
            self.indexer_loss = self.indexer_loss + F.kl_div(logp, target, reduction="sum") / (b * len(rows))
        if blocks <= cfg.indexer_top_k:
            return bias
        with torch.no_grad():
            masked = scores.masked_fill(~seen, -torch.inf)
            chosen = torch.zeros_like(masked, dtype=torch.bool)
            chosen.scatter_(-1, masked.topk(cfg.indexer_top_k, -1).indices, True)
            chunks, c = bias.shape[0], bias.shape[1]
            extra = torch.where(chosen, 0.0, -1e30)
            extra = F.pad(extra, (0, 0, 0, chunks * c - t)).view(b, chunks, c, 1, blocks)
            window = bias[..., : 2 * c].expand(b, -1, -1, -1, -1)
            return torch.cat((window, bias[..., 2 * c :] + extra), -1)

    def _attention(self, block: Block, x: Tensor) -> Tensor:
        cfg, low = self.cfg, _low()
        b, t, _ = x.shape
        h, d, c = cfg.n_head, cfg.head_dim, cfg.n_swa
        chunks = -(-t // c)
        cos, sin = self._rope(t, block.ratio != 0)
        qr = norm(block.attn_q_a(x), block.attn_q_a_norm.weight, cfg.rms_eps, low)
        q = rms_rotate(block.attn_q_b(qr).view(b, t, h, d), cos[:, None], sin[:, None], cfg.rms_eps, low)
        k = norm_rotate(block.attn_kv(x), block.attn_kv_a_norm.weight, cos, sin, cfg.rms_eps, low)

        bias = self._window_bias(t, block.ratio)
        pad = chunks * c - t
        own = F.pad(k, (0, 0, 0, pad))
        before = F.pad(own[:, :-c], (0, 0, c, 0))
        keys = [before.view(b, chunks, c, d), own.view(b, chunks, c, d)]
        if block.ratio:
            comp = self._compressed(
                x,
                block.attn_compressor_kv,
                block.attn_compressor_gate,
                block.attn_compressor_ape,
                block.attn_compressor_norm,
                block.ratio,
            )
            if block.ratio == 4:
                bias = self._select(block, x, qr, q, comp, bias)
            keys.append(comp[:, None].expand(-1, chunks, -1, -1))
        kk = torch.cat(keys, 2).flatten(0, 1)
        qq = F.pad(q, (0, 0, 0, 0, 0, pad)) if pad else q
        scores = (qq.reshape(b * chunks, c * h, d) * (1 / math.sqrt(d))) @ kk.transpose(1, 2)
        prob = sink_softmax(scores.view(b, chunks, c, h, -1), bias, block.attn_sinks.weight)
        out = (prob.view(b * chunks, c * h, -1) @ kk).view(b, chunks * c, h, d)[:, :t]
        out = rotate(out, cos[:, None], -sin[:, None], low)

        groups = out.reshape(b * t, cfg.o_group_count, -1).transpose(0, 1)
        wo_a = block.attn_output_a.weight.view(cfg.o_group_count, cfg.o_lora_rank, -1)
        mid = torch.bmm(groups, wo_a.transpose(1, 2)).transpose(0, 1).reshape(b, t, -1)
        return cast(Tensor, block.attn_output_b(mid))

    def _ffn(self, block: Block, x: Tensor, tokens: Tensor) -> Tensor:
        """Experts: x [N, D], tokens [N] -> [N, D]."""
        cfg, k = self.cfg, self.cfg.n_expert_used
        with torch.autocast("cpu", enabled=False):  # routing is a choice: keep it in float32
            prob = F.softplus(F.linear(x.float(), block.ffn_gate_inp.weight)).sqrt()
        if block.hashed:
            chosen = block.ffn_gate_tid2eid.weight[tokens].long()
        else:
            chosen = (prob.detach() + block.exp_probs_b.bias).topk(k, -1).indices
        weight = prob.gather(1, chosen)
        if cfg.expert_weights_norm:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=6.103515625e-5)
        weight = weight * cfg.expert_weights_scale

        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        counts = torch.bincount(flat, minlength=cfg.n_expert)
        self.expert_counts[block.layer] = counts
        sizes = counts.tolist()
        rows = _apply(_Dispatch, x.to(_low()), order, inverse, k)
        mid = swiglu(
            _apply(_Grouped, rows, block.ffn_gate_exps.weight, sizes),
            _apply(_Grouped, rows, block.ffn_up_exps.weight, sizes),
            cfg.swiglu_clamp,
        )
        out = _apply(_Permute, _apply(_Grouped, mid, block.ffn_down_exps.weight, sizes), inverse, order)
        shared = block.ffn_down_shexp(swiglu(block.ffn_gate_shexp(x), block.ffn_up_shexp(x), cfg.swiglu_clamp))
        return combine(out.view(-1, k, cfg.n_embd), weight, shared)

    def _mix(self, block: Block, part: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a layer reads (normed, [N, D]), and post and comb for what it writes: x [N, S, D]."""
        cfg = self.cfg
        fn, base, scale = (cast(Tensor, getattr(block, f"hc_{part}_{n}").weight) for n in ("fn", "base", "scale"))
        flat = x.flatten(1)
        with torch.autocast("cpu", enabled=False):
            mixes = fn @ flat.t()
            mean_sq = mean_square(flat)
            pre, post, comb = hc_mixes(mixes, mean_sq, scale, base, cfg.hc_sinkhorn_iters, cfg.hc_eps, cfg.rms_eps)
        return hc_pre(x, pre, weight, cfg.rms_eps, _low()), post, comb

    def _layer(self, block: Block, x: Tensor, tokens: Tensor) -> Tensor:
        """One layer: x [N, S, D] and tokens [B, T] with N = B * T."""
        b, t = tokens.shape
        cur, post, comb = self._mix(block, "attn", x, block.attn_norm.weight)
        x = hc_post(self._attention(block, cur.view(b, t, -1)).flatten(0, 1), x, post, comb)
        cur, post, comb = self._mix(block, "ffn", x, block.ffn_norm.weight)
        return hc_post(self._ffn(block, cur, tokens.flatten()), x, post, comb)

    def _head(self, hidden: Tensor, mtp: bool) -> Tensor:
        """What the output matrix multiplies: hidden [B, T, S * D] -> [B, T, D]."""
        cfg = self.cfg
        prefix = "mtp_" if mtp else ""
        fn, base, scale = (
            cast(Tensor, getattr(self, f"{prefix}output_hc_{n}").weight) for n in ("fn", "base", "scale")
        )
        weight = cast(Block, self.blk[self.n_layer]).nextn.shared_head_norm if mtp else self.output_norm
        flat = hidden.flatten(0, 1)
        with torch.autocast("cpu", enabled=False):
            mixes = (fn @ flat.t()) * torch.rsqrt(mean_square(flat) + cfg.rms_eps)
            pre = torch.sigmoid(mixes * scale + base[:, None]) + cfg.hc_eps
        out = hc_pre(flat.view(-1, cfg.hc_mult, cfg.n_embd), pre, weight.weight, cfg.rms_eps, _low())
        return out.view(hidden.shape[0], hidden.shape[1], -1)

    # -- what a caller uses -------------------------------------------------------------------------------------

    def trunk(self, tokens: Tensor) -> Tensor:
        """Hidden rows [B, T, S * D] of tokens [B, T] that stand at positions 0..T-1."""
        self.indexer_loss = torch.zeros(())
        b, t = tokens.shape
        x: Tensor = self.token_embd(tokens).flatten(0, 1)[:, None].expand(-1, self.cfg.hc_mult, -1).contiguous()
        for block in self.blk[: self.n_layer]:
            x = self._layer(cast(Block, block), x, tokens)
        return x.view(b, t, -1)

    def mtp_trunk(self, hidden_prev: Tensor, tokens: Tensor) -> Tensor:
        """Hidden rows [B, R, S * D] of the MTP block; see :meth:`mtp`."""
        cfg, low = self.cfg, _low()
        block = cast(Block, self.blk[self.n_layer])
        e = norm(self.token_embd(tokens), block.nextn.enorm.weight, cfg.rms_eps, low).flatten(0, 1)
        h = norm(hidden_prev.reshape(-1, cfg.hc_mult, cfg.n_embd), block.nextn.hnorm.weight, cfg.rms_eps, low)
        # The embedding's half is the same for all streams: multiply it once.
        weight = block.nextn.eh_proj.weight
        w_e, w_h = weight[:, : cfg.n_embd], weight[:, cfg.n_embd :]
        x = F.linear(h, w_h).float() + F.linear(e, w_e).float()[:, None]
        return self._layer(block, x, tokens).view(tokens.shape[0], tokens.shape[1], -1)

    def logits(self, hidden: Tensor, mtp: bool = False) -> Tensor:
        """Logits [B, T, V] of hidden rows, by the trunk's head or the MTP's."""
        return cast(Tensor, self.output(self._head(hidden, mtp)))

    def loss(self, hidden: Tensor, targets: Tensor, mtp: bool = False) -> Tensor:
        """Mean cross entropy against targets [B, T] (-100: ignored): :meth:`logits` without keeping them."""
        x = self._head(hidden, mtp).flatten(0, 1)
        return _apply(_HeadLoss, x, self.output.weight, targets.flatten(), 1024)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, T, V], hidden rows [B, T, S * D]) of tokens [B, T]."""
        hidden = self.trunk(tokens)
        return self.logits(hidden), hidden

    def mtp(self, hidden_prev: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, R, V], hidden rows [B, R, S * D]) of rows that pair hidden_prev [B, R, S * D] with tokens [B, R].

        Row t takes the hidden row of position t-1 and the token at t, and predicts the token at t+1. The rows must be
        consecutive positions; which, does not matter, as this block sees distances only. Teacher forcing:
        ``mtp(hidden[:, :-1], tokens[:, 1:])``; one step further: ``mtp(hidden_out[:, :-1], tokens[:, 2:])``.
        """
        hidden = self.mtp_trunk(hidden_prev, tokens)
        return self.logits(hidden, True), hidden
