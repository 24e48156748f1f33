"""ds4-mtp, as a user calls it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import Llama

import ds4_mtp_plugin
from ds4_mtp_plugin import MtpStats, cli, settings
from ds4_mtp_plugin.cli import generation
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from tests.fixtures.ds4_gguf import byte_vocab
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import BY_CONTEXT, TINY, Planted


def test_run_streams_text_and_reports(plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str]) -> None:
    files = plant(acceptance=1.0)
    assert cli.main(["run", "-m", str(files.trunk), "--mtp", str(files.mtp), "-p", "a", "-n", "40", "-t", "1"]) == 0
    out = capsys.readouterr().out
    assert "speculative" in out and "1: 100 %" in out


def test_compare_says_that_the_texts_are_the_same(
    plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str]
) -> None:
    files = plant(acceptance=0.5)
    argv = ["run", "-m", str(files.trunk), "--mtp", str(files.mtp), "-p", "abc", "-n", "60", "-t", "1", "--compare"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    first, second = out.split("--- speculative ---")
    assert first.removeprefix("--- plain ---") == second.split("---\n")[0]
    assert "the same 60 tokens" in out


def test_fewer_threads_by_default_than_there_are_cores_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(1000)), raising=False)
    said = []
    for threads in ([], ["-t", "1"]):
        assert cli.main(["run", *MINI[:4], *threads, "-n", "4", "-p", "import"]) == 0
        said.append("threads, the host's default: -t 1000 may be faster" in capsys.readouterr().out)
    assert said == [True, False]


@pytest.mark.parametrize("n", ["0", "-1"])
def test_without_a_number_it_ends_with_the_context(
    plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str], n: str
) -> None:
    files = plant(acceptance=1.0)
    argv = ["run", "-m", str(files.trunk), "--mtp", str(files.mtp), "-p", "a", "-n", n, "-c", "64", "-t", "1"]
    assert cli.main(argv) == 0
    assert "accepted     1: 100 %" in capsys.readouterr().out


def test_texts_that_differ_are_exit_status_3(
    plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(acceptance=0.5)
    texts = iter([[1, 2, 3], [1, 2, 4]])
    stats = MtpStats(iters=1, proposed=2, draft_decodes=2, depth=2)
    monkeypatch.setattr(generation, "generate", lambda *_, **__: generation.Generation(next(texts), 1.0, 1.0, stats))
    argv = ["run", "-m", str(files.trunk), "--mtp", str(files.mtp), "-p", "abc", "--compare"]
    assert cli.main(argv) == cli.EXIT_DIFFERS == 3
    assert "differ from token 2 on" in capsys.readouterr().err


@pytest.mark.parametrize("bound", ["0.5", "0"])
def test_verify_finds_every_token_to_be_the_plain_choice(
    plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str], bound: str
) -> None:
    files = plant(**BY_CONTEXT)
    argv = ["verify", "-m", str(files.trunk), "--mtp", str(files.mtp), "-p", "abc", "-n", "200", "-t", "1"]
    assert cli.main([*argv, "--bound", bound]) == 0
    assert "0 of 200 tokens are not the choice of plain decoding" in capsys.readouterr().out


def test_verify_finds_a_token_that_is_not(
    plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(acceptance=0.5)
    generate = generation.generate

    def wrong(*args: object, **options: object) -> generation.Generation:
        good = generate(*args, **options)  # type: ignore[arg-type]
        return dataclasses.replace(good, tokens=[*good.tokens[:20], 300, *good.tokens[21:]])

    monkeypatch.setattr(generation, "generate", wrong)
    argv = ["verify", "-m", str(files.trunk), "--mtp", str(files.mtp), "-p", "abc", "-n", "40", "-t", "1"]
    assert cli.main(argv) == cli.EXIT_DIFFERS
    out = capsys.readouterr().out
    assert "2 of 40 tokens are not" in out and "logits, at token 2" in out
    assert cli.main([*argv, "--bound", "1e9"]) == 0


def test_a_wrong_file_is_one_line_and_exit_status_1(
    plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    head = tmp_path / "no-such.gguf"
    assert cli.main(["run", "-m", str(plant().trunk), "--mtp", str(head), "-p", "a"]) == cli.EXIT_FAILED == 1
    err = capsys.readouterr().err
    assert err.strip() == f"ds4-mtp run: MtpDraft: {head}: no such file; expected an MTP GGUF file"


@pytest.mark.parametrize("argv", [[], ["fly"], ["run"]])
def test_a_wrong_command_line_is_exit_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == cli.EXIT_USAGE == 2
    assert "usage: ds4-mtp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["run", "--help"],
        ["demo", "--help"],
        ["bench", "--help"],
        ["verify", "--help"],
        ["convert", "--help"],
        ["rpc-server", "--help"],
        ["--version"],
    ],
)
def test_help_is_there(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 0
    assert "ds4-mtp" in capsys.readouterr().out


# Left to itself the depth is the clock's: on a busy machine it may well be 0. Tests that ask for drafts give one.
MINI = ["-m", str(BASE), "--mtp", str(HEAD), "-t", "1"]


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def printed(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> dict[str, Any]:
    """The object that the command prints with --json."""
    assert cli.main([*argv, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    """The first line and the last of what the command says of a wrong command line."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    assert caught.value.code == cli.EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    return lines[0], lines[-1]


