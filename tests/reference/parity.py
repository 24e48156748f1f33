"""Parity of the PyTorch reference with the engine, and the golden logits that need no PyTorch.

``python -m tests.reference.parity`` prints the table: for each configuration and way of decoding, the largest
difference over all rows, divided by the largest magnitude of the reference's rows, for trunk logits, MTP logits and
hidden rows. ``--write-golden`` writes ``tests/golden/*.npz`` anew.

Weights are random, drawn by numpy alone, and scaled so that every part matters to the logits.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.fixtures.ds4_gguf import Ds4Config, mtp_shapes, trunk_shapes, write_gguf
from tests.fixtures.row_engine import RowEngine

Array = npt.NDArray[Any]

#: Positions of a parity run: past 512, and of no special length.
N_TOKENS = 700

#: Last positions decoded with the trunk's hidden rows before the MTP block runs on its own for two rows.
ANCHORS = (2, 63, 126, 127, 128, 300, 511, 512, 690)

GOLDEN = Path(__file__).parent.parent / "golden" / "logits.npz"

#: Rows kept in the golden file: around the window, block and ubatch boundaries, and past 512.
GOLDEN_ROWS = (0, 1, 3, 4, 7, 126, 127, 128, 129, 254, 255, 256, 257, 383, 384, 510, 511, 512, 513, 600, 640, 698)


@dataclass(frozen=True)
class Case:
    """A configuration and the seed of its weights and tokens."""

    cfg: Ds4Config
    seed: int
    about: str


@dataclass(frozen=True)
class Mode:
    """A way of decoding: tokens per batch and per ubatch, flash attention, and the caches' type."""

    n_batch: int = 1024
    n_ubatch: int = 1024
    flash: bool = False
    f32: bool = True


_ALL = Ds4Config(compress_ratios=(0, 4, 128, 4, 0), n_hash_layers=2, n_expert=8, indexer_n_head=8)

# The engine divides by zero on a trunk without a ratio-4 layer: every case has one. Seeds are chosen such that no
# choice of blocks or experts is near a tie (ReLU makes exact ties of the indexer's scores): the last chosen leads the
# first left out by 1e-5 or more of the largest score, respectively by 1e-4 in routing.
CASES = {
    "window": Case(
        Ds4Config(compress_ratios=(0, 4), indexer_top_k=512), 1, "a raw and a ratio-4 layer, all blocks chosen"
    ),
    "kinds": Case(replace(_ALL, indexer_top_k=512), 65, "every kind of layer, all blocks chosen"),
    "top-k": Case(_ALL, 104, "every kind of layer, 16 of up to 175 blocks chosen"),
    "yarn": Case(
        replace(
            _ALL, compress_ratios=(0, 4, 128), n_hash_layers=1, yarn_factor=4.0, yarn_orig_ctx=512, swiglu_clamp=1.0
        ),
        100,
        "YaRN factor 4, SwiGLU clamped at 1, 16 blocks chosen",
    ),
}

MODES = {
    "whole prompt": Mode(),
    "chunks of 64, ubatch 32": Mode(64, 32),
    "one by one": Mode(1, 1),
    "flash attention": Mode(flash=True),
    "F16 caches": Mode(f32=False),
}


# -- weights ----------------------------------------------------------------------------------------------------------


def _random(name: str, shape: tuple[int, ...], cfg: Ds4Config, seed: int) -> Array:
    # RandomState's streams are frozen for ever (NEP 19); each tensor has its own, so that order does not matter.
    rng = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))
    kind = name.split(".")[-2]
    if kind == "ffn_gate_tid2eid":
        return rng.rand(shape[0], cfg.n_expert).argsort(-1)[:, : shape[1]].astype(np.int32)
    x = rng.standard_normal(shape)
    if kind.endswith("norm"):
        x = 1 + 0.3 * x
    elif kind.endswith("_scale"):
        x = 1 + 0.2 * x
    elif kind == "exp_probs_b":
        x = 0.3 * x
    elif kind.endswith("_fn"):
        x = x / np.sqrt(shape[-1])
    elif kind == "output":
        x = 2 * x / np.sqrt(shape[-1])
    elif len(shape) > 1 and not kind.endswith(("_ape", "token_embd")):
        x = x / np.sqrt(shape[-1])
    return x.astype(np.float32)


