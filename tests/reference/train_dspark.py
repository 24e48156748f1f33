"""Training of ds4-mini's DSpark head on the shipped model, which stays as it is, in as many minutes as you give it.

    python -m tests.reference.train_dspark --out DIR --minutes 40

What a block is asked for is what the trunk says next: half of the loss is against its distribution, half against the
text, at every position given that all before it were right, and later positions count less, since they count only then.
The confidence learns whether the best token is the trunk's. Optimisers, schedule and text are those of `train.py`.

Writes to DIR: ``head.pt`` (atomically, every five minutes and at the end), ``log.csv`` and ``score.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from tests.reference import data, dspark, ship, train
from tests.reference.export import load_tensors
from tests.reference.model import Ds4, fused, set_compiled

LAYERS = (1, 3, 5)
N_EXPERT = 4
N_ANCHORS = 48
WEIGHTS = (1.0, 0.8, 0.65, 0.5, 0.4)


def mask_id() -> int:
    """A control token that no text has."""
    return data.SPECIALS.index(data.PAD)


def shipped() -> Ds4:
    """The model that comes with the plugin, as its files say."""
    from gguf import GGUFReader, dequantize

    def arrays(name: str) -> dict[str, Any]:
        found = {}
        for tensor in GGUFReader(ship.MODELS / name).tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            whole = tensor.tensor_type.name == "I32"
            values = tensor.data if whole else dequantize(tensor.data, tensor.tensor_type)
            found[tensor.name] = np.array(values, np.int32 if whole else np.float32).reshape(shape)
        return found

    config = json.loads((ship.MODELS / "card.json").read_text())["config"]
    model = Ds4(ship.config_of(config))
    trunk, mtp = arrays(ship.NAMES["trunk"]), arrays(ship.NAMES["mtp"])
    load_tensors(model, trunk, mtp)
    return model.eval().requires_grad_(False)


def ids(documents: list[data.Document]) -> list[Any]:
    """Each document's ids between BOS and EOS, by the shipped vocabulary."""
    import ds4_mtp_plugin  # noqa: F401  first, so that the host runs on its library

    from llama_cpp import Llama  # isort: skip

    llm = Llama(str(ship.MODELS / ship.NAMES["trunk"]), vocab_only=True, verbose=False)
    bos, eos = llm.token_bos(), llm.token_eos()
    found = [
        np.array([bos, *llm.tokenize(each.text.encode(), add_bos=False, special=True), eos], np.int64)
        for each in documents
    ]
    llm.close()
    return found


@fused
def block_loss(logits: torch.Tensor, targets: torch.Tensor, trunk: torch.Tensor) -> torch.Tensor:
    """[n]: half the text's own tokens, half the trunk's distribution, of logits and trunk [B, A, n, V]."""
    log_p = F.log_softmax(logits.float(), -1)
    text = -log_p.gather(-1, targets[..., None])[..., 0]
    like = -(F.softmax(trunk.float(), -1) * log_p).sum(-1)
    return (0.5 * text + 0.5 * like).mean((0, 1))


class Blocks:
    """What a head makes of blocks at `anchors` of tokens [B, T], teacher-forced."""

    def __init__(self, model: Ds4, head: dspark.Dspark, tokens: torch.Tensor, anchors: torch.Tensor, mask: int) -> None:
        n = head.n_block
        with torch.no_grad():
            hidden, features = dspark.read(model, tokens, head.layers)
            at = anchors[:, None] + torch.arange(n)
            self.trunk = model.logits(hidden[:, at.flatten()]).unflatten(1, at.shape)
            before, self.targets = tokens[:, at], tokens[:, at + 1]
            block = torch.full_like(before, mask)
            block[..., 0] = before[..., 0]
            embedded = model.token_embd(block)
        # The anchor's own row is not committed yet: no later one than its is read.
        states = head.states(head.rows(features), embedded, anchors)
        self.logits, self.sure = head.chained(model.output, states, before)
        self.right = self.logits.argmax(-1) == self.trunk.argmax(-1)


def optimizers(head: dspark.Dspark, lr: float) -> list[torch.optim.Optimizer]:
    matrices, tables, delicate = [], [], []
    for name, p in head.named_parameters():
        if name.startswith("markov"):
            tables.append(p)
        elif p.ndim < 2 or "hc_" in name or "gate_inp" in name or "conf_proj" in name:
            delicate.append(p)
        else:
            matrices.append(p)
    groups = [
        {"params": tables, "lr": lr, "weight_decay": 0.0},
        {"params": delicate, "lr": 0.3 * lr, "weight_decay": 0.0},
    ]
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=True),
        train.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.1),
    ]
    for optimizer in result:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return result