def test_the_prompt_comes_from_where_it_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Text, a file, stdin by name and stdin that is piped give one prompt; a file's last newline is none of it."""
    prompt = "# größer\nimport os"
    file = tmp_path / "prompt.txt"
    file.write_bytes(prompt.encode() + b"\n")
    run = ["run", *MINI, "-n", "12"]
    given = printed(capsys, *run, "-p", prompt)
    assert given["timings"]["prompt_tokens"] > 3
    del given["timings"], given["stats"]
    for source in (["-p", f"@{file}"], ["-p", "@-"], []):
        piped(monkeypatch, file.read_bytes())
        found = printed(capsys, *run, *source)
        assert {name: found[name] for name in given} == given


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory (what follows @ is the name of a file)"),
        (b"caf\xe9", "is not UTF-8 (byte 3)"),
        (b"\n", "is empty"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, why: str
) -> None:
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["run", *MINI, "-p", f"@{file}"]) == cli.EXIT_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ds4-mtp run: ") and str(file) in line and line.endswith(why)


def test_no_prompt_is_a_usage_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    usage, error = usage_error(capsys, "verify", *MINI)
    assert usage.startswith("usage: ds4-mtp verify ")
    assert error == "ds4-mtp verify: error: there is no prompt: give -p TEXT or -p @FILE, or pipe it in"


def test_the_demo_leaves_stdin_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, b"another prompt")
    printed(capsys, "demo", "-n", "4", "-t", "1")
    assert sys.stdin.read() == "another prompt"


def test_chat_is_the_hosts_chat_completion(capsys: pytest.CaptureFixture[str], llama: Callable[..., Llama]) -> None:
    question = "What does `textwrap.dedent` do?"
    found = printed(capsys, "run", *MINI, "-k", "3", "--chat", "-n", "200", "-p", question)
    messages: Any = [{"role": "user", "content": question}]
    answer: Any = llama(BASE).create_chat_completion(messages, temperature=0.0, max_tokens=200)
    choice = answer["choices"][0]
    assert (found["text"], found["finish_reason"]) == (choice["message"]["content"], choice["finish_reason"])
    assert found["timings"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert found["finish_reason"] == "stop" and found["stats"]["accepted"] > 0


def test_chat_with_a_model_that_has_no_template(
    plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str]
) -> None:
    files = plant(vocab=lambda walk: dataclasses.replace(byte_vocab(len(walk)), chat_template=None))
    argv = ["run", "-m", str(files.trunk), "--mtp", str(files.mtp), "-t", "1", "--chat", "-p", "a"]
    assert cli.main(argv) == cli.EXIT_FAILED
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"ds4-mtp run: --chat: {files.trunk} has no chat template; leave --chat out")


