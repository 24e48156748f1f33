"""ds4-mtp convert: the head's file is what it would have been, or there is none."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, cli
from ds4_mtp_plugin import gguf as files
from ds4_mtp_plugin.cli import checkpoint
from ds4_mtp_plugin.gguf import ds4
from ds4_mtp_plugin.gguf.families import CHECKPOINTS_WITHOUT
from tests.fixtures.ds4_file import take_apart
from tests.fixtures.ds4_gguf import split
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import SMALL, TINY, Planted
from tests.text import generate

Plant = Callable[..., Planted]


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in fields.items() if not key.startswith("GGUF.")}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_K"])
def test_of_ds4s_file_comes_the_engines(
    plant: Plant, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    monkeypatch.setattr(ds4, "_CHUNK", 5000)  # so that a tensor takes several
    model = plant(config=SMALL if quant == "Q4_K" else TINY, quant=quant)
    ds4_file = take_apart(model.mtp, here / "ds4.gguf")
    assert len(gguf.GGUFReader(ds4_file).tensors) == 32
    assert cli.main(["convert", str(ds4_file), "-m", str(model.trunk)]) == 0
    out = here / "ds4-converted.gguf"
    assert capsys.readouterr().out.startswith(f"ds4-converted.gguf: an MTP head for {model.trunk}, ")
    assert tensors(out) == tensors(model.mtp)
    # A name for people is the model's.
    assert {**metadata(out), "general.name": None} == {**metadata(model.mtp), "general.name": None}
    assert out.stat().st_size == ds4.plan(ds4_file, model.trunk).n_bytes
    files.check_pair(model.trunk, out)
    assert listing(here) == ["ds4-converted.gguf", "ds4.gguf"]


def test_it_drafts_as_the_head_that_was_taken_apart(plant: Plant, llama: Callable[..., Llama], here: Path) -> None:
    model = plant(acceptance=(0.8, 0.5), quant="Q8_0")
    take_apart(model.mtp, here / "ds4.gguf")
    assert cli.main(["convert", "ds4.gguf", "-m", str(model.trunk), "-o", "head.gguf"]) == 0
    results = []
    for head in (model.mtp, here / "head.gguf"):
        llm = llama(model.trunk, draft_model=MtpDraft(head, num_pred_tokens=2, ngram=False))
        text, stats = generate(llm, [10, 20, 30], 100), llm.draft_model.stats
        results.append((text, stats.iters, stats.proposed, stats.accepted, stats.rate_per_position))
    assert results[0] == results[1] and results[0][3] > 30


def test_a_model_in_parts(plant: Plant, here: Path) -> None:
    model = plant(quant="Q8_0")
    ds4_file = take_apart(model.mtp, here / "ds4.gguf")
    parts = split(Path(shutil.copy(model.trunk, here / "trunk.gguf")), 3)
    assert cli.main(["convert", str(ds4_file), "-m", str(parts[0]), "-o", "head.gguf"]) == 0
    assert tensors(here / "head.gguf") == tensors(model.mtp)
    assert not any(key.startswith("split.") for key in metadata(here / "head.gguf"))
    files.check_pair(parts[0], here / "head.gguf")


def test_arrays_of_the_models_blocks_get_the_heads(plant: Plant, here: Path) -> None:
    """Checkpoints list the head's block too, and convert_hf_to_gguf.py keeps it."""
    model = plant()
    ds4_file = take_apart(model.mtp, here / "ds4.gguf")
    n_layer = files.read_model(model.trunk).n_layer
    assert n_layer is not None
    clamps = [10.0 + i for i in range(n_layer + 1)]
    longer = {"attention.compress_ratios": [0, 4, 128, 4, 4, 4], "swiglu_clamp_exp": clamps, "nextn_predict_layers": 1}
    trunk = with_keys(model.trunk, here / "trunk.gguf", longer)
    assert cli.main(["convert", str(ds4_file), "-m", str(trunk), "-o", "head.gguf"]) == 0
    found = metadata(here / "head.gguf")
    assert found["deepseek4.attention.compress_ratios"][1] == [0, 4, 128, 4, 0][:n_layer] + [0]
    assert found["deepseek4.swiglu_clamp_exp"][1] == clamps
    assert found["deepseek4.swiglu_clamp_shexp"][1] == [10.0] * (n_layer + 1)
    assert (found["deepseek4.block_count"][1], found["deepseek4.nextn_predict_layers"][1]) == (n_layer + 1, 1)


def test_a_model_without_the_gating_key_gets_it_for_the_head(plant: Plant, here: Path) -> None:
    model = plant()
    ds4_file = take_apart(model.mtp, here / "ds4.gguf")
    trunk = with_keys(model.trunk, here / "trunk.gguf", {"expert_gating_func": None})
    assert cli.main(["convert", str(ds4_file), "-m", str(trunk), "-o", "head.gguf"]) == 0
    assert metadata(here / "head.gguf") == metadata(here / "head.gguf") | {
        key: value for key, value in metadata(model.mtp).items() if key == "deepseek4.expert_gating_func"
    }
    files.check_pair(trunk, here / "head.gguf", {"deepseek4.expert_gating_func": 4})


