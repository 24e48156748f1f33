"""The DSpark head of the reference against the engine's: what it reads, logits through the chain, confidences."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from ds4_mtp_plugin import engine, host  # noqa: E402
from tests.fixtures import GPU_LAYERS  # noqa: E402
from tests.fixtures.ds4_gguf import byte_vocab, write_gguf  # noqa: E402
from tests.fixtures.dspark_gguf import write_file  # noqa: E402
from tests.reference import dspark, parity, train_dspark  # noqa: E402
from tests.reference.export import load_tensors  # noqa: E402
from tests.reference.model import Ds4  # noqa: E402

CASE = parity.CASES["kinds"]
CFG = CASE.cfg
LAYERS = (1, 3, len(CFG.compress_ratios))
MASK = 3


def a_model() -> Any:
    trunk, mtp = parity.random_tensors(CFG, CASE.seed)
    model = Ds4(CFG)
    load_tensors(model, trunk, mtp)
    return model.eval(), trunk


def a_head(model: Any) -> Any:
    """Every part of it matters: random weights, with a chain and a confidence that are not small."""
    torch.manual_seed(3)
    head = dspark.Dspark(dspark.stage_config(CFG, 3, 4), LAYERS, rank=32)
    head.init_weights(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, p in head.named_parameters():
            if name.endswith(("norm.weight", "_scale.weight")):
                p.copy_(1 + 0.2 * torch.randn(p.shape))
            elif name.startswith("conf_proj"):
                p.copy_(0.03 * torch.randn(p.shape))
            elif name.startswith(("markov", "output_hc_fn")) or "_sinks" in name or "hc_" in name:
                p.add_(0.3 * torch.randn(p.shape))
        for block in head.blk:
            block.exp_probs_b.bias.copy_(0.1 * torch.randn(block.exp_probs_b.bias.shape))
    return head.eval()


class Engine:
    """Trunk and head of the engine, with rows of float32."""

    def __init__(self, trunk: Path, head: Path, n: int) -> None:
        library = engine.Library(host.library_path())
        self.model = engine.Model(library, str(trunk), n_gpu_layers=GPU_LAYERS)
        f32: dict[str, Any] = {"type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}
        self.trunk = self.model.new_context(n_ctx=1024, n_batch=n, n_ubatch=n, **f32)
        self.head_model = engine.Model(library, str(head), n_gpu_layers=GPU_LAYERS)
        self.head = self.head_model.new_context(
            n_ctx=1024, n_batch=n, n_ubatch=n, ctx_other=self.trunk._ptr, swa_full=False, **f32
        )
        self.trunk.keep_layers(self.head_model.target_layers)
        self.head.see_all()
        self.head.set_hidden(engine.HIDDEN_OUTPUTS)

    def read(self, tokens: list[int]) -> Any:
        self.trunk.decode(engine.Batch(len(tokens)).set(tokens, 0, 0))
        return self.trunk.hidden_rows(0, len(tokens))

    def draft(self, features: Any, token: int, n_block: int) -> tuple[Any, Any]:
        n = len(features)
        rows = engine.Batch(n, n_embd_out=features.shape[1], tokens=False)
        rows.embd[:] = features
        self.head.decode(rows.set([0] * n, 0, 0))
        block = [token, *[MASK] * (n_block - 1)]
        self.head.decode(engine.Batch(n_block).set(block, n, 0, outputs="all"))
        logits = np.stack([self.head.logits(i).copy() for i in range(n_block)])
        return logits, self.head.hidden_rows(0, n_block)[:, 0]

    def close(self) -> None:
        for each in (self.head, self.head_model, self.trunk, self.model):
            each.close()


@pytest.mark.parametrize("n", [4, 127, 128, 300])
def test_a_block_is_the_engines(tmp_path: Path, n: int) -> None:
    """Behind texts that are shorter and longer than the window."""
    model, trunk = a_model()
    head = a_head(model)
    path, head_path = tmp_path / "trunk.gguf", tmp_path / "head.gguf"
    write_gguf(path, CFG, trunk, part="trunk")
    write_file(
        head_path, head.cfg, dspark.tensors(head), layers=LAYERS, mask=MASK, vocab=byte_vocab(CFG.n_vocab),
        quant=lambda name: "F32", name="parity",
    )  # fmt: skip
    tokens = parity.random_tokens(CFG, n + 1, 5)
    with torch.no_grad():
        _, features = dspark.read(model, torch.from_numpy(tokens[None, :n].astype(np.int64)), LAYERS)
        drafts, logits, sure = head.draft(model, features[0], int(tokens[n]), MASK)
    both = Engine(path, head_path, max(n, 8))
    try:
        found = both.read(tokens[:n].tolist())
        np.testing.assert_allclose(found, features[0].numpy(), rtol=0, atol=2e-3 * float(features.abs().max()))
        theirs, confident = both.draft(features[0].numpy(), int(tokens[n]), head.n_block)
    finally:
        both.close()
    assert theirs.argmax(-1).tolist() == drafts.tolist()
    np.testing.assert_allclose(theirs, logits.numpy(), rtol=0, atol=2e-3 * float(logits.abs().max()))
    np.testing.assert_allclose(confident, sure.numpy(), rtol=0, atol=2e-3)
    assert np.ptp(sure.numpy()) > 0.01 and len(set(drafts.tolist())) > 1


def test_blocks_of_several_anchors_are_those_of_each_alone() -> None:
    """As training computes them."""
    model, _ = a_model()
    head = a_head(model)
    tokens = torch.from_numpy(parity.random_tokens(CFG, 260, 7)[None].astype(np.int64))
    with torch.no_grad():
        _, features = dspark.read(model, tokens, LAYERS)
        anchors = torch.tensor([1, 40, 129, 200])
        block = torch.full((1, len(anchors), head.n_block), MASK)
        block[0, :, 0] = tokens[0, anchors]
        states = head.states(head.rows(features), model.token_embd(block), anchors)
        for i, a in enumerate(anchors.tolist()):
            alone = head.states(head.rows(features[:, :a]), model.token_embd(block[:, i : i + 1]), anchors[i : i + 1])
            torch.testing.assert_close(states[:, i], alone[:, 0], rtol=1e-4, atol=1e-4)


def test_a_stage_is_not_compressed() -> None:
    cfg = dspark.stage_config(dataclasses.replace(CFG, n_hash_layers=1), 2, 4)
    head = dspark.Dspark(cfg, LAYERS)
    assert [(block.ratio, block.hashed) for block in head.blk] == [(0, False)] * 2


def test_training_compares_each_row_with_its_own_position() -> None:
    """Row i of a block at a stands at a + i, knows the token there, and is to say what the trunk says behind it."""
    model, _ = a_model()
    head = a_head(model)
    tokens = torch.from_numpy(parity.random_tokens(CFG, 150, 9)[None].astype(np.int64))
    anchors = torch.tensor([20, 100])
    with torch.no_grad():
        blocks = train_dspark.Blocks(model, head, tokens, anchors, MASK)
        logits, _ = model(tokens)
        for j, a in enumerate(anchors.tolist()):
            for i in range(head.n_block):
                torch.testing.assert_close(blocks.trunk[0, j, i], logits[0, a + i], rtol=1e-4, atol=1e-4)
                assert blocks.targets[0, j, i] == tokens[0, a + i + 1]
        # The first row is drafted as real drafting has it; the others know the text before them.
        _, features = dspark.read(model, tokens[:, :100], LAYERS)
        _, drafted, sure = head.draft(model, features[0], int(tokens[0, 100]), MASK)
        torch.testing.assert_close(blocks.logits[0, 1, 0], drafted[0], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(torch.sigmoid(blocks.sure[0, 1, 0]), sure[0], rtol=1e-3, atol=1e-3)


def test_a_loss_is_least_where_text_and_trunk_are_said() -> None:
    targets = torch.tensor([[[2, 5]]])
    trunk = torch.full((1, 1, 2, 8), -20.0).scatter_(-1, targets[..., None], 20.0)
    right, wrong = trunk.clone(), trunk.roll(1, -1)
    assert train_dspark.block_loss(right, targets, trunk).max() < 1e-4
    found = train_dspark.block_loss(torch.stack((right[..., 0, :], wrong[..., 1, :]), 2), targets, trunk)
    assert found[0] < 1e-4 and found[1] > 10
