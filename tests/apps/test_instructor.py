"""instructor, patching create_chat_completion_openai_v1 as the host's documentation has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from tests.apps import needs

needs("instructor", "openai")

# isort: split
import instructor
import pytest
from instructor.core import InstructorRetryException
from llama_cpp import Llama
from pydantic import BaseModel, Field, model_validator

from ds4_mtp_plugin.cli.demo import BASE
from tests.apps.conftest import Options

Same = Callable[[Callable[[Options], Any]], None]


class Function(BaseModel):
    """A function of the standard library."""

    kind: Literal["function", "method", "class"]
    name: str = Field(max_length=20)
    arguments: int


class Refused(Function):
    """What no answer is, on any CPU. The tool's grammar sees to it that each has an end."""

    @model_validator(mode="before")
    @classmethod
    def refuse(cls, answer: object) -> object:
        raise ValueError("not that")


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
    """No answer is taken, so each goes back into the next question."""

    def run(options: Options) -> Any:
        with pytest.raises(InstructorRetryException) as err:
            ask(options, instructor.Mode.TOOLS, response_model=Refused, max_retries=2)
        answers = [attempt.completion.choices[0].message.function_call for attempt in err.value.failed_attempts]
        assert len(answers) == 3
        return answers

    same(run)