def with_keys(path: Path, out: Path, keys: dict[str, Any]) -> Path:
    """The model with other values, or without the keys whose value is None."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "deepseek4")
    for key, field in reader.fields.items():
        name = key.removeprefix("deepseek4.")
        if key.startswith("GGUF.") or key == "general.architecture" or keys.get(name, 0) is None:
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, keys.get(name, field.contents()), field.types[0], sub_type=sub)
    if "nextn_predict_layers" in keys:
        writer.add_uint32("deepseek4.nextn_predict_layers", keys["nextn_predict_layers"])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    plant: Plant, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = plant(quant="Q8_0"), plant(config=SMALL, quant="Q8_0")
    whole = take_apart(model.mtp, here / "ds4.gguf")
    cut = here / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-1000])
    page = here / "page.gguf"
    page.write_text("<html>")
    lacking = take_apart(model.mtp, here / "lacking.gguf", {"mtp.0.attn_sinks.weight": None})
    more = take_apart(model.mtp, here / "more.gguf", {"mtp.1.e_proj.weight": np.zeros((1, 32), np.float32)})
    mixed = take_apart(model.mtp, here / "mixed.gguf", {"mtp.0.e_proj.weight": np.zeros((128, 128), np.float16)})
    halves = take_apart(model.mtp, here / "halves.gguf", {"mtp.0.norm.weight": np.zeros(128, np.float16)})
    qwen = plant_family(here, "qwen35").trunk
    before = listing(here)
    for source, base, why in (
        (cut, model.trunk, f"{cut} is cut off: it has"),
        (page, model.trunk, f"{page} is a web page"),
        (here / "none.gguf", model.trunk, f"{here / 'none.gguf'}: no such file"),
        (model.mtp, model.trunk, f"{model.mtp} is an MTP head as the engine reads it: there is nothing to convert"),
        (model.trunk, model.trunk, f"{model.trunk} is a model; expected an MTP head in the layout of antirez/ds4"),
        (lacking, model.trunk, f"{lacking} lacks mtp.0.attn_sinks.weight; expected"),
        (more, model.trunk, f"{more} has mtp.1.e_proj.weight; expected"),
        (mixed, model.trunk, "are of types F16 and Q8_0; expected one type"),
        (halves, model.trunk, "is of type F16; expected F32"),
        (whole, other.trunk, f"{whole} does not belong to {other.trunk}: mtp.0.e_proj.weight is [128, 128], expected"),
        (whole, model.mtp, f"{model.mtp} is an MTP head; expected the model"),
        (whole, qwen, f"{qwen} is a model with an MTP block of architecture 'qwen35'"),
    ):
        assert cli.main(["convert", str(source), "-m", str(base), "-o", "head.gguf"]) == 1, why
        err = capsys.readouterr().err
        assert err.startswith("ds4-mtp convert: ") and why in err and len(err.splitlines()) == 1, (why, err)
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", str(whole)])
    assert caught.value.code == 2 and "give -m BASE" in capsys.readouterr().err
    assert listing(here) == before


def test_an_existing_file_is_kept(plant: Plant, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = plant()
    ds4_file = take_apart(model.mtp, here / "ds4.gguf")
    argv = ["convert", str(ds4_file), "-m", str(model.trunk), "-o"]
    out = here / "head.gguf"
    out.write_text("mine")
    assert cli.main([*argv, str(out)]) == 1
    assert "head.gguf exists: --force overwrites it" in capsys.readouterr().err and out.read_text() == "mine"
    assert cli.main([*argv, str(out), "--force"]) == 0
    files.check_pair(model.trunk, out)
    assert cli.main([*argv, str(ds4_file), "--force"]) == 1
    assert "it is what this reads" in capsys.readouterr().err and len(gguf.GGUFReader(ds4_file).tensors) == 32
    assert cli.main([*argv, str(here / "no" / "head.gguf")]) == 1
    assert f"{here / 'no'}: no such folder" in capsys.readouterr().err
    assert listing(here) == ["ds4.gguf", "head.gguf"]


def test_too_small_a_disk_is_said_first(
    plant: Plant, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plant()
    ds4_file = take_apart(model.mtp, here / "ds4.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    assert cli.main(["convert", str(ds4_file), "-m", str(model.trunk), "-o", "head.gguf"]) == 1
    assert "has 1.0 MB left: make room" in capsys.readouterr().err
    assert listing(here) == ["ds4.gguf"]


# A process in a shell's background is born deaf to Ctrl-C.
STOPS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from ds4_mtp_plugin import cli
from ds4_mtp_plugin.gguf import ds4
chunks = ds4._chunks
def stop(*args):
    for i, chunk in enumerate(chunks(*args)):
        yield chunk
    {stop}
ds4._chunks = stop
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("stop", "status", "said"),
    [
        (f"os.kill(os.getpid(), {int(signal.SIGINT)})", 130, ""),
        (f"os.kill(os.getpid(), {int(signal.SIGTERM)})", 143, ""),
        ("raise OSError(28, 'No space left on device')", 1, "No space left on device"),
        ("os.truncate(sys.argv[2], 5000)", 1, "ds4.gguf became shorter while it was read"),
    ],
)
def test_half_a_file_is_not_left(plant: Plant, here: Path, stop: str, status: int, said: str) -> None:
    model = plant()
    take_apart(model.mtp, here / "ds4.gguf")
    argv = ["convert", "ds4.gguf", "-m", str(model.trunk), "-o", "head.gguf"]
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", STOPS.format(stop=stop), *argv], capture_output=True, text=True, env=env
    )
    assert done.returncode == status and said in done.stderr, done.stderr
    assert listing(here) == ["ds4.gguf"]


def checkpoint_folder(path: Path, architecture: str, names: Sequence[str], **config: Any) -> Path:
    """A folder with a config.json and a safetensors file of these tensors, of no values."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], "num_hidden_layers": 2, **config}))
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    data = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    return path


