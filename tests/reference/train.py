"""Training of ds4-mini: trunk and MTP block together, on a CPU, in as many minutes as you give it.

    python -m tests.reference.train --out DIR --minutes 80

The recipe is DeepSeek-V3's where size allows (arXiv 2412.19437): the loss is that of the next token plus ``lambda``
times that of the MTP block, which sees the trunk's hidden row of one position and the token of the next; AdamW with
betas .9/.95 and weight decay .1; gradient norm clipped at 1; experts balanced by nudging the router's selection bias,
without an auxiliary loss. Different on purpose:

* Matrices inside the blocks are updated by Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), which
  is reported to need fewer tokens than AdamW (not compared here); embeddings, the head, hyper-connections and vectors
  stay with AdamW.
* Half of the MTP block's target is the trunk's own distribution: a draft counts if the *trunk* would say it.
* The MTP block is trained on its own hidden row for one further step, as drafting at depth 2 and 3 runs it.
* The learning rate follows the clock, not the step: whatever the machine's speed, the run ends fully decayed.

Writes to DIR: ``tokenizer.json``, ``checkpoint.pt`` (atomically, every ten minutes and at the end), ``log.csv`` and
``loss.png``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import random
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from tests.fixtures.ds4_gguf import Ds4Config
from tests.reference import data, tokenizer
from tests.reference.model import Ds4, fused, set_compiled

#: Sized so that trunk and MTP head together stay below 20 MB in Q8_0, with every kind of layer.
MINI = Ds4Config(
    n_vocab=4096,
    n_embd=192,
    n_head=4,
    head_dim=64,
    n_rot=32,
    q_lora_rank=96,
    o_group_count=2,
    o_lora_rank=96,
    compress_ratios=(0, 4, 128, 4, 0),
    n_hash_layers=1,
    n_expert=8,
    n_expert_used=2,
    n_ff_exp=192,
    indexer_n_head=1,
    indexer_head_dim=128,
    indexer_top_k=128,
    hc_sinkhorn_iters=8,
    n_ctx_train=4096,
)

Batch = torch.Tensor  # token ids, [B, T]


# --- data ------------------------------------------------------------------------------------------------------------


class Rows:
    """An endless stream of training rows [T]: documents shuffled anew each epoch, packed end to end.

    A row that starts inside a document still begins with BOS, as every prompt of the finished model will.
    """

    def __init__(self, documents: list[npt.NDArray[np.int64]], bos: int, seed: int) -> None:
        self._documents, self._bos, self._seed = documents, bos, seed
        self.epoch = 0
        self._stream = np.empty(0, np.int64)

    def _more(self) -> None:
        order = random.Random(f"{self._seed}:{self.epoch}").sample(range(len(self._documents)), len(self._documents))
        self.epoch += 1
        self._stream = np.concatenate([self._stream, *(self._documents[i] for i in order)])

    def take(self, length: int) -> npt.NDArray[np.int64]:
        while len(self._stream) < length:
            self._more()
        if self._stream[0] == self._bos:
            row, self._stream = self._stream[:length], self._stream[length:]
            return row
        row, self._stream = self._stream[: length - 1], self._stream[length - 1 :]
        return np.concatenate([[self._bos], row])

    def batch(self, rows: int, length: int) -> Batch:
        return torch.from_numpy(np.stack([self.take(length) for _ in range(rows)]))


def encode(tok: Any, documents: list[data.Document]) -> list[npt.NDArray[np.int64]]:
    """Each document's ids between BOS and EOS."""
    bos, eos = tok.token_to_id(data.BOS), tok.token_to_id(data.EOS)
    encoded = tok.encode_batch([document.text for document in documents])
    return [np.array([bos, *item.ids, eos], np.int64) for item in encoded]


# --- optimisers ------------------------------------------------------------------------------------------------------


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values are driven to about 1, in bfloat16.

    ``matrices``: [..., rows, columns]. Newton-Schulz iteration with the quintic of Muon's author, which trades
    accuracy at 1 for speed of growth from 0.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16)
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if transposed else x
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: for matrices [rows, columns] and stacks of them [experts, rows, columns].

    With several processes, which hold equal gradients, each orthogonalizes its share and all take the sum.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # The largest first, dealt out in turn: about equal work for every process.
            params.sort(key=lambda p: p.numel(), reverse=True)
            updates = torch.zeros(sum(p.numel() for p in params))
            # Matrices of one shape go through the iteration as one batch: many small products are slow on a CPU.
            alike = defaultdict(list)
            for i, (p, update) in enumerate(zip(params, updates.split([p.numel() for p in params]))):
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                if i % world == rank:
                    alike[tuple(p.shape[-2:])].append((p.grad.lerp(state["momentum"], group["momentum"]), update))
            for (rows, columns), pairs in alike.items():
                together = orthogonalize(torch.cat([nesterov.reshape(-1, rows, columns) for nesterov, _ in pairs]))
                # RMS of an update about .2, as AdamW's, so that both share one learning rate (Moonlight, 2502.16982).
                together *= 0.2 * math.sqrt(max(rows, columns))
                parts = together.flatten().split([update.numel() for _, update in pairs])
                for (_, update), part in zip(pairs, parts):
                    update.copy_(part)
            dist.all_reduce(updates)
            for p, update in zip(params, updates.split([p.numel() for p in params])):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])