@pytest.mark.parametrize(
    ("option", "parameters"),
    [
        ("--top-k 3", {"top_k": 3}),
        ("--top-p 0.5", {"top_p": 0.5}),
        ("--min-p 0.3", {"min_p": 0.3}),
        ("--typical-p 0.3", {"typical_p": 0.3}),
        ("--repeat-penalty 1.5", {"repeat_penalty": 1.5}),
        ("--frequency-penalty 1.0", {"frequency_penalty": 1.0}),
        ("--presence-penalty 2.0", {"presence_penalty": 2.0}),
        ("--mirostat 2", {"mirostat_mode": 2}),
        ("--mirostat 2 --mirostat-ent 1", {"mirostat_mode": 2, "mirostat_tau": 1.0}),
        ("--mirostat 2 --mirostat-lr 0.9", {"mirostat_mode": 2, "mirostat_eta": 0.9}),
        ("-s 8", {"seed": 8}),
        ("--temp 0", {"temp": 0.0}),
    ],
)
def test_a_sampling_option_is_the_hosts_parameter(
    capsys: pytest.CaptureFixture[str], llama: Callable[..., Llama], option: str, parameters: dict[str, Any]
) -> None:
    def plain(seed: int = 7, **sampling: Any) -> list[int]:
        llm = llama(BASE, n_gpu_layers=0)  # where ds4-mtp runs it
        llm.set_seed(seed)
        return list(itertools.islice(llm.generate(llm.tokenize(b"import"), **{"temp": 1.5, **sampling}), 40))

    argv = ["run", *MINI, "-n", "40", "-p", "import", "--temp", "1.5", "-s", "7", *option.split()]
    assert printed(capsys, *argv)["tokens"] == plain(**parameters)
    assert plain(**parameters) != plain()  # the parameter matters here


def test_a_seed_of_its_own_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", *MINI, "-n", "20", "-p", "import", "--temp", "1.5"]
    first, second = (printed(capsys, *argv, "--compare", "-s", "-1") for _ in range(2))
    assert first["same"] and first["seed"] != second["seed"] and first["text"] != second["text"]
    assert printed(capsys, *argv, "-s", str(first["seed"]))["text"] == first["text"]


def test_json_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", *MINI, "-k", "3", "-n", "30", "-p", "import os"]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out.split("\n\nspeculative")[0].removesuffix("\n")
    found = printed(capsys, *argv)
    assert found["text"].removesuffix("\n") == text and len(found["tokens"]) == 30
    assert found["finish_reason"] == "length"
    assert set(found["timings"]) == {"prompt_tokens", "prompt_ms", "generation_ms", "ms_per_token"}
    stats = found["stats"]
    assert stats["accepted"] > 0 and stats["rate"] == stats["accepted"] / stats["proposed"]


def test_json_of_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "demo", "-k", "3", "-n", "30", "-t", "1")
    assert found["same"] is True and found["differs_at"] is None
    assert found["tokens"] == found["plain"]["tokens"] and found["text"] == found["plain"]["text"]
    assert found["stats"]["proposed"] > 0 and "stats" not in found["plain"]


def test_json_of_texts_that_differ(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([[1, 2, 3], [1, 2, 4]])
    monkeypatch.setattr(
        generation, "generate", lambda *_, **__: generation.Generation(next(texts), 1.0, 1.0, MtpStats())
    )
    found = printed(capsys, "demo", status=cli.EXIT_DIFFERS)
    assert (found["same"], found["differs_at"]) == (False, 2)


def test_json_of_verify(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "verify", *MINI, "-k", "3", "-n", "30", "-p", "import os")
    expected = {"n": 30, "diverging": 0, "worst_gap": 0.0, "worst_at": None, "bound": 0.5, "passed": True}
    assert found["replay"] == expected
    assert len(found["tokens"]) == 30 and found["stats"]["proposed"] > 0


def test_the_models_own_context(plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str]) -> None:
    files = plant(config=dataclasses.replace(TINY, n_ctx_train=512))
    argv = ["run", "-m", str(files.trunk), "--mtp", str(files.mtp), "-t", "1", "-p", "a", "-n", "-1", "-c", "0"]
    found = printed(capsys, *argv)
    assert found["timings"]["prompt_tokens"] + len(found["tokens"]) == 512


def test_a_prompt_that_fills_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", *MINI, "-c", "8", "-p", "a b c d e f g h"]) == cli.EXIT_FAILED
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == "ds4-mtp run: the prompt has 9 tokens, the context 8: raise -c"


