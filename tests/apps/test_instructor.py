"""instructor, patching create_chat_completion_openai_v1 as the host's documentation has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from tests.apps import needs

needs("instructor", "openai")

# isort: split
import instructor
from llama_cpp import Llama
from pydantic import BaseModel, Field

from ds4_mtp_plugin.cli.demo import BASE
from tests.apps.conftest import Options

Same = Callable[[Callable[[Options], Any]], None]


class Function(BaseModel):
    """A function of the standard library."""

    kind: Literal["function", "method", "class"]
    name: str = Field(max_length=20)
    arguments: int


def ask(options: Options, mode: instructor.Mode, **arguments: Any) -> Any:
    llm = Llama(str(BASE), n_ctx=2048, verbose=False, **options)
    create = instructor.patch(create=llm.create_chat_completion_openai_v1, mode=mode)
    question = [{"role": "user", "content": "What is `textwrap.dedent`?"}]
    return create(messages=question, temperature=0.7, seed=2, max_tokens=200, **arguments)


def test_tools(same: Same) -> None:
    def run(options: Options) -> Any:
        found = ask(options, instructor.Mode.TOOLS, response_model=Function)
        assert isinstance(found, Function)
        return found.model_dump()

    same(run)


def test_partial_streaming(same: Same) -> None:
    def run(options: Options) -> Any:
        parts = ask(options, instructor.Mode.TOOLS, response_model=instructor.Partial[Function], stream=True)
        found = [part.model_dump() for part in parts]
        assert len(found) > 5
        return found

    same(run)


def test_retries(same: Same) -> None:
    """The model's JSON is not what is asked for, so each answer goes back into the next question."""

    def run(options: Options) -> Any:
        try:
            ask(options, instructor.Mode.JSON, response_model=Function, max_retries=2)
        except instructor.core.InstructorRetryException as err:
            answers = [attempt.completion.choices[0].message.content for attempt in err.failed_attempts]
            assert len(answers) == 3
            return answers
        raise AssertionError("an answer of the model fits")

    same(run)
