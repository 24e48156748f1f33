"""llama_cpp.server over HTTP, asked by the official openai client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.apps import needs

needs("openai", "instructor", "llama_cpp.server.__main__")

# isort: split
import instructor
import openai
from pydantic import BaseModel

from ds4_mtp_plugin import host
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from tests.fixtures.mtp_gguf import plant as plant_family

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ["-m", "llama_cpp.server", "--model", str(BASE)]
DS4_MTP = ["-c", "import sys; from ds4_mtp_plugin.cli import main; sys.exit(main())"]
SERVE = [*DS4_MTP, "serve", "-m", str(BASE), "--mtp", str(HEAD), "-k", "3"]
SETTINGS = ["--n_ctx", "1024", "--n_threads", "1", "--n_threads_batch", "1", "--verbose", "false"]


class Function(BaseModel):
    """A function of the standard library."""

    kind: Literal["function", "method", "class"]
    arguments: int
    module: Literal["textwrap", "string", "builtins"]


@dataclass
class Server:
    client: openai.OpenAI
    stop: Callable[..., tuple[int, str]]  # stop(signal=SIGINT): its exit status, and what it has said


def environment() -> dict[str, str]:
    libraries = str(Path(host.library_path()).parent)
    return {**os.environ, "PYTHONPATH": str(ROOT), "LLAMA_CPP_LIB_PATH": libraries, "DS4_MTP_ACCEPT_REPORT": "1"}


@contextmanager
def serving(folder: Path, *command: str, **variables: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**environment(), "PORT": str(port), "UVICORN_PORT": str(port), **variables}
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=env)

    def stop(number: int = signal.SIGINT) -> tuple[int, str]:
        process.send_signal(number)
        return process.wait(60), log.read_text()

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        give_up = time.monotonic() + 120
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None and time.monotonic() < give_up, log.read_text()
                time.sleep(0.1)
        yield Server(client, stop)
    finally:
        process.kill()
        process.wait()
        client.close()


def drafts(report: str) -> list[tuple[int, int]]:
    """(proposed, accepted) of each Llama that was closed, by the lines that it left."""
    return [(int(p), int(a)) for p, a in re.findall(r"mtp accept: .*proposed=(\d+) accepted=(\d+)", report)]


def conversation(client: openai.OpenAI, model: str = "any") -> list[Any]:
    """What an application asks, and all that it gets but ids and times."""
    question = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]
    other = [{"role": "user", "content": "Explain `str.split`."}]
    ask: Any = client.chat.completions.create
    complete: Any = client.completions.create
    said: list[Any] = []

    def streamed(answer: Any) -> list[Any]:
        return [chunk.choices[0].model_dump() for chunk in answer]

    said.append(streamed(ask(model=model, messages=question, stream=True, max_tokens=60, temperature=0.0)))
    said.append(streamed(ask(model=model, messages=other, stream=True, max_tokens=60, temperature=0.8, seed=7)))
    answer = ask(model=model, messages=question, max_tokens=40, temperature=0.7, seed=1, stop=["string"])
    said.append([answer.choices[0].model_dump(), answer.usage.model_dump()])

    # A client that goes away in the middle, and the next question.
    with ask(model=model, messages=other, stream=True, max_tokens=400, temperature=0.0) as stream:
        said.append([next(stream).choices[0].model_dump() for _ in range(5)])
    said.append(streamed(ask(model=model, messages=other, stream=True, max_tokens=30, temperature=0.0)))

    schema = {"type": "json_object", "schema": Function.model_json_schema()}
    answer = ask(model=model, messages=question, max_tokens=200, temperature=0.5, seed=3, response_format=schema)
    said.append(Function.model_validate_json(answer.choices[0].message.content).model_dump())
    tools = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    found: Any = tools.chat.completions.create(
        model=model,
        messages=question,  # type: ignore[arg-type]
        response_model=Function,
        max_tokens=200,
        temperature=0.5,
        seed=4,
    )
    said.append(found.model_dump())

    answer = complete(model=model, prompt="def main():", max_tokens=40, temperature=0.0, logprobs=3)
    said.append(answer.choices[0].model_dump())
    more = {"min_tokens": 20, "repeat_penalty": 1.2, "mirostat_mode": 2}
    answer = complete(
        model=model, prompt="import os\n", max_tokens=40, temperature=0.9, seed=5, logit_bias={"10": 2}, extra_body=more
    )
    said.append(answer.choices[0].model_dump())
    said.append(streamed(complete(model=model, prompt="class A", max_tokens=40, temperature=1.0, seed=6, stream=True)))
    return said


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    with serving(tmp_path_factory.mktemp("plain"), *PLAIN, *SETTINGS) as server:
        said = conversation(server.client)
        assert not drafts(server.stop()[1])
    return said


def test_conversation(tmp_path: Path, plain: list[Any]) -> None:
    with serving(tmp_path, *SERVE, *SETTINGS) as server:
        assert conversation(server.client) == plain
        status, said = server.stop(signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    [(proposed, accepted)] = drafts(said)
    assert 0 < accepted < proposed


@pytest.mark.parametrize(
    "command", [[*DS4_MTP, "serve"], ["-m", "uvicorn", "--factory", "ds4_mtp_plugin.host.server:create_app"]]
)
def test_models_of_a_config_file(command: list[str], tmp_path: Path, plain: list[Any]) -> None:
    """A model with a head and one without, asked in turn: each question closes one Llama and loads the other."""
    settings = {"model": str(BASE), "n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    models = [
        {**settings, "model_alias": "drafted", "draft_model": str(HEAD)},
        {**settings, "model_alias": "plain"},
    ]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"host": "127.0.0.1", "models": models}))
    question: Any = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]
    with serving(tmp_path, *command, CONFIG_FILE=str(config)) as server:
        for model in ("drafted", "plain", "drafted"):
            answer = server.client.chat.completions.create(
                model=model, messages=question, max_tokens=60, temperature=0.0, stream=True
            )
            assert [chunk.choices[0].model_dump() for chunk in answer] == plain[0]
        status, said = server.stop()
    reports = drafts(said)
    assert len(reports) == 2
    assert all(0 < accepted <= proposed for proposed, accepted in reports)
    assert "serve" not in command or status == 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (
            ["-m", str(BASE), "--mtp", "missing.gguf"],
            1,
            f"ds4-mtp serve: MtpDraft: {Path.cwd() / 'missing.gguf'}: no such file",
        ),
        (["-m", str(BASE), "--mtp", str(BASE)], 1, f"ds4-mtp serve: {BASE} has no MTP"),
        (["-m", str(BASE), "--mtp", "head.bin"], 1, "ds4-mtp serve: --mtp head.bin: the server takes"),
        (["-m", str(BASE), "-k", "3"], 1, "ds4-mtp serve: -k is of the head that --mtp names"),
        (["-m", str(BASE), "--mtp", str(HEAD), "--no_such_setting", "1"], 2, "usage: ds4-mtp serve"),
    ],
)
def test_what_does_not_fit_is_said(options: list[str], status: int, message: str) -> None:
    command = [sys.executable, *DS4_MTP, "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (done.returncode, done.stderr[: len(message)]) == (status, message)


def test_a_head_in_the_models_file(tmp_path: Path) -> None:
    files = plant_family(tmp_path, "qwen35")
    options = ["-m", str(files.trunk), "-k", "2", "--n_ctx", "512"]
    with serving(tmp_path, *DS4_MTP, "serve", *options, *SETTINGS[2:]) as server:
        complete: Any = server.client.completions.create
        complete(model="any", prompt="PRONOUNCE", max_tokens=100, temperature=0.0)
        [(proposed, accepted)] = drafts(server.stop(signal.SIGTERM)[1])
    assert 0 < accepted < proposed


def test_twelve_at_once_get_what_each_gets_alone(tmp_path: Path) -> None:
    """The host's server evaluates one request at a time. Told not to interrupt streams, it lets the others wait."""
    prompts = [f"def f{i}(x):" for i in range(12)]
    answers = []
    for name, command in (("plain", PLAIN), ("drafted", SERVE)):
        folder = tmp_path / name
        folder.mkdir()
        with serving(folder, *command, *SETTINGS, "--interrupt_requests", "false") as server:
            create: Any = server.client.completions.create

            def ask(prompt: str, stream: bool, create: Any = create) -> str:
                answer = create(model="any", prompt=prompt, max_tokens=40, temperature=0.0, stream=stream)
                choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
                assert choices[-1].finish_reason in ("length", "stop")
                return "".join(choice.text for choice in choices)

            answers.append([ask(prompt, False) for prompt in prompts])
            with ThreadPoolExecutor(12) as pool:
                answers.append(list(pool.map(ask, prompts, [i % 2 == 0 for i in range(12)])))
    assert answers[1:] == [answers[0]] * 3


def test_a_port_that_is_taken_is_a_failure() -> None:
    """uvicorn's own status for it is 3, which among ours means that texts differ."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, *SERVE, *SETTINGS, "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (done.returncode, "address already in use" in done.stderr) == (1, True)
