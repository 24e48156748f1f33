"""Images in a chat, by the host's own handler: the text is plain's, and text behind an image is drafted for again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Qwen25VLChatHandler

from ds4_mtp_plugin import MtpDraft, NgramDraft
from ds4_mtp_plugin.draft import Draft
from tests.fixtures.mmproj_gguf import picture, write_mmproj
from tests.fixtures.mtp_gguf import N_EMBD, plant

Make = Callable[..., Llama]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("images")
    return plant(directory, "qwen35").trunk, write_mmproj(directory / "mmproj.gguf", N_EMBD)


def message(*parts: str) -> dict[str, Any]:
    """A user's message: texts, and images by their URL."""
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": part}}
            if part.startswith("data:")
            else {"type": "text", "text": part}
            for part in parts
        ],
    }


CHATS = [
    [message(picture(64, 48, 1), "what is it?")],
    [message(picture(64, 48, 2), "what is it?")],
    [message("look at this ", picture(96, 160, 3), "what is it?")],
    [message("a text alone")],
    [message(picture(64, 48, 1), "and ", picture(40, 200, 2), "which is larger, and why? Think about it")],
    [message("look, an image comes last: ", picture(64, 48, 1))],
]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "make_draft", [lambda: MtpDraft(num_pred_tokens=3), MtpDraft, NgramDraft], ids=["3", "automatic", "ngram"]
)
def test_the_text_behind_images(
    llama: Make, files: tuple[Path, Path], make_draft: Callable[[], Draft], sampling: dict[str, Any]
) -> None:
    answers: list[list[str]] = []
    for draft in (None, make_draft()):
        handler = Qwen25VLChatHandler(clip_model_path=str(files[1]), verbose=False)
        llm = llama(files[0], draft_model=draft, chat_handler=handler, n_ctx=2048)
        answers.append([])
        for messages in CHATS:
            before = draft.stats.accepted if draft is not None else 0
            done = llm.create_chat_completion(messages, max_tokens=60, repeat_penalty=1.0, **sampling)
            answers[-1].append(done["choices"][0]["message"]["content"])
            if isinstance(draft, MtpDraft) and not draft.adaptive:
                assert draft.stats.accepted > before  # behind every image
        # A completion of text goes on as it would without a draft.
        answers[-1].append(llm("some text", max_tokens=30)["choices"][0]["text"])
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1], "the images make no difference"
    assert draft is not None and draft.stats.failures == 0


def test_what_looks_like_a_prompt_with_an_image_is_evaluated(llama: Make, files: tuple[Path, Path]) -> None:
    """The Llama does not know what an image's rows are: in their place are tokens of any text before."""
    rows = []
    for draft in (None, MtpDraft(exact=False)):
        handler = Qwen25VLChatHandler(clip_model_path=str(files[1]), verbose=False)
        llm = llama(files[0], draft_model=draft, chat_handler=handler, n_ctx=2048, n_batch=256)
        llm.input_ids[:] = 65
        llm.create_chat_completion([message("look ", picture(64, 48, 1), "what is it? " * 40)], max_tokens=1)
        text = llm.input_ids[: llm.n_tokens].tolist()
        llm.reset()
        llm.eval([*text, 70])
        rows.append(np.array(llm._ctx.get_logits()[: llm.n_vocab()]))
    np.testing.assert_array_equal(*rows)