def optimizers(model: Ds4, lr: float) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters. Every group carries its own peak rate as ``peak``."""
    matrices, embeddings, head, delicate = [], [], [], []
    for name, p in model.named_parameters():
        if name == "token_embd.weight":
            embeddings.append(p)
        elif name == "output.weight":
            head.append(p)
        elif p.ndim < 2 or "hc_" in name or "_ape" in name or "gate_inp" in name:
            delicate.append(p)
        else:
            matrices.append(p)
    groups = [
        # A row of the embedding sees a gradient now and then only, and starts at RMS 1.
        {"params": embeddings, "lr": 10 * lr, "weight_decay": 0.0},
        {"params": head, "lr": lr, "weight_decay": 0.1},
        {"params": delicate, "lr": 0.3 * lr, "weight_decay": 0.0},
    ]
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=True),
        Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.1),
    ]
    for optimizer in result:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return result


def average_gradients(model: Ds4) -> None:
    """Make the gradients of all processes their mean."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(part.view_as(grad))


def rate(progress: float, warm_up: float = 0.02, decay_from: float = 0.35) -> float:
    """The learning rate as a share of its peak, at ``progress`` 0..1: warm-up, constant, linear to zero."""
    if progress < warm_up:
        return max(progress / warm_up, 0.01)
    return 1.0 if progress < decay_from else max(1 - progress, 0.0) / (1 - decay_from)


# --- loss ------------------------------------------------------------------------------------------------------------


@fused
def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@fused
def draft_loss(logits: torch.Tensor, targets: torch.Tensor, trunk: torch.Tensor) -> torch.Tensor:
    """Half the text's own next token, half the trunk's distribution over it, where the trunk has read so far."""
    log_p = F.log_softmax(logits.float(), -1)
    text = F.nll_loss(log_p.flatten(0, 1), targets.flatten())
    like = -(F.softmax(trunk.float(), -1) * log_p[:, : trunk.shape[1]]).sum(-1).mean()
    return 0.5 * text + 0.5 * like


