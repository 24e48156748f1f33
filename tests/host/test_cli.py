"""ds4-mtp, as a user calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from ds4_mtp_plugin import cli
from tests.fixtures.planted import BY_CONTEXT, Planted


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
    from ds4_mtp_plugin.cli import _generation

    files = plant(acceptance=0.5)
    texts = iter([[1, 2, 3], [1, 2, 4]])
    stats = _generation._MtpStats(iters=1, proposed=2, draft_decodes=2, depth=2)
    monkeypatch.setattr(_generation, "generate", lambda *_, **__: _generation.Generation(next(texts), 1.0, 1.0, stats))
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
    from ds4_mtp_plugin.cli import _generation

    files = plant(acceptance=0.5)
    generate = _generation.generate

    def wrong(*args: object, **options: object) -> _generation.Generation:
        good = generate(*args, **options)  # type: ignore[arg-type]
        return dataclasses.replace(good, tokens=[*good.tokens[:20], 300, *good.tokens[21:]])

    monkeypatch.setattr(_generation, "generate", wrong)
    argv = ["verify", "-m", str(files.trunk), "--mtp", str(files.mtp), "-p", "abc", "-n", "40", "-t", "1"]
    assert cli.main(argv) == cli.EXIT_DIFFERS
    out = capsys.readouterr().out
    assert "2 of 40 tokens are not" in out and "logits, at token 2" in out
    assert cli.main([*argv, "--bound", "1e9"]) == 0


def test_a_wrong_file_is_one_line_and_exit_status_1(
    plant: Callable[..., Planted], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "-m", str(plant().trunk), "--mtp", "no-such.gguf", "-p", "a"]) == cli.EXIT_FAILED == 1
    err = capsys.readouterr().err
    assert err.strip() == "ds4-mtp run: MtpDraft: no-such.gguf: no such file; expected an MTP GGUF file"


@pytest.mark.parametrize("argv", [[], ["fly"], ["run"]])
def test_a_wrong_command_line_is_exit_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == cli.EXIT_USAGE == 2
    assert "usage: ds4-mtp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--help"], ["run", "--help"], ["demo", "--help"], ["verify", "--help"], ["--version"]]
)
def test_help_is_there(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 0
    assert "ds4-mtp" in capsys.readouterr().out
