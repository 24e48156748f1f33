"""guidance, which decodes and samples on the Llama's own context and shares it with completions of the app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.apps import needs

needs("guidance")

# isort: split
import guidance
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin.cli.demo import BASE
from tests.apps.conftest import Options

Same = Callable[[Callable[[Options], Any]], None]

# Of guidance's own: deprecated names of the host, a chat template that it does not know.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_programs_between_completions(same: Same) -> None:
    def run(options: Options) -> Any:
        llm = Llama(str(BASE), n_ctx=1024, logits_all=True, seed=3, verbose=False, **options)
        said = [llm("import os\n", max_tokens=40, temperature=0.0)["choices"][0]["text"]]
        program = guidance.models.LlamaCpp(llm, echo=False)
        program += "import os\n" + guidance.gen("text", max_tokens=30, temperature=0.0)
        program += guidance.select(["yes", "no"], name="choice") + guidance.gen("digits", regex="[0-9]{4}")
        said += [program[name] for name in ("text", "choice", "digits")]
        for prompt in ("import os\n", "class A:\n"):
            said.append(llm(prompt, max_tokens=40, temperature=0.0)["choices"][0]["text"])
        return said

    same(run)
