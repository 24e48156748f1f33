"""A head in a file of its own takes embedding and output of its target where they are the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp import Llama

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import MtpDraft, engine
from ds4_mtp_plugin.gguf import read_header, same_tensors
from tests.fixtures import GPU_LAYERS
from tests.fixtures.ds4_gguf import split
from tests.fixtures.mtp_gguf import FAMILIES
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import Planted
from tests.text import generate

Rows = npt.NDArray[np.float32]
# llama.h, LLAMA_LOAD_MODE_NONE
_NONE = 0
NAMES = ("token_embd.weight", "output.weight")


def files(directory: Path, plant: Callable[..., Planted], architecture: str) -> tuple[Path, Path]:
    if architecture == "deepseek4":
        return plant().trunk, plant().mtp
    family = plant_family(directory, architecture, beside=True)
    assert family.head is not None
    return family.trunk, family.head


def run(head: engine.Model) -> tuple[Rows, Rows, int]:
    """Logits and the hidden row of a head's decode, and what its weights take."""
    context = head.new_context(mtp=True, n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1)
    context.set_hidden(engine.HIDDEN_OUTPUTS)
    batch = engine.Batch(4, n_embd_out=context.n_embd_out)
    batch.embd[:] = np.random.default_rng(0).normal(size=batch.embd.shape)
    context.decode(batch.set([300, 301, 302, 303], 1, 0))
    found = np.array(context.logits(3)), np.array(context.hidden_rows(3, 1)), context.memory.weights
    context.close()
    return found


@pytest.mark.parametrize("architecture", ["deepseek4", *FAMILIES])
def test_it_drafts_the_same_from_fewer_bytes(
    tmp_path: Path, plant: Callable[..., Planted], llama: Callable[..., Llama], architecture: str
) -> None:
    base, path = files(tmp_path, plant, architecture)
    shared = same_tensors(read_header(path), read_header(base), NAMES)
    assert "token_embd.weight" in shared
    library, target = engine.Library(host.library_path()), llama(base)
    theirs = engine.Model.borrowed(library, target._model.model, str(base))
    # Not mapped: what lies between two tensors of a mapped file counts, though nobody touches it.
    options = {"load_mtp": True, "n_gpu_layers": GPU_LAYERS, "load_mode": _NONE}
    alone = engine.Model(library, str(path), **options)
    beside = engine.Model(library, str(path), target=theirs, shared=shared, **options)
    of_alone, of_beside = run(alone), run(beside)
    np.testing.assert_array_equal(of_alone[0], of_beside[0])
    np.testing.assert_array_equal(of_alone[1], of_beside[1])
    n_bytes = sum(read_header(path).places[name].n_bytes for name in shared)
    assert of_alone[2] - of_beside[2] == pytest.approx(n_bytes, rel=0.02)
    for model in (alone, beside):
        model.close()


def changed(path: Path, name: str, to: Path) -> Path:
    """A copy of a file with the last byte of one tensor changed."""
    shutil.copy(path, to)
    place = read_header(to).places[name]
    with open(to, "r+b") as file:
        file.seek(place.offset + place.n_bytes - 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return to


def test_bytes_decide(tmp_path: Path, plant: Callable[..., Planted]) -> None:
    """Names, types and shapes that agree are not enough, and parts of a split file are read where they are."""
    base, head = plant(quant="Q8_0").trunk, plant(quant="Q8_0").mtp
    of_base, of_head = read_header(base), read_header(head)
    assert same_tensors(of_head, of_base, (*NAMES, "blk.0.attn_q_a.weight", "no such")) == list(NAMES)
    for name, other in (NAMES, NAMES[::-1]):
        one = read_header(changed(head, name, tmp_path / "changed.gguf"))
        assert same_tensors(one, of_base, NAMES) == [other]
    shutil.copy(base, tmp_path / "base.gguf")
    parts = split(tmp_path / "base.gguf", 3)
    assert same_tensors(of_head, read_header(parts[0]), NAMES) == list(NAMES)
    assert same_tensors(of_head, read_header(plant(quant="F16").trunk), NAMES) == []


def test_another_output_is_the_heads_own(
    tmp_path: Path, plant: Callable[..., Planted], llama: Callable[..., Llama]
) -> None:
    """A head whose output gives other drafts than its target's is not given the target's."""
    planted = plant(acceptance=1.0)
    head = tmp_path / "head.gguf"
    shutil.copy(planted.mtp, head)
    for tensor in gguf.GGUFReader(head, "r+").tensors:
        if tensor.name == "output.weight":
            tensor.data[:] = np.roll(tensor.data, 1, axis=0)  # the id above the right one
    rates: list[Any] = []
    for path in (planted.mtp, head):
        draft = MtpDraft(path, num_pred_tokens=2, adaptive=False)
        generate(llama(planted.trunk, draft_model=draft), [300, 301], 60)
        rates.append(draft.stats.rate_per_position[0])
    assert rates[0] > 0.95 and rates[1] < 0.05


def test_a_draft_ends_where_a_text_does(plant: Callable[..., Planted], llama: Callable[..., Llama]) -> None:
    """A head that has no texts of its tokens knows by the target's which of them ends a text."""
    planted = plant(acceptance=1.0, eos_after=20)
    target = llama(planted.trunk)
    library = engine.Library(host.library_path())
    theirs = engine.Model.borrowed(library, target._model.model, str(planted.trunk))
    head = engine.Model(library, str(planted.mtp), load_mtp=True, target=theirs)
    context = head.new_context(mtp=True, n_ctx=256)
    assert context.is_eog(target.token_eos()) and not context.is_eog(300)
    assert context.n_vocab == target.n_vocab()
    context.close()
    head.close()
