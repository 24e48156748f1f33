"""The engine's tokenizer gives the ids that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from llama_cpp import Llama

from tests.fixtures.ds4_gguf import Ds4Config, trunk_shapes, write_gguf
from tests.reference import data, tokenizer

N_VOCAB = 1024
HARD = (
    "naïve café x² 你好世界 ひらがな 12345 3.14159 \t\ttabs\r\nwin €uro 🎉\n\n   \n  def f(self, *args):\n"
    '\u00a0nbsp … don\'t <think>a</think> __init__ a==b ((())) \'quoted\' """doc""" trailing   '
)


@pytest.fixture(scope="module")
def text() -> list[str]:
    indented = "".join(f"call({' ' * 48}argument_{i},\n" for i in range(50))  # would be learned as one long token
    return [*(Path(module.__file__ or "").read_text() for module in (data, tokenizer)), indented]


@pytest.fixture(scope="module")
def learned(text: list[str]) -> Any:
    return tokenizer.train(text, N_VOCAB)


@pytest.fixture
def engine(learned: Any, tmp_path: Path, llama: Callable[..., Llama]) -> Llama:
    cfg = Ds4Config(n_vocab=N_VOCAB)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in trunk_shapes(cfg).items()}
    write_gguf(tmp_path / "vocab.gguf", cfg, zeros, part="trunk", vocab=tokenizer.gguf_vocab(learned))
    return llama(tmp_path / "vocab.gguf", vocab_only=True)


def test_the_engine_agrees_on_every_id(engine: Llama, learned: Any, text: list[str]) -> None:
    for sample in (*text, HARD, data.chat("What is `os`?", "A module.", data.SYSTEM)):
        ids = engine.tokenize(sample.encode(), add_bos=False, special=True)
        assert ids == learned.encode(sample).ids


def test_text_survives(engine: Llama, learned: Any, text: list[str]) -> None:
    """Also the longest tokens: a piece of more than 32 bytes would be lost in the host's detokenize."""
    for sample in (*text, HARD):
        assert engine.detokenize(learned.encode(sample).ids, special=True).decode() == sample


def test_special_ids(engine: Llama) -> None:
    assert (engine.token_bos(), engine.token_eos()) == (0, 1)
    assert engine.tokenize(b"") == [0]


def test_the_chat_template_renders_what_was_trained(learned: Any) -> None:
    jinja2 = pytest.importorskip("jinja2")
    messages = [
        {"role": "system", "content": data.SYSTEM},
        {"role": "user", "content": "What is `os`?"},
    ]
    render = jinja2.Template(data.CHAT_TEMPLATE).render
    asked = render(messages=messages, bos_token=data.BOS, add_generation_prompt=True)
    assert asked == data.BOS + data.chat("What is `os`?", "", data.SYSTEM)
    messages.append({"role": "assistant", "content": "A module."})
    told = render(messages=messages, bos_token=data.BOS, add_generation_prompt=False)
    assert told == data.BOS + data.chat("What is `os`?", "A module.", data.SYSTEM) + data.EOS
