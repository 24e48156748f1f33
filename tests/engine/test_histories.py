"""After any history of accepted and rejected drafts the target is in the state of a fresh run of what was committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from ds4_mtp_plugin.host.opening import GPU_BLOCK
from ds4_mtp_plugin.speculation import CommonSpeculative
from tests import LONG
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, TINY, Planted

N_CYCLES = 250  # a history; at most 9 tokens each, so that a context of 2304 holds it
N_HISTORIES = 40 if LONG else 2
DEPTH = 8 if GPU_LAYERS == 0 else 4  # as far as a GPU promises the bits of single rows
BOS, EOS = 0, 1

Rows = npt.NDArray[np.float32]


class Scripted:
    """A drafter that proposes what it is told."""

    window = 0
    n_decodes = 0
    drafts: Sequence[int] = ()

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: Any) -> None: ...

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: Any = None) -> list[int]:
        return list(self.drafts[:n_max])

    def rollback(self, seq_id: int, n_past: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def model(plant: Callable[..., Planted]) -> Iterator[engine.Model]:
    library = engine.Library(host.library_path())
    model = engine.Model(library, str(plant(**BY_CONTEXT).trunk), n_gpu_layers=GPU_LAYERS)
    yield model
    model.close()


def context(model: engine.Model, **params: int) -> engine.Context:
    return model.new_context(n_ctx=2304, n_ubatch=32, n_threads=1, n_threads_batch=1, **params)


def row(target: engine.Context, i: int) -> Rows:
    """What a decode gives of batch row `i`: logits, and the inputs of the layers that are kept."""
    kept = target.hidden_rows(i, 1)[0] if target._layers else []
    return np.concatenate([target.logits(i), kept])


def fresh(model: engine.Model, tokens: Sequence[int], layers: Sequence[int]) -> Rows:
    """The row of each token, decoded one by one in a context of its own."""
    target, batch = context(model), engine.Batch(1)
    target.keep_layers(layers)
    rows = []
    for i, token in enumerate(tokens):
        target.decode(batch.set([token], i, 0))
        rows.append(row(target, 0))
    target.close()
    return np.stack(rows)


def history(
    model: engine.Model,
    seed: int,
    accept: Callable[[np.random.Generator, int], int],
    wrong: Callable[..., int],
    layers: Sequence[int],
) -> tuple[list[int], Rows, Counter[tuple[int, int, int]]]:
    """(the committed tokens, the row of each, how often at (position mod 4, depth, accepted)) of random cycles."""
    random = np.random.default_rng(seed)
    target, drafter = context(model, n_rs_seq=DEPTH), Scripted()
    target.keep_layers(layers)
    spec = CommonSpeculative(target, drafter, n_draft=DEPTH, within=GPU_BLOCK if GPU_LAYERS else None)
    tokens: list[int] = []
    rows: list[Rows] = []
    cycles: Counter[tuple[int, int, int]] = Counter()
    last = int(random.integers(260, 500))
    for _ in range(N_CYCLES):
        depth = int(random.integers(1, DEPTH + 1))
        n_accepted = accept(random, depth)
        text = random.integers(260, 500, n_accepted + 1).tolist()  # the last one is sampled, the others were drafted
        drafter.drafts = [*text[:n_accepted], *(wrong(random) for _ in range(depth - n_accepted))]
        drafts = spec.draft(0, len(tokens), last, depth)
        if GPU_LAYERS == 0:
            assert len(drafts) == depth
        n_accepted, depth = min(n_accepted, len(drafts)), len(drafts)
        verify = spec.verify(0, len(tokens), last, drafts)
        cycles[len(tokens) % 4, depth, n_accepted] += 1
        rows += [row(target, i) for i in range(n_accepted + 1)]
        tokens += [last, *drafts[:n_accepted]]
        verify.row = n_accepted
        spec.accept(verify)
        assert target.seq_pos_max(0) == len(tokens) - 1
        last = text[n_accepted]
    target.close()
    return tokens, np.stack(rows), cycles


def any_token(random: np.random.Generator) -> int:
    return int(random.integers(0, 512))


def any_number(random: np.random.Generator, depth: int) -> int:
    return int(random.integers(0, depth + 1))


#: (how many of `depth` drafts are right, a wrong one, layers whose inputs are kept)
CASES: dict[str, tuple[Any, Any, Sequence[int]]] = {
    "random": (any_number, any_token, ()),
    "random, with the inputs of layers": (any_number, any_token, (1, 3, TINY.n_layer)),
    "all right": (lambda random, depth: depth, any_token, ()),
    "all wrong": (lambda random, depth: 0, any_token, ()),
    "BOS and EOS": (
        lambda random, depth: int(random.integers(0, depth)),
        lambda random: int(random.choice([BOS, EOS])),
        (),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_history_is_a_fresh_run(model: engine.Model, case: str) -> None:
    done: Counter[tuple[int, int, int]] = Counter()
    for seed in range(N_HISTORIES if case == "random" else max(1, N_HISTORIES // 4)):
        tokens, rows, cycles = history(model, seed, *CASES[case])
        differing = (rows != fresh(model, tokens, CASES[case][2])).any(1)
        assert np.flatnonzero(differing).tolist() == []
        done += cycles
    if case == "random":
        assert len(done) > (0.96 if LONG else 0.85) * 4 * sum(range(2, DEPTH + 2))


@pytest.mark.parametrize("token", [-1, 512, 2**31 - 1])
def test_a_draft_that_is_no_token_ends_the_drafts(model: engine.Model, token: int) -> None:
    target, drafter = context(model, n_rs_seq=DEPTH), Scripted()
    spec = CommonSpeculative(target, drafter, n_draft=DEPTH)
    drafter.drafts = [300, token, 301]
    assert spec.draft(0, 0, 299, DEPTH) == [300]
    drafter.drafts = [token]
    drafts = spec.draft(0, 0, 299, DEPTH)
    spec.accept(spec.verify(0, 0, 299, drafts))
    assert (drafts, target.seq_pos_max(0)) == ([], 0)
    target.close()