def random_tensors(cfg: Ds4Config, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Tensors of a trunk file and of its MTP file; the same for the same arguments on every machine."""
    trunk = {name: _random(name, shape, cfg, seed) for name, shape in trunk_shapes(cfg).items()}
    shared = ("token_embd.weight", "output.weight", "output_norm.weight")
    mtp = {
        name: trunk[name] if name in shared else _random("mtp/" + name, shape, cfg, seed)
        for name, shape in mtp_shapes(cfg).items()
    }
    return trunk, mtp


def random_tokens(cfg: Ds4Config, n: int, seed: int) -> Array:
    """n token ids."""
    return np.random.RandomState(seed).randint(0, cfg.n_vocab, n).astype(np.int32)


# -- comparison -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What one of the two sides computed, float32: trunk rows 0..n-1, MTP rows 1..n-1 (fed by the reference's hidden
    rows), and the two rows after each anchor that the MTP block computed from its own hidden rows."""

    logits: Array
    hidden: Array
    mtp_logits: Array
    mtp_hidden: Array
    step_logits: Array


def reference_rows(cfg: Ds4Config, trunk: dict[str, Array], mtp: dict[str, Array], tokens: Array) -> Rows:
    """The reference's side, in float32. Needs PyTorch."""
    import torch

    from tests.reference.export import load_tensors
    from tests.reference.model import Ds4

    model = Ds4(cfg).eval()
    load_tensors(model, trunk, mtp)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits, hidden = model(ids)
        mtp_logits, mtp_hidden = model.mtp(hidden[:, :-1], ids[:, 1:])
        steps = []
        for p in ANCHORS:
            fed, out = hidden[:, :p], mtp_hidden[:, :p]
            for n in (p + 2, p + 3):
                fed = torch.cat((fed, out[:, -1:]), 1)
                step, out = model.mtp(fed, ids[:, 1:n])
                steps.append(step[0, -1])
    return Rows(
        logits=logits[0].numpy(),
        hidden=hidden[0].numpy(),
        mtp_logits=mtp_logits[0].numpy(),
        mtp_hidden=mtp_hidden[0].numpy(),
        step_logits=torch.stack(steps).numpy(),
    )


def engine_rows(
    cfg: Ds4Config,
    trunk: Path,
    mtp: Path,
    tokens: Array,
    mode: Mode,
    hidden: Array | None = None,
    anchors: tuple[int, ...] = ANCHORS,
) -> Rows:
    """The engine's side. ``hidden`` are the rows that the MTP block is fed; the engine's own by default."""
    kind: dict[str, Any] = dict(flash=mode.flash, f32=mode.f32, n_batch=mode.n_batch, n_ubatch=mode.n_ubatch)
    with RowEngine(trunk, **kind) as engine:
        logits, own = engine.decode(tokens)
    fed = own if hidden is None else hidden
    with RowEngine(mtp, mtp=True, **kind) as engine:
        mtp_logits, mtp_hidden = engine.decode(tokens[1:], 1, fed[:-1])
    steps = []
    with RowEngine(mtp, mtp=True, **kind) as engine:
        at = 1
        for p in anchors:
            out = engine.decode(tokens[at : p + 1], at, fed[at - 1 : p])[1]
            for pos in (p + 1, p + 2):
                step, out = engine.decode(tokens[pos : pos + 1], pos, out[-1:])
                steps.append(step[0])
            engine.remove(p + 1)
            at = p + 1
    return Rows(logits, own, mtp_logits, mtp_hidden, np.array(steps))


def row_errors(got: Array, want: Array) -> Array:
    """Per row: the largest absolute difference, divided by the largest magnitude in all of ``want``."""
    return np.asarray(np.abs(got - want).max(-1) / np.abs(want).max())


@contextmanager
def written(cfg: Ds4Config, seed: int) -> Iterator[tuple[Path, Path, dict[str, Array], dict[str, Array]]]:
    """(trunk file, MTP file, trunk tensors, MTP tensors) of random weights; the files go when the context ends."""
    trunk, mtp = random_tensors(cfg, seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "trunk.gguf", Path(folder) / "mtp.gguf"
        write_gguf(paths[0], cfg, trunk, part="trunk")
        write_gguf(paths[1], cfg, mtp, part="mtp")
        yield paths[0], paths[1], trunk, mtp


def compare(case: Case, modes: dict[str, Mode]) -> Iterator[tuple[str, dict[str, Array]]]:
    """For each mode its name and the row errors of each of :class:`Rows`' fields."""
    tokens = random_tokens(case.cfg, N_TOKENS, case.seed)
    with written(case.cfg, case.seed) as (trunk_path, mtp_path, trunk, mtp):
        want = reference_rows(case.cfg, trunk, mtp, tokens)
        for name, mode in modes.items():
            got = engine_rows(case.cfg, trunk_path, mtp_path, tokens, mode, want.hidden)
            yield name, {f: row_errors(getattr(got, f), getattr(want, f)) for f in Rows.__dataclass_fields__}


# -- golden logits ----------------------------------------------------------------------------------------------------


def digest(tensors: dict[str, Array]) -> int:
    """A checksum over names and values."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def write_golden(path: Path = GOLDEN) -> None:
    """Store the reference's rows of the "yarn" case at :data:`GOLDEN_ROWS`, and checksums of what they came from."""
    case = CASES["yarn"]
    tokens = random_tokens(case.cfg, N_TOKENS, case.seed)
    trunk, mtp = random_tensors(case.cfg, case.seed)
    want = reference_rows(case.cfg, trunk, mtp, tokens)
    rows = np.array(GOLDEN_ROWS)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        path,
        rows=rows,
        digests=np.array([digest(trunk), digest(mtp), digest({"tokens": tokens})]),
        logits=want.logits[rows],
        hidden=want.hidden[rows],
        mtp_logits=want.mtp_logits[rows],
        step_logits=want.step_logits,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the reference with the engine, or write the golden file.")
    parser.add_argument("--write-golden", action="store_true", help=f"write {GOLDEN.name} and stop")
    parser.add_argument("--case", choices=CASES, action="append", help="only these cases")
    args = parser.parse_args()
    if args.write_golden:
        write_golden()
        return
    fields = ("logits", "hidden", "mtp_logits", "mtp_hidden", "step_logits")
    print("Largest error of any row / rows above 1e-3, relative to the largest magnitude of the reference:")
    print(f"{'case':8}{'decoding':25}" + "".join(f"{field:>16}" for field in fields))
    for name in args.case or CASES:
        for mode, errors in compare(CASES[name], MODES):
            cells = (f"{errors[f].max():.1e} / {(errors[f] > 1e-3).sum()}" for f in fields)
            print(f"{name:8}{mode:25}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    print("Flash attention and F16 caches round keys to float16, which may flip a near-tie in the choice of blocks or")
    print("experts: single rows then differ by what the other choice computes.")


if __name__ == "__main__":
    main()
