"""What training relies on, each part alone: rows, schedule, Muon's iteration, and what each loss compares."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from tests.fixtures.ds4_gguf import Ds4Config  # noqa: E402
from tests.reference import data, train  # noqa: E402
from tests.reference.model import Ds4  # noqa: E402


def test_rows_hold_every_document_once_an_epoch() -> None:
    bos = 0
    documents = [np.array([bos, *range(10 * i + 1, 10 * i + 1 + size), 9999]) for i, size in enumerate((3, 9, 1, 5))]
    n = sum(map(len, documents))
    rows = train.Rows(documents, bos, seed=1)
    taken = [rows.take(4) for _ in range(40)]
    assert all(len(row) == 4 and row[0] == bos for row in taken)
    stream: list[int] = []
    for row in taken:  # a row that goes on in a document carries a BOS of its own
        goes_on = bool(stream) and stream[-1] != 9999
        stream += list(row[1:] if goes_on else row)
    epochs = [stream[i : i + n] for i in range(0, len(stream) - n + 1, n)]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch) == sorted(np.concatenate(documents))
    assert epochs[0] != epochs[1]


def test_the_rate_ends_at_zero() -> None:
    assert train.rate(0) == pytest.approx(0.01)
    assert train.rate(0.2) == 1
    assert train.rate(0.675) == pytest.approx(0.5)
    assert train.rate(1.0) == 0
    assert train.rate(1.1) == 0


@pytest.mark.parametrize("shape", [(3, 16, 48), (48, 16)])
def test_orthogonalize_levels_singular_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(train.orthogonalize(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3
    # and the directions stay: U V^T of the matrix itself
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.linalg.svdvals(train.orthogonalize(matrices) - u @ vh).max() < 0.6


def test_losses_compare_each_pass_with_its_own_position() -> None:
    """The trunk's row t with token t+1; MTP rows (hidden t-1, token t) with token t+1 and the trunk's row t."""
    cfg = Ds4Config(n_swa=128, n_vocab=320)
    model = Ds4(cfg)
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, cfg.n_vocab, (2, 19), generator=torch.Generator().manual_seed(1))
    length = 16
    with torch.no_grad():
        trunk, drafts = train.losses(model, tokens, depth=2)
        logits, hidden = model(tokens)
        log_p = logits.log_softmax(-1)
        expected = -torch.stack([log_p[:, t].gather(1, tokens[:, t + 1, None]) for t in range(length)]).mean()
        assert trunk.item() == pytest.approx(expected.item(), rel=1e-5)
        hidden = hidden[:, :length]
        for step, draft in enumerate(drafts, 1):
            out, hidden = model.mtp(hidden, tokens[:, step : step + length])
            log_q = out.log_softmax(-1)
            text = [-log_q[:, i].gather(1, tokens[:, i + step + 1, None]) for i in range(length)]
            like = [-(log_p[:, i + step].exp() * log_q[:, i]).sum(-1) for i in range(length - step)]
            expected = 0.5 * torch.stack(text).mean() + 0.5 * torch.stack(like).mean()
            assert draft.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_split_is_by_file_and_repeats() -> None:
    learned, held = data.documents(seed=3)
    assert {document.source for document in learned}.isdisjoint(document.source for document in held)
    assert data.documents(seed=3) == (learned, held)
    assert 0.005 < sum(len(d.text) for d in held) / sum(len(d.text) for d in learned) < 0.08