TRUNK = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("architecture", CHECKPOINTS_WITHOUT)
def test_checkpoints_whose_head_cannot_be_used_are_refused_by_name(
    here: Path, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    folder = checkpoint_folder(here / "folder", architecture, [*TRUNK, "mtp.fc.weight"])
    assert cli.main(["convert", str(folder)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"ds4-mtp convert: {folder} is a checkpoint of {architecture}: ")
    assert CHECKPOINTS_WITHOUT[architecture] in err and "NgramDraft()" in err
    assert listing(here) == ["folder"]


def test_the_names_are_those_that_the_converter_knows() -> None:
    source = (checkpoint.script().parent / "conversion" / "__init__.py").read_text(encoding="utf-8")
    (table,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TEXT_MODEL_MAP"
    )
    assert table is not None
    assert set(CHECKPOINTS_WITHOUT) <= set(ast.literal_eval(table))


@pytest.mark.parametrize(
    "name",
    [
        *("mtp.fc.weight", "model.mtp.norm.weight", "model.layers.2.eh_proj.weight"),
        *("model.language_model.layers.2.eh_proj.weight", "mtp.0.e_proj.weight"),
    ],
)
def test_a_head_is_known_by_its_tensors(here: Path, name: str) -> None:
    checkpoint.check(checkpoint_folder(here / "with", "Glm4MoeForCausalLM", [*TRUNK, name]))
    nested = {"num_hidden_layers": None, "text_config": {"num_hidden_layers": 2}}
    checkpoint.check(checkpoint_folder(here / "nested", "Qwen3_5ForConditionalGeneration", [*TRUNK, name], **nested))


def test_folders_that_are_no_checkpoint_with_a_head_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = checkpoint_folder(here / "without", "Qwen3_5ForCausalLM", TRUNK)
    empty = here / "empty"
    empty.mkdir()
    listed = checkpoint_folder(here / "listed", "Qwen3_5ForCausalLM", TRUNK)
    (listed / "config.json").write_text("[]")
    broken = checkpoint_folder(here / "broken", "Qwen3_5ForCausalLM", TRUNK)
    (broken / "config.json").write_text("{")
    pointer = checkpoint_folder(here / "pointer", "Qwen3_5ForCausalLM", TRUNK)
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    cut = checkpoint_folder(here / "cut", "Qwen3_5ForCausalLM", ["mtp.fc.weight"])
    data = (cut / "model.safetensors").read_bytes().replace(b"[0, 0]", b"[0, 4]")
    (cut / "model.safetensors").write_bytes(data)
    for folder, why in (
        (without, f"{without} has no tensors of an MTP head (mtp.*, or of a layer behind the 2 of the model)"),
        (empty, f"{empty} has no config.json"),
        (listed, f"{listed / 'config.json'} is list; expected an object"),
        (broken, f"{broken / 'config.json'} is no JSON"),
        (pointer, f"{pointer / 'model.safetensors'} is no safetensors file"),
        (cut, f"{cut / 'model.safetensors'} is cut off: it has {len(data)} bytes and needs {len(data) + 4}"),
    ):
        assert cli.main(["convert", str(folder), "-o", "out.gguf"]) == 1, why
        err = capsys.readouterr().err
        assert why in err and len(err.splitlines()) == 1, err
    checkpoint.check(without, head=False)
    assert not (here / "out.gguf").exists()


def test_packages_that_are_missing_are_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_folder(here / "folder", "Qwen3_5ForCausalLM", ["mtp.fc.weight"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else name)
    assert cli.main(["convert", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "convert_hf_to_gguf.py needs transformers: pip install torch transformers" in err
    assert listing(here) == ["folder"]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["folder", "-m", "base.gguf"], "-m is for antirez/ds4's MTP file"),
        (["ds4.gguf", "--mtp", "-m", "base.gguf"], "--mtp is for the folder of a checkpoint"),
        (["folder", "--dspark"], "--dspark and --target-model-dir go together"),
        (["folder", "--target-model-dir", "other"], "--dspark and --target-model-dir go together"),
        (["folder", "--mtp", "--no-mtp"], "not allowed with"),
    ],
)
def test_options_that_do_not_go_together(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], why: str
) -> None:
    (here / "folder").mkdir()
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", *argv])
    assert caught.value.code == 2 and why in capsys.readouterr().err
