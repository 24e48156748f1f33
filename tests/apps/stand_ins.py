"""Local models in place of those that the host's own tests download: small ones that give the answers expected of them.

A planted model walks from token to token whatever came before, and its vocabulary may be chosen to the walk. So the
walk is given the words that the host's tests want to read, the rest of the ids gets the rest of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import TokenType

from tests.fixtures.ds4_gguf import Vocab, byte_characters, byte_vocab
from tests.fixtures.planted import TINY, Planted, Tokens, planted
from tests.host.test_host_abilities import tiny_llama

SPACE, NEWLINE = byte_characters()[0x20], byte_characters()[0x0A]

# tests/test_llama.py asserts the token ids of "Hello, world!".
FIXED = {"!": 0, ",": 11, f"{SPACE}world": 1814, "Hello": 9419}
EOS = 1

# The host's tests draw two numbers that have to differ; with this walk they do.
SEED = 5

# What is to follow what.
LINES = (
    [*(f"{SPACE}{word}" for word in ("fox", "jumps", "over", "the", "lazy", "dog")), "."],
    [NEWLINE, "true"],
    [f"{SPACE}par", "rot"],
)

# Words of the prompts, which have to fit contexts of 16 and 32 tokens.
WORDS = [
    *(f"{SPACE}{word}" for word in ("The", "quick", "brown", "slow", "capital", "of", "france", "is", "paris")),
    *(f"{SPACE}{word}" for word in ("or", "a", "number", "from", "to")),
    "The",
    "Pick",
]

# Of the models that are no DeepSeek-V4.
N_EMBD, N_VOCAB = 64, 512

CONFIG = replace(TINY, n_vocab=9440, n_embd=256)


def _vocab(walk: Tokens) -> Vocab:
    ids = dict(FIXED)
    free = iter([token for token in range(300, len(walk)) if token not in ids.values()])
    for line in LINES:
        token = next(free)
        for piece in line:
            assert token not in ids.values(), "the walk meets itself: choose another seed"
            ids[piece] = token
            token = int(walk[token])
    # Digits and words are inside of the walk, where tokens can be sampled; the other bytes go where there is room.
    taken = set(ids.values()) | {EOS}
    rest = [piece for piece in [*WORDS, *"0123456789", *byte_characters()] if piece not in ids]
    places = [*range(300, len(walk)), *range(2, 300)]
    for piece, token in zip(dict.fromkeys(rest), (token for token in places if token not in taken)):
        ids[piece] = token
    names = {token: piece for piece, token in ids.items()}
    tokens = [names.get(token, f"<{token}>") for token in range(len(walk))]
    types = [TokenType.NORMAL] * len(walk)
    types[EOS] = TokenType.CONTROL
    return Vocab(tokens, types, list(_merges()), pre="qwen2", bos=None, eos=EOS, pad=None, add_bos=False)


def _merges() -> Iterator[str]:
    """Each word from its left end on, the ones with a space first: or else "rot" would be cut out of " from"."""
    words = [*WORDS, *FIXED, *(piece for line in LINES for piece in line)]
    seen = set()
    for word in sorted(words, key=lambda word: not word.startswith(SPACE)):
        for i in range(1, len(word)):
            merge = f"{word[:i]} {word[i]}"
            if merge not in seen:
                seen.add(merge)
                yield merge


def _write(writer: gguf.GGUFWriter, shapes: dict[str, tuple[int, ...]]) -> None:
    """The byte vocabulary and random tensors, behind the architecture's own metadata."""
    rng = np.random.default_rng(0)
    vocab = byte_vocab(N_VOCAB)
    writer.add_context_length(512)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(list(vocab.merges))
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.1)
        writer.add_tensor(name, -np.abs(values) if name.endswith("ssm_a") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_mamba(path: Path) -> Path:
    """A model of the architecture "mamba" with random weights."""
    n_inner, n_state, n_conv, dt_rank = 128, 16, 4, 4
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(n_conv)
    writer.add_ssm_inner_size(n_inner)
    writer.add_ssm_state_size(n_state)
    writer.add_ssm_time_step_rank(dt_rank)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {
        "token_embd.weight": (N_VOCAB, N_EMBD),
        "output_norm.weight": (N_EMBD,),
        "blk.0.attn_norm.weight": (N_EMBD,),
        "blk.0.ssm_in.weight": (2 * n_inner, N_EMBD),
        "blk.0.ssm_conv1d.weight": (n_inner, n_conv),
        "blk.0.ssm_conv1d.bias": (n_inner,),
        "blk.0.ssm_x.weight": (dt_rank + 2 * n_state, n_inner),
        "blk.0.ssm_dt.weight": (n_inner, dt_rank),
        "blk.0.ssm_dt.bias": (n_inner,),
        "blk.0.ssm_a": (n_inner, n_state),
        "blk.0.ssm_d": (n_inner,),
        "blk.0.ssm_out.weight": (N_EMBD, n_inner),
    }
    _write(writer, shapes)
    return path


def tiny_bert(path: Path) -> Path:
    """A model of the architecture "bert" with random weights: one vector a text."""
    n_ff = 128
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.CLS)
    writer.add_token_type_count(2)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (N_VOCAB, N_EMBD),
        "token_types.weight": (2, N_EMBD),
        "position_embd.weight": (512, N_EMBD),
    }
    for name, shape in {
        "token_embd_norm": (N_EMBD,),
        "blk.0.attn_q": (N_EMBD, N_EMBD),
        "blk.0.attn_k": (N_EMBD, N_EMBD),
        "blk.0.attn_v": (N_EMBD, N_EMBD),
        "blk.0.attn_output": (N_EMBD, N_EMBD),
        "blk.0.attn_output_norm": (N_EMBD,),
        "blk.0.ffn_up": (n_ff, N_EMBD),
        "blk.0.ffn_down": (N_EMBD, n_ff),
        "blk.0.layer_output_norm": (N_EMBD,),
    }.items():
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
    _write(writer, shapes)
    return path


def stand_ins(folder: Path) -> tuple[Planted, dict[str, Path]]:
    """The planted pair, and a file for each repository that the host's tests download from."""
    pair = planted(folder, config=CONFIG, acceptance=(1.0, 0.7), vocab=_vocab, seed=SEED)
    return pair, {
        "lmstudio-community/Qwen3.5-0.8B-GGUF": pair.trunk,
        "tiiuae/Falcon-H1-Tiny-90M-Instruct-GGUF": pair.trunk,
        "ggml-org/models": tiny_llama(folder / "llama.gguf"),
        "CompendiumLabs/bge-small-en-v1.5-gguf": tiny_bert(folder / "bert.gguf"),
        "QuantFactory/mamba-130m-hf-GGUF": tiny_mamba(folder / "mamba.gguf"),
    }
