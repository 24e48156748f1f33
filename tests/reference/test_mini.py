"""The shipped pair: the engine says what the reference says with its weights, and the head drafts for the trunk."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gguf  # noqa: E402
from llama_cpp import Llama  # noqa: E402

from tests.reference.export import load_tensors  # noqa: E402
from tests.reference.model import Ds4  # noqa: E402
from tests.reference.ship import MODELS, NAMES, card, config_of  # noqa: E402

TRUNK, MTP = (MODELS / NAMES[part] for part in ("trunk", "mtp"))
PROMPT = "<｜User｜>What does `textwrap.dedent` do?<｜Assistant｜></think>"


def dequantized(path: Any) -> dict[str, Any]:
    """GGUF name -> array, shapes in numpy order."""
    arrays = {}
    for tensor in gguf.GGUFReader(path).tensors:
        quantized = tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type) if quantized else tensor.data
        arrays[tensor.name] = values.reshape(tensor.shape[::-1].tolist())
    return arrays


@pytest.fixture(scope="module")
def reference() -> Any:
    facts = json.loads((MODELS / "card.json").read_text())
    model = Ds4(config_of(facts["config"])).eval()
    load_tensors(model, dequantized(TRUNK), dequantized(MTP))
    return model


def sampled(llm: Llama, n: int) -> list[int]:
    """n tokens of the trunk's own text at temperature 1: more varied than its best text, which soon repeats itself."""
    llm.set_seed(1)
    tokens = llm.tokenize(PROMPT.encode(), special=True)
    for token in llm.generate(list(tokens), temp=1.0, repeat_penalty=1.0, top_k=0, top_p=1.0, min_p=0.0):
        tokens.append(token)
        if len(tokens) == n:
            break
    return tokens


def test_engine_and_reference_agree(llama: Callable[..., Llama], reference: Any) -> None:
    """Logits of every row, beyond the window of 128 and 64 compressed blocks, up to what Q8_0's rounding costs."""
    llm = llama(TRUNK, logits_all=True)
    tokens = sampled(llm, 300)
    llm.reset()
    llm.eval(tokens)
    engine = llm.scores[: len(tokens)]
    with torch.no_grad():
        expected = reference(torch.tensor([tokens]))[0][0].numpy()
    error = np.linalg.norm(engine - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(error) < 0.015, f"relative error {np.median(error):.4f}"


def test_the_head_was_trained_for_this_trunk(llama: Callable[..., Llama], reference: Any) -> None:
    """On the trunk's own text, MTP's best token is the trunk's more often than not."""
    tokens = sampled(llama(TRUNK), 300)
    with torch.no_grad():
        logits, hidden = reference(torch.tensor([tokens]))
        drafts, _ = reference.mtp(hidden[:, :-1], torch.tensor([tokens[1:]]))
    agreement = (drafts.argmax(-1) == logits[:, 1:].argmax(-1)).float().mean().item()
    assert agreement > 0.5, f"{agreement:.2f}"


def test_the_card_is_the_generated_one() -> None:
    assert (MODELS / "README.md").read_text() == card(json.loads((MODELS / "card.json").read_text()))


def test_both_files_are_small() -> None:
    assert TRUNK.stat().st_size + MTP.stat().st_size < 20_000_000
