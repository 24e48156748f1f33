"""Files and options that do not fit: the plain text or one clear error, and never the end of the process.

Each runs in a process of its own: what is guarded against ends it.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4_mtp_plugin import MtpDraft
from tests.fixtures import GPU_LAYERS, ds4_gguf
from tests.fixtures.planted import BY_CONTEXT, TINY, Planted
from tests.fuzz import mutants

Plant = Callable[..., Planted]

RUN = """
import json, sys
case = json.loads(sys.argv[1])
from ds4_mtp_plugin import MtpDraft
import llama_cpp._internals as internals
from llama_cpp import Llama

load = internals.LlamaModel.__init__
def loading(*args, **kwargs):
    print("the model is loaded", flush=True)
    load(*args, **kwargs)
internals.LlamaModel.__init__ = loading

def text(draft):
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **case["options"]}
    llm = Llama(case["base"], draft_model=draft, **options)
    tokens, error = [], None
    try:
        for token in llm.generate(case["prompt"], temp=0.0):
            tokens.append(token)
            if len(tokens) == case["n"]:
                break
    except Exception as err:
        error = repr(err)
    llm.close()
    return tokens, error

if case["head"]:
    draft = MtpDraft(case["head"], num_pred_tokens=case["num_pred_tokens"])
    result = text(draft)
    print(json.dumps([*result, draft.stats.depth, draft.stats.accepted]))
else:
    print(json.dumps(text(None)))
"""


def run(
    base: Path, head: Path | None, prompt: list[int], *, n: int = 60, num_pred_tokens: int = 2, **options: Any
) -> subprocess.CompletedProcess[str]:
    case = {"base": str(base), "head": head and str(head), "prompt": prompt, "n": n, "options": options}
    argv = [sys.executable, "-c", RUN, json.dumps({**case, "num_pred_tokens": num_pred_tokens})]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300)


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"n_batch": 1}, 0),
        ({"n_ubatch": 1}, 0),
        ({"n_batch": 1, "n_ubatch": 1, "n_ctx": 64}, 0),
        ({"n_ctx": 64}, 2),
        ({"n_ctx": 64, "num_pred_tokens": 16}, 16),
        ({"num_pred_tokens": 16}, 16),
        ({"num_pred_tokens": 1000}, 16),
        ({"num_pred_tokens": 1000, "n_batch": 5, "n_ubatch": 4}, 3),
    ],
    ids=str,
)
def test_odd_sizes_give_the_plain_text(plant: Plant, options: dict[str, int], depth: int) -> None:
    files = plant(**BY_CONTEXT)
    prompt = np.random.default_rng(1).integers(260, 500, 20).tolist()
    plain_options = {key: value for key, value in options.items() if key != "num_pred_tokens"}
    n = 300 if "n_ctx" in options else 100  # past the end of the context, which the engine rounds up to 256
    plain = last_line(run(files.trunk, None, prompt, n=n, **plain_options))
    tokens, error, found_depth, accepted = last_line(run(files.trunk, files.mtp, prompt, n=n, **options))
    assert [tokens, error] == plain
    assert (error is None) == ("n_ctx" not in options)
    assert (found_depth, accepted > 0) == (depth, depth > 0)


class Unchecked(ds4_gguf.Ds4Config):
    def __post_init__(self) -> None:
        pass


def model(folder: Path, **change: Any) -> tuple[Path, Path]:
    """Trunk and head of a shape that the engine aborts on."""
    config = Unchecked(**{**dataclasses.asdict(TINY), **change})
    paths = folder / "trunk.gguf", folder / "head.gguf"
    for path, part, shapes in (
        (paths[0], "trunk", ds4_gguf.trunk_shapes(config)),
        (paths[1], "mtp", ds4_gguf.mtp_shapes(config)),
    ):
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        ds4_gguf.write_gguf(path, config, tensors, part=part)  # type: ignore[arg-type]
    return paths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_ratios": (0, 128)}, "trunk.gguf: no layer has a compress ratio of 4"),
        ({"head_dim": 64, "indexer_head_dim": 64}, "head.gguf: attention.key_length and attention.indexer.key_length"),
        ({"hc_mult": 2}, "trunk.gguf has 2 hyper-connection streams"),
    ],
    ids=["ratio", "key_length", "streams"],
)
def test_shapes_that_end_the_process_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base, head = model(tmp_path, **change)
    refused(run(base, head, [300]), message)


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 1, done.stderr[-2000:]
    assert "ValueError: " in done.stderr.splitlines()[-1]
    assert message in done.stderr.splitlines()[-1]
    assert "loaded" not in done.stdout
    assert "ignored" not in done.stderr  # what Python says of a failing __del__


def test_files_that_do_not_fit_are_refused_before_the_model_is_loaded(plant: Plant, tmp_path: Path) -> None:
    files = plant()
    other = plant(config=dataclasses.replace(TINY, n_vocab=640))
    refused(run(files.trunk, other.mtp, [300]), "vocabulary 640, expected 512")
    refused(run(files.mtp, files.mtp, [300]), "is an MTP head; expected the model")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files.trunk.read_bytes()[:-1000])
    refused(run(cut, files.mtp, [300]), "cut.gguf is cut off")


def test_the_host_speaks_for_itself_of_a_model_that_is_not_there(plant: Plant) -> None:
    done = run(Path("none.gguf"), plant().mtp, [300])
    assert done.stderr.splitlines()[-1] == "ValueError: Model path does not exist: none.gguf"


def test_a_disabled_draft_asks_nothing_of_the_model(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS4_MTP_SPEC_DISABLE", "1")
    done = run(plant().trunk, plant(config=dataclasses.replace(TINY, n_vocab=640)).mtp, [300], n=5)
    assert len(last_line(done)[0]) == 5


def test_a_draft_is_not_made_of_a_file_that_is_no_head(plant: Plant, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no MTP .NextN. block"):
        MtpDraft(plant().trunk)
    page = tmp_path / "page.gguf"
    page.write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(ValueError, match="page.gguf is a web page"):
        MtpDraft(page)


MANY = """
import json, sys, warnings
from ds4_mtp_plugin import MtpDraft
from llama_cpp import Llama