@pytest.mark.parametrize(
    ("verb", "options", "expected"),
    [
        ("run", "-n x", "expected a whole number, -1 or more, found 'x'"),
        ("run", "-n -2", "-1 or more"),
        ("run", "-k -1", "0 or more"),
        ("run", "-c -1", "0 or more"),
        ("run", "-c 4294967296", "found '4294967296'"),
        ("run", "-t 0", "1 to 512"),
        ("run", "-t 513", "1 to 512"),
        ("run", "-ngl -2", "-1 or more"),
        ("run", "--temp -1", "expected a number, 0 or more, found '-1'"),
        ("run", "--temp nan", "0 or more, found 'nan'"),
        ("run", "--temp inf", "0 or more, found 'inf'"),
        ("demo", "--top-k -1", "0 or more"),
        ("demo", "--top-p 1.5", "0 to 1"),
        ("demo", "--min-p -0.1", "0 to 1"),
        ("demo", "--typical-p x", "0 to 1"),
        ("demo", "--repeat-penalty 0", "greater than 0"),
        ("demo", "--presence-penalty nan", "expected a number, found 'nan'"),
        ("demo", "--mirostat 3", "0 to 2"),
        ("demo", "--seed 4294967296", "-1 to 4294967295"),
        ("verify", "--bound -1", "0 or more"),
        ("verify", "--bound nan", "0 or more"),
        ("verify", "--temp 1", "unrecognized arguments: --temp 1"),
        ("serve", "-k -1", "0 or more"),
        ("demo", "--no-such-option", "unrecognized arguments: --no-such-option"),
        ("install-engine", "file", "unrecognized arguments: file"),
    ],
)
def test_a_bad_option_shows_the_usage_of_its_verb(
    capsys: pytest.CaptureFixture[str], verb: str, options: str, expected: str
) -> None:
    files = MINI if verb in ("run", "verify") else []
    usage, error = usage_error(capsys, verb, *files, *options.split())
    assert usage.startswith(f"usage: ds4-mtp {verb} ")
    assert error.startswith(f"ds4-mtp {verb}: error: ") and expected in error


def test_verify_that_drafts_nothing_has_compared_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = ["verify", *MINI, "-p", "a"]
    assert cli.main([*verify, "-n", "20", "-k", "0"]) == cli.EXIT_FAILED
    out, err = capsys.readouterr()
    assert re.search(r"ds4-mtp verify: nothing was drafted in \d+ tokens, so that nothing was compared\n$", err)
    assert "plain decoding" not in out
    monkeypatch.setenv("DS4_MTP_SPEC_DISABLE", "1")
    settings.current.cache_clear()
    try:
        assert cli.main(verify) == cli.EXIT_FAILED
        out, err = capsys.readouterr()
        assert err.startswith("ds4-mtp verify: DS4_MTP_SPEC_DISABLE is set: nothing is drafted") and out == ""
        assert cli.main(["demo", "-n", "8", "-t", "1"]) == 0
        assert "nothing was drafted: DS4_MTP_SPEC_DISABLE is set" in capsys.readouterr().out
    finally:
        settings.current.cache_clear()


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("demo", {0, 1, 2, 3, 130, 141}),
        ("run", {0, 1, 2, 3, 130, 141}),
        ("bench", {0, 1, 2, 3, 130, 141}),
        ("verify", {0, 1, 2, 3, 130, 141}),
        ("serve", {0, 1, 2, 130, 141, 143}),
        ("doctor", {0, 1, 2, 130, 141}),
        ("install-engine", {0, 1, 2, 130, 141}),
    ],
)
def test_a_verb_lists_its_exit_statuses(capsys: pytest.CaptureFixture[str], verb: str, expected: set[int]) -> None:
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    listed = capsys.readouterr().out.split("exit status:\n")[1]
    assert {int(line.split()[0]) for line in listed.splitlines()} == expected


def module(*argv: str, **options: Any) -> subprocess.Popen[str]:
    """python -m ds4_mtp_plugin, in a process of its own."""
    command = [sys.executable, "-m", "ds4_mtp_plugin", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_bench_of_prompts_that_share_their_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "bench", *MINI, "--prefix", "700", "-r", "1")
    assert list(found["first_token"]) == [
        *("first", "continued", "last answer dropped", "edited at 90 %", "edited at 50 %", "edited at 10 %")
    ]
    assert all(row["plain_ms"] > 0 and row["draft_ms"] > 0 for row in found["first_token"].values())
    assert found["same_text"] and found["exact"] and found["prompt_tokens"] == 700
    assert cli.main(["bench", *MINI, "--prefix", "100", "-r", "1"]) == cli.EXIT_OK
    assert capsys.readouterr().out.endswith("the same answers\n")


def test_without_a_head_drafts_come_from_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["-m", str(BASE), "-n", "60", "-p", 3 * "import os\nimport sys\n", "-k", "4"]
    found = printed(capsys, "run", *base, "--compare")
    assert found["same"] and found["stats"]["ngram_proposed"] == found["stats"]["proposed"] > 0
    assert found["stats"]["draft_decodes"] == 0
    assert cli.main(["run", *base]) == cli.EXIT_OK
    assert "of the text" in capsys.readouterr().out
    found = printed(capsys, "bench", *base, "-r", "1")
    assert list(found["contenders"]) == ["plain", "automatic"]
    assert found["contenders"]["automatic"]["same_text"]
    assert printed(capsys, "verify", *base)["replay"]["passed"]


