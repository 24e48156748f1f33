"""What else the host can do, it can do on our libraries: its modules, other models, embeddings, quantising, caches."""

from __future__ import annotations

import ctypes
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama, LlamaRAMCache

from ds4_mtp_plugin import MtpDraft, host
from tests.fixtures.ds4_gguf import byte_vocab
from tests.fixtures.planted import BY_CONTEXT, Planted
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]

# llava_cpp wants a library that llama.cpp of this version has no more; the server is an extra.
MODULES = [
    module.name
    for module in pkgutil.iter_modules(llama_cpp.__path__, "llama_cpp.")
    if module.name not in ("llama_cpp.llava_cpp", "llama_cpp.server")
]


def test_every_module_imports() -> None:
    code = f"import ds4_mtp_plugin, importlib\nfor name in {MODULES!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"llama_cpp._ggml", "llama_cpp.mtmd_cpp"} <= set(MODULES)


def tiny_llama(path: Path) -> Path:
    """A model of the architecture "llama" with random weights."""
    rng = np.random.default_rng(0)
    n_embd, n_ff, n_vocab = 64, 128, 512
    vocab = byte_vocab(n_vocab)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(1)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(list(vocab.merges) or ["a b"])
    shapes = {
        "token_embd": (n_vocab, n_embd),
        "output": (n_vocab, n_embd),
        "blk.0.attn_q": (n_embd, n_embd),
        "blk.0.attn_k": (n_embd, n_embd),
        "blk.0.attn_v": (n_embd, n_embd),
        "blk.0.attn_output": (n_embd, n_embd),
        "blk.0.ffn_gate": (n_ff, n_embd),
        "blk.0.ffn_up": (n_ff, n_embd),
        "blk.0.ffn_down": (n_embd, n_ff),
        "output_norm": (n_embd,),
        "blk.0.attn_norm": (n_embd,),
        "blk.0.ffn_norm": (n_embd,),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32) * 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_another_architecture_generates_and_embeds(llama: Make, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "llama.gguf")
    text = generate(llama(path, n_ctx=256), [300, 301], 20)
    assert len(text) == 20
    vector = llama(path, n_ctx=256, embedding=True).embed("hello")
    assert np.isfinite(vector).all()


def test_another_architecture_takes_no_draft(llama: Make, plant: Plant, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        llama(tiny_llama(tmp_path / "llama.gguf"), n_ctx=256, draft_model=MtpDraft(plant().mtp))


def test_a_model_can_be_quantised_and_runs_with_its_draft(llama: Make, plant: Plant, tmp_path: Path) -> None:
    files, target = plant(acceptance=0.9), tmp_path / "q8_0.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    status = llama_cpp.llama_model_quantize(str(files.trunk).encode(), str(target).encode(), ctypes.byref(params))
    assert status == 0 and target.stat().st_size < files.trunk.stat().st_size
    prompt = files.cycle[:3].tolist()
    draft = MtpDraft(files.mtp, num_pred_tokens=2)
    assert generate(llama(target, draft_model=draft), prompt, 60) == files.follow(prompt[-1], 60)
    assert draft.stats.rate > 0.5


@pytest.mark.parametrize("n_batch", [8, 512])
def test_a_chat_that_repeats_extends_and_edits_its_prompt(llama: Make, plant: Plant, n_batch: int) -> None:
    """Prefix reuse after rollbacks, at every length of edit, as in a Llama without a draft."""
    files = plant(**BY_CONTEXT)
    rng = np.random.default_rng(9)
    draft = MtpDraft(files.mtp, num_pred_tokens=3)
    both = [llama(files.trunk, n_batch=n_batch), llama(files.trunk, n_batch=n_batch, draft_model=draft)]
    prompt = rng.integers(260, 500, 60).tolist()
    for turn in range(24):
        n = int(rng.integers(1, 12))
        answer, drafted = (generate(llm, prompt, n) for llm in both)
        assert drafted == answer
        assert [llm.n_tokens for llm in both] == [len(prompt) + n - 1] * 2
        prompt = prompt if turn % 4 == 0 else prompt + answer
        if turn % 4 == 1:
            prompt = prompt + rng.integers(260, 500, 5).tolist()
        elif turn % 4 == 2:
            prompt = prompt[: -int(rng.integers(1, 4))]
        elif turn % 4 == 3:
            prompt = prompt[: -int(rng.integers(1, 9))] + [400]
    assert draft.stats.accepted > 10


def test_the_host_is_granted_the_removals_that_it_is_granted_plainly(llama: Make, plant: Plant) -> None:
    """Rollback is for verifies; a prompt kept in part would be evaluated in other batches than a plain run's."""
    files = plant()
    granted = []
    for options in ({}, {"draft_model": MtpDraft(files.mtp, num_pred_tokens=2)}):
        llm = llama(files.trunk, **options)
        llm.eval([300, 301, 302, 303, 304])
        granted.append([llm._ctx.kv_cache_seq_rm(-1, p0, -1) for p0 in (4, 3, 1, 5, 7, 0)])
    assert granted[0] == granted[1] == [False, False, False, True, True, True]
    assert llm._ds4_mtp._spec.target.seq_pos_max(0) == -1


def test_a_cache_of_states_gives_the_same_answers(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)

    def answers(llm: Llama) -> list[str]:
        llm.set_cache(LlamaRAMCache())
        prompts = [[300, 301, 302, 303], [310, 311], [300, 301, 302, 303], [300, 301, 302, 303, 304]]
        return [
            llm.create_completion(prompt, max_tokens=30, temperature=0.0)["choices"][0]["text"] for prompt in prompts
        ]

    assert answers(llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))) == answers(
        llama(files.trunk)
    )


