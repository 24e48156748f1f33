"""The tokenizer of ds4-mini: byte-level BPE that llama.cpp repeats id for id.

llama.cpp knows pre-tokenizers by name, not by regex: ``tokenizer.ggml.pre = "deepseek-v3"`` (``src/llama-vocab.cpp``)
stands for three splits one after the other, which are repeated here for the training side. Special tokens come first,
in the order of ``data.SPECIALS`` and ``data.TAGS``, so BOS is id 0 and EOS id 1, as in DeepSeek's own tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.fixtures.ds4_gguf import Vocab
from tests.reference.data import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIALS, TAGS

PRE = "deepseek-v3"
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+"""
    r"""|\s+(?!\S)"""
    r"""|\s+""",
)


def train(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """A tokenizer of exactly ``n_vocab`` ids, specials included, learned from ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS]
        + [AddedToken(token, special=False, normalized=False) for token in TAGS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        # Llama.detokenize of llama-cpp-python reads a piece into 32 bytes and loses what does not fit.
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != n_vocab:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens, not {n_vocab}")
    return tokenizer


def load(path: str | Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def gguf_vocab(tokenizer: Tokenizer) -> Vocab:
    """What the GGUF's ``tokenizer.*`` keys say: tokens in id order, llama.cpp types, merges, chat template."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("token ids are not 0..n-1")
    types = {**dict.fromkeys(SPECIALS, TokenType.CONTROL), **dict.fromkeys(TAGS, TokenType.USER_DEFINED)}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return Vocab(
        tokens=tokens,
        types=[types.get(token, TokenType.NORMAL) for token in tokens],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        pre=PRE,
        bos=ids[BOS],
        eos=ids[EOS],
        pad=ids[PAD],
        chat_template=CHAT_TEMPLATE,
    )