def test_a_head_in_the_models_file_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = plant_family(tmp_path, "glm4moe")
    base = ["-m", str(files.trunk), "-n", "60", "-p", "PRONOUNCE", "-c", "512"]
    found = printed(capsys, "run", *base, "-k", "2", "--compare")
    assert found["same"] and found["stats"]["draft_decodes"] > 0
    found = printed(capsys, "bench", *base, "-r", "1", "-k", "2")
    assert list(found["contenders"]) == ["plain", "automatic", "1 draft", "2 drafts"]
    assert printed(capsys, "verify", *base)["replay"]["passed"]
    assert cli.main(["doctor", str(files.trunk)]) == cli.EXIT_OK
    assert "its head can be used: MtpDraft()" in capsys.readouterr().out


def test_bench_measures_all_in_turn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = printed(capsys, "bench", *MINI, "-n", "40", "-r", "2", "-k", "2", "-p", "import os")
    assert list(found["contenders"]) == ["plain", "automatic", "1 draft", "2 drafts"]
    assert (found["threads"], found["tokens"], found["rounds"], found["exact"]) == (1, 40, 2, True)
    rows = found["contenders"]
    assert all(row["same_text"] for row in rows.values())
    assert (rows["plain"]["ratio"], rows["plain"]["tokens_per_cycle"]) == (1.0, 1.0)
    assert 1 < rows["1 draft"]["tokens_per_cycle"] < 2 < rows["2 drafts"]["tokens_per_cycle"] < 3
    assert len(found["acceptance"]) == 2 and 0 < found["acceptance"][1] < found["acceptance"][0] < 1
    assert list(found["drafts"]) == ["1", "2"]
    for k, cost in found["drafts"].items():
        row = rows[f"{k} draft{'s' if k == '2' else ''}"]
        of_host = found["host_ms"] / found["single_row_ms"]
        assert 0 < of_host < 0.9
        taken = cost["verify_rows"] + cost["drafts_rows"] + row["tokens_per_cycle"] * of_host
        assert cost["limit"] == pytest.approx(row["tokens_per_cycle"] / taken)
        assert cost["reached"] == pytest.approx(row["ratio"] / cost["limit"])

    # a seed at random is one seed for all
    random = ["--temp", "1.5", "-s", "-1", "-n", "12", "-r", "1", "-k", "1", "-p", "import os"]
    assert all(row["same_text"] for row in printed(capsys, "bench", *MINI, *random)["contenders"].values())
    assert cli.main(["bench", *MINI, "-n", "1", "-p", "import"]) == cli.EXIT_FAILED
    assert "the text ends at its first token" in capsys.readouterr().err

    # a text that differs is said, and is the exit status
    chosen = iter(range(10**6))
    monkeypatch.setattr(Llama, "sample", lambda *args, **kwargs: 300 + next(chosen) % 7)
    assert cli.main(["bench", *MINI, "-n", "12", "-r", "1", "-k", "1", "-p", "import"]) == cli.EXIT_DIFFERS
    assert capsys.readouterr().out.count("OTHER TEXT") >= 1
    assert usage_error(capsys, "bench", *MINI, "-k", "0")[1].endswith("the greatest number of drafts, 1 or more")


def test_python_m_is_the_command() -> None:
    out, _ = (process := module("--version")).communicate(timeout=60)
    assert (process.returncode, out) == (0, f"ds4-mtp {ds4_mtp_plugin.__version__}\n")
    _, err = (process := module("run")).communicate(timeout=60)
    assert process.returncode == cli.EXIT_USAGE and err.startswith("usage: ds4-mtp run ")


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")
def test_an_interrupt_and_a_reader_that_goes_away() -> None:
    endless = ["run", *MINI, "-p", "import", "--temp", "0", "-c", "0", "-n", "100000"]
    for end, status in ((lambda p: p.send_signal(signal.SIGINT), 130), (lambda p: p.stdout.close(), 141)):
        # Where the tests themselves run in a shell's background, SIGINT is ignored, and so would be what they start.
        process = module(*endless, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        assert process.stdout is not None and process.stderr is not None
        try:
            process.stdout.read(1)  # it generates
            end(process)
            assert process.wait(60) == status
            assert "Traceback" not in (said := process.stderr.read()) and "Exception ignored" not in said
        finally:
            process.kill()
            process.communicate()