@torch.no_grad()
def evaluate(model: Ds4, head: dspark.Dspark, batches: list[torch.Tensor], mask: int) -> dict[str, Any]:
    """Per position: the share of drafts that are the trunk's best token, the same with all before them, and how far
    the confidence is from it on average (calibration)."""
    head.eval()
    right, chain, sure = [], [], []
    for tokens in batches:
        anchors = torch.arange(3, tokens.shape[1] - head.n_block, 7)
        blocks = Blocks(model, head, tokens, anchors, mask)
        right.append(blocks.right.float().mean((0, 1)))
        chain.append(blocks.right.cumprod(-1).float().mean((0, 1)))
        sure.append((torch.sigmoid(blocks.sure) - blocks.right.float()).mean((0, 1)))
    head.train()
    named = {"agreement": right, "accepted": chain, "confidence_off": sure}
    return {name: torch.stack(rows).mean(0).tolist() for name, rows in named.items()}


def work(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    started = time.monotonic()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.processes)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed + rank)
    set_compiled(not args.no_compile)
    model = shipped()
    mask = mask_id()
    head = dspark.Dspark(dspark.stage_config(model.cfg, n_expert=N_EXPERT), LAYERS)
    head.init_weights(model, torch.Generator().manual_seed(args.seed))
    opts = optimizers(head, args.lr)
    train_docs, held_docs = data.documents(args.seed)
    rows = train.Rows(ids(train_docs), 0, args.seed + 1000 * rank)
    held_rows = train.Rows(ids(held_docs), 0, args.seed)
    held = [held_rows.batch(4, 512) for _ in range(8)]
    last_saved, begun, step, seen = time.monotonic(), None, 0, 0

    def save() -> None:
        state = {"head": head.state_dict(), "arguments": json.dumps({k: str(v) for k, v in vars(args).items()})}
        torch.save(state, args.out / "head.tmp")
        os.replace(args.out / "head.tmp", args.out / "head.pt")

    file = open(args.out / "log.csv" if rank == 0 else os.devnull, "w", newline="")  # noqa: SIM115
    writer = csv.DictWriter(file, ["step", "tokens", "seconds", "loss", *(f"right_{i + 1}" for i in range(5))])
    writer.writeheader()
    bar = tqdm(total=100, unit="%", mininterval=10, disable=rank > 0)
    weights = torch.tensor(WEIGHTS)
    while True:
        now = time.monotonic()
        clock = torch.tensor((now - (begun or now)) / (60 * args.minutes))
        dist.broadcast(clock, 0)
        if (progress := clock.item()) >= 1:
            break
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * train.rate(progress)
        tokens = rows.batch(4, 512)
        anchors = torch.randperm(512 - head.n_block - 1)[:N_ANCHORS].sort().values + 1
        with torch.autocast("cpu", torch.bfloat16):
            blocks = Blocks(model, head, tokens, anchors, mask)
        losses = block_loss(blocks.logits, blocks.targets, blocks.trunk)
        confident = F.binary_cross_entropy_with_logits(blocks.sure.float(), blocks.right.float())
        ((losses * weights).sum() / weights.sum() + 0.2 * confident).backward()
        train.average_gradients(head)  # type: ignore[arg-type]
        norm = torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        if torch.isfinite(norm):
            for optimizer in opts:
                optimizer.step()
        for counts in head.expert_counts.values():
            dist.all_reduce(counts)
        head.balance(2e-3 * train.rate(progress))
        head.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + tokens.numel() * args.processes
        begun = begun or time.monotonic()
        if rank > 0:
            continue
        right = blocks.right.float().mean((0, 1)).tolist()
        seconds = time.monotonic() - started
        row = {"step": step, "tokens": seen, "seconds": round(seconds, 1), "loss": round(losses.mean().item(), 4)}
        writer.writerow({**row, **{f"right_{i + 1}": round(share, 4) for i, share in enumerate(right)}})
        if step % 10 == 0:
            file.flush()
        if time.monotonic() - last_saved > 300:
            last_saved = time.monotonic()
            save()
        bar.set_postfix_str(
            f"{step} steps, {seen / 1e6:.2f} M, loss {row['loss']}, right {right[0]:.2f} {right[4]:.2f}"
        )
        bar.update(math.floor(100 * progress) - bar.n)
    bar.close()
    if rank == 0:
        save()
        file.close()
        set_compiled(False)
        result = {"steps": step, "tokens": seen, **evaluate(model, head, held, mask)}
        (args.out / "score.json").write_text(json.dumps(result, indent=1))
        print(result)
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--minutes", type=float, required=True, help="wall time of training, from the first step on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak rate of Muon; other groups scale with it")
    parser.add_argument("--processes", type=int, default=2, help="one per core; they average gradients once a step")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile and a C++ compiler")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, value in (("MMAP_THRESHOLD", 32 << 20), ("TRIM_THRESHOLD", 8 << 30), ("TOP_PAD", 256 << 20)):
        os.environ.setdefault(f"MALLOC_{name}_", str(value))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, f"file://{folder}/rendezvous"), args.processes)


if __name__ == "__main__":
    main()
