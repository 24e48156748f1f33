"""LangChain's LlamaCpp and ChatLlamaCpp (langchain-community)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.apps import needs

needs("langchain_community.llms.llamacpp", "langchain_community.chat_models.llamacpp")

# isort: split
from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.llms import LlamaCpp
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from pydantic import BaseModel, Field

from ds4_mtp_plugin.cli.demo import BASE
from tests.apps.conftest import Options

Same = Callable[[Callable[[Options], Any]], None]

QUESTION = "What does `textwrap.dedent` do?"


class Function(BaseModel):
    """A function of the standard library."""

    name: str = Field(max_length=20)
    arguments: int


def llm(options: Options, **settings: Any) -> Any:
    settings = {"n_ctx": 1024, "n_threads": 1, "max_tokens": 50, "seed": 5, "verbose": False, **settings}
    options = {name: value for name, value in options.items() if name != "n_threads"}
    return LlamaCpp(model_path=str(BASE), model_kwargs=options, **settings)


def chat(options: Options, **settings: Any) -> Any:
    settings = {"n_ctx": 1024, "n_threads": 1, "max_tokens": 50, "seed": 5, "verbose": False, **settings}
    options = {name: value for name, value in options.items() if name != "n_threads"}
    return ChatLlamaCpp(model_path=str(BASE), model_kwargs=options, **settings)


def test_invoke_stream_and_batch(same: Same) -> None:
    def run(options: Options) -> Any:
        model = llm(options)  # temperature 0.8, repeat_penalty 1.1, n_batch 8: the defaults
        return [
            model.invoke("import os\n"),
            list(model.stream("class A:\n", stop=["\n\n"])),
            model.batch(["def f(", "import "], config={"max_concurrency": 1}),
            model.get_num_tokens("import os"),
        ]

    same(run)


def test_chain_and_async(same: Same) -> None:
    def run(options: Options) -> Any:
        chain = PromptTemplate.from_template("def {name}(") | llm(options, temperature=0.0) | StrOutputParser()

        async def stream() -> list[str]:
            return [chunk async for chunk in chain.astream({"name": "join"})]

        return [chain.invoke({"name": "split"}), asyncio.run(stream())]

    same(run)


def test_grammar(same: Same) -> None:
    def run(options: Options) -> Any:
        yes_or_no = llm(options, grammar='root ::= ("yes" | "no" | "perhaps") (" " ("yes" | "no" | "perhaps")){8}')
        return [yes_or_no.invoke("Is it?"), list(yes_or_no.stream("Is it?"))]

    same(run)


def test_chat(same: Same) -> None:
    def run(options: Options) -> Any:
        model = chat(options, temperature=0.7)
        return [
            model.invoke([("system", "Answer."), ("human", QUESTION)]).content,
            [chunk.content for chunk in model.stream(QUESTION)],
        ]

    same(run)


def test_structured_output(same: Same) -> None:
    def run(options: Options) -> Any:
        model = chat(options, temperature=0.3, max_tokens=200)
        found = model.with_structured_output(Function).invoke(QUESTION)
        assert isinstance(found, Function)
        tools = model.bind_tools([Function], tool_choice="Function").invoke("Explain `str.split`.").tool_calls
        return [found, [(call["name"], call["args"]) for call in tools]]

    same(run)
