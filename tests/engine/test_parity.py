"""The engine computes what the PyTorch reference computes, and the reference's gradients are those of its loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tests.fixtures.ds4_gguf import Ds4Config
from tests.reference import model as reference
from tests.reference.export import load_tensors, mtp_tensors, trunk_tensors
from tests.reference.parity import CASES, MODES, compare, random_tensors, random_tokens

FLOAT32 = {name: mode for name, mode in MODES.items() if mode.f32 and not mode.flash}
FLOAT16 = {name: mode for name, mode in MODES.items() if name not in FLOAT32}


@pytest.mark.parametrize("name", CASES)
def test_float32_rows_agree(name: str) -> None:
    """Every row of trunk and MTP, however the prompt is cut into batches: 1e-5 of the largest magnitude."""
    for mode, errors in compare(CASES[name], FLOAT32):
        for field, rows in errors.items():
            assert rows.max() < 1e-5, f"{mode}, {field}: {rows.max():.1e} at row {rows.argmax()}"


@pytest.mark.parametrize("name", CASES)
def test_float16_keys_are_near(name: str) -> None:
    """Keys rounded to float16 move rows by 2e-3; where blocks or experts are chosen, a few may choose otherwise."""
    for mode, errors in compare(CASES[name], FLOAT16):
        for field, rows in errors.items():
            assert np.quantile(rows, 0.97) < 2e-3, f"{mode}, {field}: {np.quantile(rows, 0.97):.1e}"
            if name == "window":
                assert rows.max() < 2e-3, f"{mode}, {field}: {rows.max():.1e} at row {rows.argmax()}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _small(seed: int = 3, **changes: int) -> tuple[reference.Ds4, torch.Tensor]:
    cfg = Ds4Config(compress_ratios=(0, 4, 128), indexer_n_head=8, n_swa=32, **changes)  # type: ignore[arg-type]
    model = reference.Ds4(cfg)
    load_tensors(model, *random_tensors(cfg, seed))
    return model, torch.from_numpy(random_tokens(cfg, 150, seed).astype(np.int64))[None]


def _loss(model: reference.Ds4, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model.trunk(tokens[:, :-1])
    own = model.mtp_trunk(hidden[:, :-1], tokens[:, 1:-1])
    return model.loss(hidden, tokens[:, 1:]) + model.loss(own, tokens[:, 2:], True)


def test_gradients_are_the_slope_of_the_loss() -> None:
    """Along a random direction in each kind of parameter, the loss changes as its gradient says."""
    # All experts and all blocks: a choice that flips on the way would be a jump, which no gradient tells.
    model, tokens = _small(n_expert_used=4, indexer_top_k=64)
    _loss(model, tokens).backward()  # type: ignore[no-untyped-call]
    kinds: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kinds.setdefault(name.split(".", 2)[-1] if name.startswith("blk") else name, []).append(parameter)
    assert "indexer.proj.weight" not in kinds  # the choice of blocks has no gradient
    assert len(kinds) > 30
    for kind, parameters in kinds.items():
        gradients = [g for g in (p.grad for p in parameters) if g is not None]
        length = torch.stack([g.norm() for g in gradients]).norm()
        assert length > 0, kind
        losses = []
        # Far enough for float32 losses to tell, near enough for a straight line: 2e-3 of loss, or 5 % of the weights.
        size = float(torch.stack([p.detach().norm() for p in parameters]).norm())
        step = min(2e-3 / float(length), 0.05 * size)
        with torch.no_grad():
            for sign in (1, -2):
                for parameter, gradient in zip(parameters, gradients):
                    parameter.add_(sign * step / length * gradient)
                losses.append(float(_loss(model, tokens)))
            for parameter, gradient in zip(parameters, gradients):
                parameter.add_(step / length * gradient)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float(length), rel=0.05, abs=4e-6 / step), kind


def test_indexer_loss_trains_the_indexer_alone() -> None:
    """The KL term reaches every parameter of the indexer, and nothing else."""
    model, tokens = _small()
    model.train()
    model.indexer_queries = 16
    model.trunk(tokens)
    assert float(model.indexer_loss.detach()) > 0
    model.indexer_loss.backward()  # type: ignore[no-untyped-call]
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached and all("indexer" in name for name in reached)
    assert reached == {name for name, _ in model.named_parameters() if "indexer" in name}


def test_indexer_learns_what_attention_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is a distribution over visible blocks that follows the attention: it is not flat."""
    targets: list[torch.Tensor] = []
    original = torch.nn.functional.kl_div

    def kl_div(logp: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        targets.append(target)
        return original(logp, target, reduction=reduction)

    monkeypatch.setattr(torch.nn.functional, "kl_div", kl_div)
    model, tokens = _small()
    model.indexer_queries = 64
    model.trunk(tokens)
    (target,) = targets
    visible = target > 0
    assert torch.allclose(target.sum(-1), torch.ones(()))
    assert (visible.long().diff(dim=-1) <= 0).all() and not visible.all()
    many = target[visible.sum(-1) > 20]
    assert (many.amax(-1) > 3 * many.masked_fill(many == 0, 2).amin(-1)).all()


def test_balance_moves_towards_the_idle_experts() -> None:
    """A bias rises where fewer rows went, and hash-routed layers are left alone."""
    model, tokens = _small()
    model.trunk(tokens)
    blocks = {i: cast(reference.Block, model.blk[i]) for i in model.expert_counts}
    before = {i: block.exp_probs_b.bias.clone() for i, block in blocks.items() if not block.hashed}
    model.balance(0.01)
    assert before and len(before) < len(blocks)
    for i, bias in before.items():
        moved = blocks[i].exp_probs_b.bias - bias
        counts = model.expert_counts[i]
        assert moved[counts.argmin()] > moved[counts.argmax()] + 0.01


def test_causal_and_trainable_from_the_start() -> None:
    """Drawn weights see no later token, and a few steps on one batch lower both losses."""
    torch.manual_seed(0)
    model = reference.Ds4(Ds4Config(n_swa=32))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, model.cfg.n_vocab, (2, 150))
    other = tokens.clone()
    other[:, 100] = (other[:, 100] + 1) % model.cfg.n_vocab
    with torch.no_grad():
        same = (model.trunk(tokens) - model.trunk(other)).abs().amax((0, 2))
    assert same[:100].max() == 0 and same[100:].min() > 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = _loss(model, tokens)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_tensors_survive_export() -> None:
    """What goes into a model comes out for the GGUF writer, bit for bit."""
    model, _ = _small()
    trunk, mtp = random_tensors(model.cfg, 3)
    for want, got in ((trunk, trunk_tensors(model)), (mtp, mtp_tensors(model))):
        assert want.keys() == got.keys()
        assert all(np.array_equal(want[name], got[name]) for name in want)