def losses(model: Ds4, tokens: Batch, depth: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The trunk's loss and the MTP block's, one per draft position: tokens is [B, T + depth + 1].

    The trunk reads T tokens. Row i of the first MTP pass stands at position i + 1 and holds (trunk hidden of i, token
    i + 1); of the next pass, at i + 2, (the MTP block's own hidden of row i, token i + 2). So every pass has T rows.
    """
    length = tokens.shape[1] - depth - 1
    hidden = model.trunk(tokens[:, :length])
    logits = model.logits(hidden)
    trunk = token_loss(logits, tokens[:, 1 : length + 1])
    drafts = []
    for step in range(1, depth + 1):
        out, hidden = model.mtp(hidden, tokens[:, step : length + step])
        drafts.append(draft_loss(out, tokens[:, step + 1 : length + step + 1], logits[:, step:].detach()))
    return trunk, drafts


@dataclasses.dataclass
class Score:
    """What a model does on held-out text."""

    loss: float  # nats per token
    bits_per_byte: float
    mtp_loss: list[float]  # per draft position, against the text
    agreement: list[float]  # per draft position: share of rows where MTP's best token is the trunk's
    accepted: list[float]  # the same, where all earlier drafts of the row agreed too: P(position j accepted)


@torch.no_grad()
def evaluate(model: Ds4, batches: list[Batch], tokens_per_byte: float, compiled: bool = False, depth: int = 3) -> Score:
    """Score on ``batches``. Deeper positions are teacher-forced, so ``accepted`` is an estimate of real drafting."""
    model.eval()
    set_compiled(False)  # not worth another compilation
    loss, mtp_loss, agreement, accepted = 0.0, [0.0] * depth, [0.0] * depth, [0.0] * depth
    for tokens in batches:
        logits, hidden = model(tokens)
        loss += token_loss(logits[:, :-1], tokens[:, 1:]).item() / len(batches)
        best = logits.argmax(-1)
        before: torch.Tensor | None = None
        for step in range(1, depth + 1):
            out, hidden = model.mtp(hidden[:, :-1], tokens[:, step:])
            mtp_loss[step - 1] += token_loss(out[:, :-1], tokens[:, step + 1 :]).item() / len(batches)
            right = out.argmax(-1) == best[:, step:]
            agreement[step - 1] += right.float().mean().item() / len(batches)
            # draft j of one cycle stands one row after draft j-1
            chain = right if before is None else right & before[:, :-1]
            accepted[step - 1] += chain.float().mean().item() / len(batches)
            before = chain
    model.train()
    set_compiled(compiled)
    return Score(loss, loss / math.log(2) * tokens_per_byte, mtp_loss, agreement, accepted)


# --- run -------------------------------------------------------------------------------------------------------------


def plot(log: Path, png: Path) -> None:
    """The loss curves of ``log.csv``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for column, label in (("loss", "trunk, training"), ("mtp_loss", "MTP, training (half of it against the trunk)")):
        values = np.array([float(row[column]) for row in rows])
        width = max(1, min(50, len(values) // 20))
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot([float(row["tokens"]) / 1e6 for row in rows][width - 1 :], smooth, label=label, linewidth=1)
    held = [row for row in rows if row["held_out"]]
    for column, label in (("held_out", "trunk, held out"), ("held_out_mtp", "MTP, held out")):
        axes.plot([float(r["tokens"]) / 1e6 for r in held], [float(r[column]) for r in held], "o--", ms=3, label=label)
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)", title="ds4-mini")
    axes.set_ylim(top=min(axes.get_ylim()[1], 6))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(png, dpi=110)


def work(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One process of a run. All hold the same model; process 0 keeps the clock, the log and the checkpoints."""
    started = time.monotonic()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.processes)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed + rank)
    set_compiled(not args.no_compile)

    train_docs, held_docs = data.documents(args.seed)
    tok = tokenizer.load(args.out / "tokenizer.json")
    bos = int(tok.token_to_id(data.BOS))
    train_ids, held_ids = encode(tok, train_docs), encode(tok, held_docs)
    tokens_per_byte = sum(map(len, held_ids)) / sum(len(document.text.encode()) for document in held_docs)
    held_rows = Rows(held_ids, bos, args.seed)
    held = [held_rows.batch(4, 512) for _ in range(12)]

    model = Ds4(MINI)
    model.init_weights(torch.Generator().manual_seed(args.seed))
    opts = optimizers(model, args.lr)
    step, seen, before = 0, 0, 0.0
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.csv"
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(opts, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, seen, before = state["step"], state["tokens"], state["elapsed"]
    # Each process reads the documents in an order of its own; a resumed run takes yet another one.
    rows = Rows(train_ids, bos, args.seed + 1000 * rank + step)
    micro = args.batch // (args.processes * args.micro_batch)
    if rank == 0:
        n_train, n_held = (sum(map(len, ids)) for ids in (train_ids, held_ids))
        print(f"{n_train:,} training tokens, {n_held:,} held out", flush=True)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def save() -> None:
        state = {
            "config": json.dumps(dataclasses.asdict(MINI)),
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in opts],
            "step": step,
            "tokens": seen,
            "elapsed": before + time.monotonic() - started,
            "arguments": json.dumps({name: str(value) for name, value in vars(args).items()}),
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    # The last evaluation, checkpoint and plot count as part of the run.
    end = started - before + args.minutes * 60 - min(60.0, 6 * args.minutes)
    begun: float | None = None
    last_saved = last_scored = started
    fields = ["step", "tokens", "seconds", "lr", "loss", "mtp_loss", "mtp2_loss", "indexer_loss", "norm", "busiest"]
    fields += ["held_out", "held_out_mtp", "bits_per_byte", "agreement"]
    file = open(log if rank == 0 else os.devnull, "a" if args.resume else "w", newline="")  # noqa: SIM115
    writer = csv.DictWriter(file, fields)
    if not args.resume:
        writer.writeheader()
    bar = tqdm(total=100, unit="%", mininterval=10, disable=rank > 0)
    row: dict[str, Any] = {}
    while True:
        # The first step compiles; the schedule starts after it. Process 0's clock is everyone's.
        now = time.monotonic()
        first = started - before if args.resume else begun if begun is not None else now
        clock = torch.tensor((now - first) / (end - first))
        dist.broadcast(clock, 0)
        progress = clock.item()
        if progress >= 1:
            break
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(progress)
        # Positions beyond 512 are seen late, at a small share of the run's cost.
        length = 1024 if progress > 0.85 else 512
        weight = 0.3 if progress < 0.6 else 0.1
        depth = 1 + step % 2  # the deeper draft position on every other step
        model.indexer_queries = 64 if step % 4 == 0 else 0
        trunk_sum = torch.zeros(3)
        for _ in range(micro):
            tokens = rows.batch(args.micro_batch // length, length + depth + 1)
            with torch.autocast("cpu", torch.bfloat16):
                trunk, drafts = losses(model, tokens, depth)
                aux = model.indexer_loss
            deeper = sum(draft * share for draft, share in zip(drafts, (1.0, 0.5)))
            ((trunk + weight * deeper + aux) / micro).backward()
            seen += args.micro_batch * args.processes
            trunk_sum += torch.tensor([trunk.item(), drafts[0].item(), drafts[-1].item()]) / micro
        average_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):  # one bad batch must not end a run; the norm is the same in all processes
            for optimizer in opts:
                optimizer.step()
        for counts in model.expert_counts.values():
            dist.all_reduce(counts)
        model.balance(2e-3 * rate(progress))
        model.zero_grad(set_to_none=True)
        step += 1

        now = time.monotonic()
        begun = now if begun is None else begun
        if rank > 0:
            continue
        row = {
            "step": step,
            "tokens": seen,
            "seconds": round(before + now - started, 1),
            "lr": f"{rate(progress) * args.lr:.3g}",
            "loss": round(trunk_sum[0].item(), 4),
            "mtp_loss": round(trunk_sum[1].item(), 4),
            "mtp2_loss": round(trunk_sum[2].item(), 4) if depth > 1 else "",
            "indexer_loss": round(aux.item(), 4) if model.indexer_queries else "",
            "norm": round(norm.item(), 3),
            # the most loaded expert's rows over the mean, worst layer
            "busiest": round(max((c.max() / c.float().mean()).item() for c in model.expert_counts.values()), 2),
        }
        if now - last_scored > 300:
            last_scored = now
            row.update(columns(evaluate(model, held[:3], tokens_per_byte, not args.no_compile)))
        writer.writerow(row)
        if step % 10 == 0:
            file.flush()
        if now - last_saved > (600 if last_saved > started else 300):
            last_saved = now
            save()
        speed = seen / max(now - begun, 1) if not args.resume else 0
        bar.set_postfix_str(
            f"{step} steps, {seen / 1e6:.2f} M tokens, loss {row['loss']:.3f} mtp {row['mtp_loss']:.3f}, {speed:.0f}/s"
        )
        bar.update(round(100 * progress) - bar.n)
    bar.close()
    if rank == 0:
        save()
        # The curve's last point is on the part that its other points are on; the score is on all of it.
        writer.writerow({**row, **columns(evaluate(model, held[:3], tokens_per_byte))})
        file.close()
        score = evaluate(model, held, tokens_per_byte)
        result = {**dataclasses.asdict(score), "tokens": seen, "steps": step, "epochs": seen / sum(map(len, train_ids))}
        (args.out / "score.json").write_text(json.dumps(result, indent=1))
        plot(log, args.out / "loss.png")
        print(result)
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--minutes", type=float, required=True, help="wall time of training, evaluation included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step, all processes together")
    parser.add_argument("--micro-batch", type=int, default=2048, help="tokens per forward")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak rate of Muon; other groups scale with it")
    parser.add_argument("--processes", type=int, default=2, help="one per core; they average gradients once a step")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile and a C++ compiler")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tokenizer.json"
    if not path.exists():
        texts = (document.text for document in data.documents(args.seed)[0])
        tokenizer.train(texts, MINI.n_vocab).save(str(path))
    # Large blocks that malloc returns to the system after each use cost more in page faults than the arithmetic.
    for name, value in (("MMAP_THRESHOLD", 32 << 20), ("TRIM_THRESHOLD", 8 << 30), ("TOP_PAD", 256 << 20)):
        os.environ.setdefault(f"MALLOC_{name}_", str(value))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, f"file://{folder}/rendezvous"), args.processes)


def columns(score: Score) -> dict[str, float]:
    return {
        "held_out": round(score.loss, 4),
        "held_out_mtp": round(score.mtp_loss[0], 4),
        "bits_per_byte": round(score.bits_per_byte, 4),
        "agreement": round(score.agreement[0], 4),
    }


if __name__ == "__main__":
    main()
