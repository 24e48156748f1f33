"""LlamaIndex's LlamaCPP (llama-index-llms-llama-cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.apps import needs

needs("llama_index.llms.llama_cpp")

# isort: split
from llama_cpp import LlamaGrammar
from llama_index.core import Document, PromptTemplate, SummaryIndex
from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP
from pydantic import BaseModel, Field

from ds4_mtp_plugin.cli.demo import BASE
from tests.apps.conftest import Options

Same = Callable[[Callable[[Options], Any]], None]


class Function(BaseModel):
    """A function of the standard library."""

    name: str = Field(max_length=20)
    arguments: int


GRAMMAR = r"""
root ::= "{\"name\": \"" [a-z]{3,12} "\", \"arguments\": " [0-9]{1,2} "}"
"""


def prompt_of(messages: Any) -> str:
    return "".join(f"<｜{message.role.value.title()}｜>{message.content}" for message in messages) + "<｜Assistant｜>"


def llm(options: Options, **generate: Any) -> Any:
    return LlamaCPP(
        model_path=str(BASE),
        temperature=0.7,
        max_new_tokens=60,
        context_window=2048,
        generate_kwargs={"seed": 4, **generate},
        model_kwargs=options,
        messages_to_prompt=prompt_of,
        completion_to_prompt=str,
        verbose=False,
    )


def test_complete_and_stream(same: Same) -> None:
    def run(options: Options) -> Any:
        model = llm(options)
        return [
            model.complete("import os\n").text,
            [part.delta for part in model.stream_complete("class A")],
            model.metadata.context_window,
        ]

    same(run)


def test_chat(same: Same) -> None:
    question = [ChatMessage(role="user", content="What does `textwrap.dedent` do?")]

    def run(options: Options) -> Any:
        model = llm(options, repeat_penalty=1.1)
        return [model.chat(question).message.content, [part.delta for part in model.stream_chat(question)]]

    same(run)


def test_structured_output(same: Same) -> None:
    def run(options: Options) -> Any:
        model = llm(options, grammar=LlamaGrammar.from_string(GRAMMAR, verbose=False))
        found = [
            model.structured_predict(Function, PromptTemplate("Describe `{name}`."), name=name)
            for name in ("textwrap.dedent", "str.split", "os.path.join")
        ]
        assert all(isinstance(each, Function) for each in found)
        return found

    same(run)


def test_question_over_documents(same: Same) -> None:
    documents = [Document(text="Split a string at the separator. " * 8), Document(text="Join two or more paths.")]

    def run(options: Options) -> Any:
        index = SummaryIndex.from_documents(documents)
        return str(index.as_query_engine(llm=llm(options), response_mode="refine").query("What is joined?"))

    same(run)
