"""Several MTP heads: each has read what it would have read had it been asked at every token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from ds4_mtp_plugin.speculation import MtpHeadsDrafter
from tests.fixtures import GPU_LAYERS
from tests.fixtures.mtp_gguf import ACTIVE, FAMILIES, N_EMBD, plant

WINDOW = 32
SEVERAL = [name for name, family in FAMILIES.items() if family.n_heads > 1]


class Heads:
    """Two drafters over heads of one file, with the same committed text."""

    def __init__(self, path: Path, n_heads: int) -> None:
        self._model = engine.Model(
            engine.Library(host.library_path()), str(path), load_mtp=True, n_gpu_layers=GPU_LAYERS
        )
        n_rows = WINDOW + n_heads - 1
        self.ours, self.fresh = (
            MtpHeadsDrafter(
                self._model.new_context(
                    mtp=True, n_ctx=8 * WINDOW, n_batch=n_rows, n_ubatch=n_rows, swa_full=True, n_threads=1
                ),
                n_heads=n_heads,
                window=WINDOW,
            )
            for _ in range(2)
        )
        rng = np.random.default_rng(3)
        self.tokens = rng.choice(ACTIVE, 2000).tolist()
        self.hidden = rng.normal(size=(2000, N_EMBD)).astype(np.float32)

    def draft(self, drafter: MtpHeadsDrafter, n_past: int, n_max: int) -> tuple[list[int], list[float]]:
        margins: list[float] = []
        drafts = drafter.draft(0, n_past, self.tokens[n_past], n_max, lambda best: margins.append(best.margin) or True)
        return drafts, margins

    def process(self, drafter: MtpHeadsDrafter, start: int, end: int) -> None:
        drafter.rollback(0, start)
        drafter.process(0, start, self.tokens[start:end], self.hidden[start:end])

    def anew(self, n_past: int, n_max: int) -> tuple[list[int], list[float]]:
        """What a drafter says that is shown the last rows alone, at once."""
        self.fresh.rollback(0, 0)
        self.process(self.fresh, max(0, n_past - WINDOW), n_past)
        return self.draft(self.fresh, n_past, n_max)

    def close(self) -> None:
        self.ours.close()
        self.fresh.close()
        self._model.close()


@pytest.fixture(params=SEVERAL)
def heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heads]:
    files = plant(tmp_path_factory.mktemp("heads"), request.param, beside=True, noise=2.0)
    assert files.head is not None
    made = Heads(files.head, FAMILIES[request.param].n_heads)
    yield made
    made.close()


def test_drafts_do_not_depend_on_how_deep_the_ones_before_were(heads: Heads) -> None:
    """Rounding apart: a head that was not asked for long is shown many rows at once."""
    rng = np.random.default_rng(0)
    n_past, compared = 40, 0
    heads.process(heads.ours, 0, n_past)
    while n_past < 1900:  # several times what there is room for
        deepest = 3 if n_past % 500 < 400 else 1  # for a hundred tokens the deeper heads are not asked at all
        n_max = int(rng.integers(0, deepest + 1))
        drafts, margins = heads.draft(heads.ours, n_past, n_max) if n_max else ([], [])
        if n_max and rng.random() < 0.4:
            expected, expected_margins = heads.anew(n_past, n_max)
            assert drafts == expected and len(drafts) == n_max
            np.testing.assert_allclose(margins, expected_margins, atol=0.02)
            compared += n_max > 1
        n = int(rng.integers(1, n_max + 2))
        heads.ours.rollback(0, n_past + 1)
        heads.process(heads.ours, n_past, n_past + n)
        n_past += n
    assert compared > 50


def test_the_text_is_taken_back(heads: Heads) -> None:
    for start, end in ((0, 30), (30, 60)):
        heads.process(heads.ours, start, end)
        heads.draft(heads.ours, end, 3)
    heads.ours.rollback(0, 50)
    heads.process(heads.ours, 50, 55)
    assert heads.draft(heads.ours, 55, 3)[0] == heads.anew(55, 3)[0]


def test_there_are_as_many_drafts_as_heads(heads: Heads) -> None:
    heads.process(heads.ours, 0, 20)
    n_decodes = heads.ours.n_decodes
    assert len(heads.draft(heads.ours, 20, 9)[0]) == heads.ours.n_decodes - n_decodes == 3


def test_an_exception_spoils_no_later_draft(heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    heads.process(heads.ours, 0, 60)
    decode, calls = heads.ours._context.decode, 0

    def interrupted(batch: engine.Batch) -> None:
        nonlocal calls
        calls += 1
        decode(batch)
        if calls == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(heads.ours._context, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            heads.draft(heads.ours, 60, 3)
    heads.ours.rollback(0, 60)
    assert heads.draft(heads.ours, 60, 3)[0] == heads.anew(60, 3)[0]


def test_limits_are_checked(heads: Heads) -> None:
    with pytest.raises(ValueError, match=f"4 heads need n_ubatch {WINDOW + 3}; the context has {WINDOW + 2}"):
        MtpHeadsDrafter(heads.ours._context, n_heads=4, window=WINDOW)
    with pytest.raises(engine.EngineError, match="no NextN block 3: it has 3"):
        heads.ours._context.set_head(3)