base, head, prompt, cases = json.loads(sys.argv[1])

def run(options, draft):
    tokens, error = [], None
    try:
        llm = Llama(
            base, draft_model=draft, **{"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **options}
        )
        for token in llm.generate(prompt, temp=0.0):
            tokens.append(token)
            if len(tokens) == 40:
                break
        llm.close()
    except (ValueError, RuntimeError) as err:
        error = f"{type(err).__name__}: {err}"
    return [tokens, error]

for options in cases:
    draft = MtpDraft(head, num_pred_tokens=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        drafted = run(options, draft)
    told = [str(warning.message) for warning in caught]
    print(json.dumps([run(options, None), drafted, draft.stats.accepted, told]), flush=True)
"""


def run_many(files: Planted, cases: list[dict[str, Any]]) -> list[Any]:
    """For each case: [tokens, error] without a draft, the same with one, drafts accepted, warnings."""
    prompt = np.random.default_rng(1).integers(260, 500, 20).tolist()
    argv = [sys.executable, "-c", MANY, json.dumps([str(files.trunk), str(files.mtp), prompt, cases])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_options_of_the_host_change_the_plain_text_alone(plant: Plant) -> None:
    """Whatever they make of the text, it is the same with a draft."""
    cases: list[dict[str, Any]] = [
        {"n_ctx": 0},
        {"n_ctx": 2**32 + 512},
        {"n_batch": 4, "n_ubatch": 512},
        {"n_batch": 3, "n_ubatch": 3},
        {"n_batch": 10**6},
        {"n_ubatch": 10**6},
        {"n_ubatch": -1},
        {"n_threads": 0, "n_threads_batch": 0},
        {"n_threads": -1, "n_threads_batch": -1},
        {"n_threads": 3, "n_threads_batch": 5},
        {"logits_all": True},
        {"flash_attn": True},
        {"offload_kqv": False, "op_offload": False},
        {"swa_full": False},
        {"numa": True},
        {"split_mode": 0, "main_gpu": 0 if GPU_LAYERS else 3},
        {"split_mode": 2},
        {"split_mode": 99, "main_gpu": -1},
        {"tensor_split": [1.0]},
        {"n_gpu_layers": -1},
        {"use_mmap": False, "use_mlock": True},
        {"rope_scaling_type": 0},
        {"rope_scaling_type": 2, "yarn_ext_factor": 1.0, "yarn_orig_ctx": 128},
        {"rope_scaling_type": 77},
        {"rope_freq_base": 500.0},
        {"rope_freq_scale": 0.5},
        {"rope_freq_scale": -1.0},
        {"rope_freq_base": float("inf")},
        {"yarn_ext_factor": 1e30, "rope_scaling_type": 2},
        {"yarn_attn_factor": 0.5, "yarn_beta_fast": 1.0, "yarn_beta_slow": 5.0},
        {"attention_type": 0},
        {"type_k": 0, "type_v": 0},
        {"type_k": 8, "type_v": 8, "flash_attn": True},
        {"type_k": 2, "type_v": 2, "flash_attn": True},
        {"type_k": 30, "type_v": 30, "flash_attn": True},
        {"flash_attn": True, "swa_full": False, "offload_kqv": False},
        {"tensor_split": [0.0] * 16},
        {"n_gpu_layers": -5, "main_gpu": 99},
        {"last_n_tokens_size": -1},
        {"seed": -1},
        {"spm_infill": True},
        {"kv_overrides": {"deepseek4.attention.sliding_window": 64}},
        {"kv_overrides": {"deepseek4.rope.freq_base": 500.0, "a": "text", "b": True}},
        {"kv_overrides": {"tokenizer.ggml.eos_token_id": 300}},
        # Of another type than the file's, or of an array: the engine takes neither.
        {"kv_overrides": {"deepseek4.attention.sliding_window": 64.0, "deepseek4.hyper_connection.count": True}},
        {"kv_overrides": {"deepseek4.attention.compress_ratios": 128, "deepseek4.attention.causal": 0}},
        {"kv_overrides": {"deepseek4.attention.sliding_window": 2**32 + 64}},  # cut to 32 bits
        {"n_seq_max": 4, "load_mtp": True, "n_rs_seq": 1},  # which the host swallows
    ]
    for options, (plain, drafted, accepted, told) in zip(cases, run_many(plant(**BY_CONTEXT), cases)):
        assert drafted == plain, options
        assert plain[1] is None and accepted > 0 and not told, options


def test_a_head_whose_difference_is_overridden_drafts(plant: Plant, tmp_path: Path) -> None:
    files = plant(**BY_CONTEXT)
    key = b"deepseek4.rope.freq_base"
    file = mutants.read(files.mtp)
    (own,) = (each for each in file.keys if each.name == key)
    value, own.value = own.value, own.value / 2
    other = tmp_path / "other.gguf"
    other.write_bytes(mutants.written(file))
    cases: list[dict[str, Any]] = [{}, {"kv_overrides": {key.decode(): value}}]
    refused, taken = run_many(dataclasses.replace(files, mtp=other), cases)
    assert "does not belong to" in refused[1][1]
    plain, drafted, accepted, told = taken
    assert drafted == plain and plain[1] is None and accepted > 0 and not told


def test_where_nothing_can_be_drafted_a_warning_says_why(plant: Plant) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"attention_type": 1}, "no speculation: a row would see the drafts behind it"),
        ({"attention_type": 7}, "no speculation: a row would see the drafts behind it"),
        ({"pooling_type": 1}, "no speculation: the engine gives no hidden rows where it pools"),
        ({"kv_overrides": {"deepseek4.pooling_type": 1}}, "no speculation: the engine gives no hidden rows where it"),
        ({"pooling_type": 9}, "no speculation: the engine gives no hidden rows where it pools"),
        ({"rope_freq_base": -5.0}, "decoding plainly: drafting failed: the last decode has no finite logits"),
    ]
    found = run_many(plant(**BY_CONTEXT), [options for options, _ in cases])
    for (options, message), (plain, drafted, accepted, told) in zip(cases, found):
        assert drafted == plain and plain[1] is None, options
        assert len(told) == 1 and message in told[0] and accepted == 0, options


def test_values_that_are_none_are_an_error_as_without_a_draft(plant: Plant) -> None:
    cases: list[dict[str, Any]] = [
        {"type_k": 8},
        {"type_v": 99},
        {"type_k": 8, "type_v": 8},
        {"type_k": 12, "flash_attn": True},
        {"tensor_split": [1.0] * 17},
        {"n_ctx": -1},
        {"n_ctx": 2**31},
        {"n_batch": 0},
        {"split_mode": 3},
        {"n_ctx": 2},
        {"kv_overrides": {"deepseek4.expert_used_count": 1}},
    ]
    for options, (plain, drafted, _, told) in zip(cases, run_many(plant(), cases)):
        assert drafted == plain and plain[1] and not told, options


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"n_batch": -1}, "ValueError: n_batch is -1, expected 0 or more"),
        ({"type_k": -1}, "ValueError: type_k is -1, expected 0 or more"),
        ({"type_v": -1}, "ValueError: type_v is -1, expected 0 or more"),
        ({"lora_path": "none.gguf"}, "RuntimeError: Failed to initialize LoRA adapter from lora path: none.gguf"),
        ({"kv_overrides": {"deepseek4.hyper_connection.count": 2}}, "has 2 hyper-connection streams; expected 4"),
        ({"kv_overrides": {"deepseek4.attention.causal": False}}, "its attention is not causal"),
        ({"kv_overrides": {"deepseek4.attention.sliding_window": 0}}, "has a sliding window of 0 rows"),
        ({"kv_overrides": {"deepseek4.attention.sliding_window": 100000}}, "has a sliding window of 100000 rows"),
    ],
    ids=str,
)
def test_values_that_no_text_comes_of_are_refused(plant: Plant, options: dict[str, Any], error: str) -> None:
    files = plant()
    done = run(files.trunk, files.mtp, [300], **options)
    assert done.returncode == 1, done.stderr[-2000:]
    assert error in done.stderr.splitlines()[-1]


EMBED = """
import sys, warnings
from ds4_mtp_plugin import MtpDraft
from llama_cpp import Llama
warnings.simplefilter("ignore")
draft = MtpDraft(sys.argv[2]) if len(sys.argv) > 2 else None
llm = Llama(sys.argv[1], n_ctx=256, n_threads=1, embedding=True, verbose=False, draft_model=draft)
for call in (lambda: llm.embed("hello"), lambda: llm.create_embedding(["a", "b"]), lambda: llm("a", max_tokens=3)):
    try:
        call()
    except RuntimeError as err:
        print(err)
llm.close()
"""


@pytest.mark.parametrize("draft", [False, True])
def test_embeddings_of_this_architecture_are_an_error_and_not_the_end(plant: Plant, draft: bool) -> None:
    """The engine copies more than there is of each row, which an assertion of it ends the process for."""
    files = plant()
    argv = [sys.executable, "-c", EMBED, str(files.trunk), *([str(files.mtp)] if draft else [])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("the engine gives no embeddings of a model with hyper-connection") for line in lines)
