"""Checkpoints as `transformers` writes them, converted by llama.cpp's own script: trunk and head compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, cli
from ds4_mtp_plugin import gguf as files
from ds4_mtp_plugin.cli import checkpoint
from tests.fixtures import GPU_LAYERS
from tests.fixtures.row_engine import F32, RowEngine
from tests.text import generate

transformers = pytest.importorskip("transformers", reason="pip install '.[convert]'")
pytest.importorskip("torch", reason="pip install '.[convert]'")

from tests.reference import checkpoint_v4, checkpoints  # noqa: E402

V4 = "deepseek4"
KINDS = [kind for kind, family in checkpoints.KINDS.items() if hasattr(transformers, family.model)]
KINDS += [V4] if hasattr(transformers, "DeepseekV4ForCausalLM") else []

# Both sides compute in float32, in another order of sums: 2e-6 and less of the largest value, 4e-5 where a norm divides
# by little (MLA) or running states add up (hybrids). A row, a head or an expert that is another makes 1e-2 and more.
CLOSE = 5e-4


@dataclass(frozen=True)
class Made:
    """A checkpoint and its GGUF: the model, and the head's own file where it is not in the model's."""

    kind: str
    checkpoint: checkpoints.Checkpoint
    path: Path
    head: Path | None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("checkpoints")
    all_of, jobs = {}, []
    for kind in KINDS:
        one = checkpoint_v4.write(folder / kind) if kind == V4 else checkpoints.write(kind, folder / kind)
        head = folder / f"{kind}-mtp.gguf" if kind == V4 else None
        all_of[kind] = Made(kind, one, folder / f"{kind}.gguf", head)
        job = [str(one.folder), str(all_of[kind].path), "deepseek-v3" if head else checkpoints.KINDS[kind].pre]
        jobs += [job, [job[0], str(head), job[2], "--mtp"]] if head else [job]
    driver = Path(checkpoints.__file__).with_name("convert_all.py")
    command = [sys.executable, str(driver), str(checkpoint.script()), json.dumps(jobs)]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return all_of


@pytest.fixture(params=KINDS)
def each(request: pytest.FixtureRequest, made: dict[str, Made]) -> Made:
    return made[request.param]


def error(got: F32, want: F32) -> float:
    """The largest difference in any row, of the largest value."""
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.skipif(GPU_LAYERS != 0, reason="GPUs round to less than float32")
def test_the_engine_computes_what_transformers_does(each: Made, tmp_path: Path) -> None:
    of, trunk_path, head_path = each.checkpoint, each.path, each.head or each.path
    if each.kind == V4:
        trunk_path = checkpoint_v4.in_float32(trunk_path, tmp_path / "trunk.gguf")
        head_path = checkpoint_v4.in_float32(head_path, tmp_path / "head.gguf")
    with RowEngine(trunk_path, f32=True) as trunk:
        logits, hidden = trunk.decode(of.tokens)
    with RowEngine(head_path, mtp=True, f32=True) as head:
        drafts, _ = head.decode(of.tokens[1:], 1, of.hidden[:-1])
    assert error(logits, of.logits) < CLOSE
    assert error(hidden, of.hidden) < CLOSE  # what the head is fed
    assert error(drafts, of.drafts) < CLOSE


def test_it_drafts_and_the_text_is_plain(each: Made, llama: Callable[..., Llama]) -> None:
    assert files.read_model(each.path).architecture == each.kind
    draft = MtpDraft(each.head, num_pred_tokens=2, ngram=False)
    prompt = each.checkpoint.tokens.tolist()
    texts = [generate(llama(each.path, draft_model=use), prompt, 60) for use in (None, draft)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 5
    assert draft.stats.proposed > 0 and draft.stats.failures == 0


# In place of the hash by which the converter knows a tokenizer: its process is told.
KNOWN = """
import os, sys
if sys.orig_argv[1:2] and sys.orig_argv[1].endswith("convert_hf_to_gguf.py"):
    sys.path.insert(0, os.path.dirname(sys.orig_argv[1]))
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda *_: "qwen35"
"""


def test_the_verb_converts_a_folder(
    made: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    known, here = tmp_path / "known", tmp_path / "here"
    known.mkdir(), here.mkdir()
    (known / "sitecustomize.py").write_text(KNOWN)
    monkeypatch.setenv("PYTHONPATH", str(known))
    monkeypatch.chdir(here)
    folder = made["qwen35"].checkpoint.folder
    assert cli.main(["convert", str(folder), "--outtype", "f32"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("qwen35.gguf: a model with an MTP block of architecture qwen35") and "MtpDraft()" in out
    assert "Model successfully exported" in err  # the converter's own words come through
    files.check_inside(here / "qwen35.gguf")
    assert (here / "qwen35.gguf").read_bytes()[-1000:] == made["qwen35"].path.read_bytes()[-1000:]
    assert cli.main(["convert", str(folder), "--mtp"]) == 0
    files.check_pair(here / "qwen35.gguf", here / "qwen35-MTP.gguf")
    assert cli.main(["convert", str(folder)]) == 1
    assert "qwen35.gguf exists" in capfd.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["qwen35-MTP.gguf", "qwen35.gguf"]


def test_a_conversion_that_fails_says_so_and_leaves_nothing(
    made: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here the tokenizer is one that the converter does not know."""
    monkeypatch.chdir(tmp_path)
    folder = made["qwen35"].checkpoint.folder
    assert cli.main(["convert", str(folder)]) == 1
    *theirs, ours = capfd.readouterr().err.splitlines()
    assert "BPE pre-tokenizer was not recognized" in theirs[-1]
    assert ours.startswith(f"ds4-mtp convert: {folder} was not converted: convert_hf_to_gguf.py ended with status 1")
    assert not list(tmp_path.iterdir())