def test_rows_decoded_behind_our_back_make_the_draft_cold_not_wrong(llama: Make, plant: Plant) -> None:
    """As multimodal handlers do: decode on the raw context, then tell the Llama how many tokens it has."""
    files = plant(**BY_CONTEXT)

    def run(llm: Llama) -> list[int]:
        tokens = [300, 301, 302]
        llm.eval(tokens)
        batch = llama_cpp._internals.LlamaBatch(n_tokens=8, embd=0, n_seq_max=1)
        batch.set_batch([310, 311, 312, 313], 3, False)
        llm._ctx.decode(batch)
        llm.input_ids[3:7] = [310, 311, 312, 313]
        llm.n_tokens = 7
        llm.eval([320])
        return generate(llm, [300, 301, 302, 310, 311, 312, 313, 320, 321], 60)

    draft = MtpDraft(files.mtp, num_pred_tokens=2)
    assert run(llama(files.trunk, draft_model=draft)) == run(llama(files.trunk))
    assert draft.stats.iters > 0


@pytest.mark.parametrize("n_batch", [8, 512])
def test_a_chat_with_pictures_is_the_plain_one(llama: Make, plant: Plant, n_batch: int) -> None:
    """What the host's multimodal handlers do: text by eval, the rows of a picture by a decode on the raw context, which
    leaves no tokens in the Llama, and a completion of all that it counts."""
    files = plant(**BY_CONTEXT)
    rng = np.random.default_rng(11)
    turns = [[rng.integers(260, 500, n).tolist() for n in (20, 6, tail)] for tail in (0, 1, 9, 0)]

    def run(llm: Llama) -> list[str]:
        answers = []
        for before, picture, behind in turns:
            llm.reset()
            llm._ctx.kv_cache_clear()
            llm.eval(before)
            batch = llama_cpp._internals.LlamaBatch(n_tokens=len(picture), embd=0, n_seq_max=1)
            batch.set_batch(picture, llm.n_tokens, False)
            assert llama_cpp.llama_decode(llm.ctx, batch.batch) == 0
            llm.n_tokens += len(picture)
            if behind:
                llm.eval(behind)
            prompt = llm.input_ids[: llm.n_tokens].tolist()
            answer = llm.create_completion(prompt, max_tokens=40, temperature=0.0)
            answers.append(answer["choices"][0]["text"])
        return answers

    draft = MtpDraft(files.mtp, num_pred_tokens=3)
    assert run(llama(files.trunk, n_batch=n_batch, draft_model=draft)) == run(llama(files.trunk, n_batch=n_batch))
    assert draft.stats.accepted > 0


def lora(path: Path, files: Planted) -> Path:
    """An adapter of rank 2 that turns the keys of the planted model's first layer."""
    name = "blk.0.attn_kv.weight"
    n_out, n_in = next(tensor.data.shape for tensor in gguf.GGUFReader(files.trunk).tensors if tensor.name == name)
    rng = np.random.default_rng(12)
    writer = gguf.GGUFWriter(path, "deepseek4")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    writer.add_tensor(f"{name}.lora_a", rng.standard_normal((2, n_in), np.float32))
    writer.add_tensor(f"{name}.lora_b", rng.standard_normal((n_out, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_adapter_changes_the_text_as_it_does_plainly(llama: Make, plant: Plant, tmp_path: Path) -> None:
    """It is the target's alone: the head goes on drafting what the model would have said without."""
    files = plant(**BY_CONTEXT)
    path = str(lora(tmp_path / "lora.gguf", files))
    draft = MtpDraft(files.mtp, num_pred_tokens=3)
    text = generate(llama(files.trunk, lora_path=path, draft_model=draft), [300, 301, 302], 100)
    assert text == generate(llama(files.trunk, lora_path=path), [300, 301, 302], 100)
    assert text != generate(llama(files.trunk), [300, 301, 302], 100)
    assert 0 < draft.stats.accepted < draft.stats.proposed


def test_two_llamas_share_one_engine(llama: Make, plant: Plant) -> None:
    files = plant(acceptance=0.8)
    drafted = [llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2)) for _ in range(2)]
    streams = [llm.generate([int(files.cycle[i])], temp=0.0) for i, llm in enumerate(drafted)]
    texts: list[list[int]] = [[], []]
    for _ in range(60):
        for text, stream in zip(texts, streams):
            text.append(next(stream))
    for i, text in enumerate(texts):
        assert text == files.follow(int(files.cycle[i]), 60)
    assert host.library_path().endswith((".so", ".dylib", ".dll"))
