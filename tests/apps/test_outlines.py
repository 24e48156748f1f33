"""outlines: logits processors with memory, which must see each token once and none that is only drafted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from tests.apps import needs

needs("outlines", "numba")

# isort: split
import outlines
from llama_cpp import Llama
from outlines.types import Regex
from pydantic import BaseModel, Field

from ds4_mtp_plugin.cli.demo import BASE
from tests.apps.conftest import Options

Same = Callable[[Callable[[Options], Any]], None]

WORDS = r"[a-z]{3,8}( [a-z]{3,8}){9}"


class Function(BaseModel):
    """A function of the standard library."""

    kind: Literal["function", "method", "class"]
    name: str = Field(max_length=20)
    arguments: int


def model(options: Options, **settings: Any) -> Any:
    return outlines.from_llamacpp(Llama(str(BASE), n_ctx=1024, seed=3, verbose=False, **options), **settings)


def test_text(same: Same) -> None:
    def run(options: Options) -> Any:
        chat = model(options)
        answer = chat("What does os.path do?", max_tokens=40, temperature=0.0)
        plain = outlines.from_llamacpp(chat.model, chat_mode=False)
        streamed = list(plain.stream("def f(", max_tokens=30, seed=3))
        return [answer, plain("import os\n", max_tokens=40, temperature=0.0), streamed]

    same(run)


def test_json_schema(same: Same) -> None:
    def run(options: Options) -> Any:
        ask = model(options)
        answer = ask("What is `textwrap.dedent`?", Function, max_tokens=200, temperature=0.7, seed=3)
        assert Function.model_validate_json(answer)
        return [answer, list(ask.stream("What is `str.split`?", Function, max_tokens=200, temperature=0.0))]

    same(run)


def test_regex_and_choice(same: Same) -> None:
    def run(options: Options) -> Any:
        ask = model(options)
        words = ask("Some words", Regex(WORDS), max_tokens=120, temperature=1.0, seed=3)
        assert re.fullmatch(WORDS, words)
        return [words, ask("Is it?", Literal["yes", "no"], max_tokens=10)]

    same(run)
