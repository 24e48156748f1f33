"""ds4-mtp doctor: what is installed, what files are, and help where nothing else of the package works."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp import Llama

import ds4_mtp_plugin
from ds4_mtp_plugin import cli
from ds4_mtp_plugin import host as plugin_host
from ds4_mtp_plugin.cli import doctor
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from ds4_mtp_plugin.engine import Context, Library, Memory
from ds4_mtp_plugin.engine.cpu import cpu
from ds4_mtp_plugin.gguf import read_header, same_tensors
from ds4_mtp_plugin.host.library import current
from tests.fixtures import GPU_LAYERS
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import SMALL, TINY, Planted

Plant = Callable[..., Planted]

COMMAND = "import sys; sys.argv[0] = 'ds4-mtp'; from ds4_mtp_plugin.cli import main; sys.exit(main())"
NO_HOST = """
import sys, importlib.abc
class No(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == {name!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, No())
"""


def ds4_mtp(*argv: str, before: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-c", before + COMMAND, *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_what_is_installed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = {line[:18].strip(): line[19:] for line in out.splitlines()}
    library = Library(plugin_host.library_path())
    assert lines["python"].startswith("{}.{}.{}".format(*sys.version_info))
    assert lines["ds4-mtp-plugin"].startswith(ds4_mtp_plugin.__version__)
    for name in ("llama-cpp-python", "cffi", "numpy"):
        assert lines[name].split()[0] == importlib.metadata.version(name)
    assert lines["engine"] == library.path
    assert (lines["patch set"], lines["llama.cpp"]) == (library.patchset, library.version)
    assert "CPU" in lines["system"]
    assert (lines["cpu"], lines["compiler"]) == (str(cpu()), library.compiler)
    assert lines["decoding"].startswith("works")
    assert lines["libmtmd"]
    assert out.endswith("all well\n")


def test_a_library_for_images_is_found(tmp_path: Path) -> None:
    assert f"libmtmd            not in {tmp_path}" in ds4_mtp("doctor", MTMD_CPP_LIB=str(tmp_path)).stdout
    (tmp_path / "libmtmd.so").touch()
    assert f"libmtmd            {tmp_path / 'libmtmd.so'}" in ds4_mtp("doctor", MTMD_CPP_LIB=str(tmp_path)).stdout


def test_the_environment_is_said_and_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DS4_MTP_SPEC_DISABLE", "1")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "DS4_MTP_SPEC_DISABLE 1" in out and "speculation is off" in out
    monkeypatch.setenv("DS4_MTP_MIN_MARGIN", "wide")
    assert cli.main(["doctor"]) == 1
    assert "wrong: DS4_MTP_MIN_MARGIN is 'wide'" in capsys.readouterr().out


@pytest.mark.parametrize("order", [1, -1])
def test_a_model_and_its_head_are_told_in_any_order(
    plant: Plant, capsys: pytest.CaptureFixture[str], order: int
) -> None:
    files = plant()
    assert cli.main(["doctor", *[str(files.trunk), str(files.mtp)][::order]]) == 0
    out = capsys.readouterr().out
    assert f"{files.trunk}: a model of architecture deepseek4\n  4 layers\n  512 tokens in the vocabulary" in out
    assert f"{files.mtp}: an MTP head of architecture deepseek4\n  on top of 4 layers" in out
    assert "4 attention heads of 32" in out and "128 rows in the sliding window" in out and "mostly F32, " in out
    assert f"{files.mtp} belongs to {files.trunk}\n  about " in out and out.endswith(" for the head\n\nall well\n")


def test_one_file_alone_may_be_either(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (plant().trunk, plant().mtp):
        assert cli.main(["doctor", str(path)]) == 0
        assert "belongs" not in capsys.readouterr().out


def test_files_that_do_not_fit_are_wrong(plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, other = plant(), plant(config=SMALL)
    page = tmp_path / "page.gguf"
    page.write_text("<html>")
    dspark, qwen = tmp_path / "dspark.gguf", tmp_path / "qwen.gguf"
    for path, architecture, name in (
        (dspark, "dflash", "markov_w1.weight"),
        (qwen, "qwen3", "blk.0.attn_norm.weight"),
    ):
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_tensor(name, np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for argv, why in (
        ([files.trunk, other.mtp], f"wrong: {other.mtp} does not belong to {files.trunk}: vocabulary 2048"),
        ([other.mtp, files.trunk], f"wrong: {other.mtp} does not belong to {files.trunk}: vocabulary 2048"),
        ([files.trunk, files.trunk], "wrong: of these files none is an MTP head"),
        ([files.mtp, files.mtp], "wrong: of these files none is a model"),
        ([page], f"wrong: {page} is a web page"),
        ([files.mtp, page], f"wrong: {page} is a web page"),
        ([dspark], f"wrong: {dspark} is a DSpark or DFlash head"),
        ([files.trunk, dspark], f"wrong: {dspark} is a DSpark or DFlash head"),
        ([qwen], f"wrong: {qwen} is of architecture 'qwen3'"),
        ([tmp_path / "none.gguf"], f"wrong: {tmp_path / 'none.gguf'}: no such file"),
    ):
        assert cli.main(["doctor", *map(str, argv)]) == 1, argv
        out = capsys.readouterr().out
        assert out.count("wrong: ") == 1 and why in out and "all well" not in out


def test_it_helps_without_a_library(tmp_path: Path, plant: Plant) -> None:
    done = ds4_mtp("doctor", str(plant().mtp), LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert f"engine             no libllama in {tmp_path}" in done.stdout
    assert "an MTP head of architecture deepseek4" in done.stdout
    assert f"wrong: llama_cpp could not load its library from {tmp_path}" in done.stdout


def test_it_helps_with_another_engine(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_bytes(b"not a library")
    done = ds4_mtp("doctor", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert f"engine             {tmp_path / 'libllama.so'}" in done.stdout
    assert f"wrong: cannot open the engine {tmp_path / 'libllama.so'}" in done.stdout


def test_a_gpu_backend_that_cannot_be_loaded_is_wrong(tmp_path: Path) -> None:
    folder = Path(plugin_host.library_path()).parent
    if (folder / "libggml-cuda.so").exists():
        pytest.skip("here is a real one")
    for library in folder.glob("lib*.so"):
        shutil.copy(library, tmp_path)
    (tmp_path / "libggml-cuda.so").write_bytes(b"not a library")
    done = ds4_mtp("doctor", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    [finding] = [line for line in done.stdout.splitlines() if line.startswith("wrong: ")]
    assert finding.startswith(f"wrong: {tmp_path} is for NVIDIA GPUs, and {tmp_path / 'libggml-cuda.so'}: ")
    assert finding.endswith("pip install 'ds4-mtp-plugin[cuda]', or take the CPU wheel")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama_cpp", "wrong: ds4_mtp_plugin needs llama-cpp-python 0.3.36: pip install"),
        ("_cffi_backend", "wrong: ds4_mtp_plugin needs cffi, whose _cffi_backend is missing: pip install cffi"),
        ("numpy", "wrong: No module named numpy"),
    ],
)
def test_it_helps_where_a_package_is_missing(name: str, message: str) -> None:
    done = ds4_mtp("doctor", before=NO_HOST.format(name=name))
    assert done.returncode == 1, done.stderr
    assert message in done.stdout and "all well" not in done.stdout


def test_it_helps_with_another_version_of_the_host() -> None:
    done = ds4_mtp(
        "doctor",
        before="import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '0.3.16' if name == 'llama-cpp-python' else real(name)\n",
    )
    assert done.returncode == 1, done.stderr
    assert "wrong: llama-cpp-python 0.3.16 is installed" in done.stdout
    assert f"engine             {plugin_host.library_path()}" in done.stdout


def test_other_verbs_say_it_in_a_line(tmp_path: Path) -> None:
    done = ds4_mtp("demo", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("ds4-mtp: llama_cpp could not load its library") and "ds4-mtp doctor" in second


def test_what_does_not_work_says_why_where_it_is_used(tmp_path: Path) -> None:
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)}
    for argv0 in ("app.py", "", "ds4-mtp-app"):
        code = f"import sys; sys.argv[0] = {argv0!r}; import ds4_mtp_plugin; print(0); ds4_mtp_plugin.MtpDraft"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout) == (1, "0\n"), argv0
        assert done.stderr.splitlines()[-1].startswith("ImportError: llama_cpp could not load its library")


def test_an_engine_that_crashes_is_said(tmp_path: Path) -> None:
    """Here a child that the doctor starts is ended by the signal that a CPU gives for an instruction it has not."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'ds4_mtp_plugin.cli.decode_check' in sys.orig_argv:\n"
        "    from ds4_mtp_plugin import engine\n"
        "    engine.Context.decode = lambda *_: os.kill(os.getpid(), signal.SIGILL)\n"
    )
    library = Library(plugin_host.library_path())
    done = ds4_mtp("doctor", PYTHONPATH=os.pathsep.join([str(tmp_path), os.getcwd()]))
    assert done.returncode == 1
    assert "decoding           crashes (SIGILL)" in done.stdout
    finding = next(line for line in done.stdout.splitlines() if line.startswith("wrong: "))
    for part in ("crashed with SIGILL", cpu().name, library.compiler, "-DGGML_NATIVE=OFF"):
        assert part in finding


def test_an_engine_that_fails_is_said(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'ds4_mtp_plugin.cli.decode_check' in sys.orig_argv:\n"
        "    from ds4_mtp_plugin import engine\n"
        "    def decode(*_): raise engine.DecodeError('injected', -3)\n"
        "    engine.Context.decode = decode\n"
    )
    done = ds4_mtp("doctor", PYTHONPATH=os.pathsep.join([str(tmp_path), os.getcwd()]))
    assert done.returncode == 1
    assert "wrong: the engine cannot decode the small model here: " in done.stdout and "returned -3" in done.stdout


def test_every_pair_of_several_files_is_checked(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    small, tiny = plant(config=SMALL), plant(config=TINY)
    assert cli.main(["doctor", str(small.mtp), str(tiny.trunk), str(small.trunk), str(tiny.mtp)]) == 0
    out = capsys.readouterr().out
    assert f"{small.mtp} belongs to {small.trunk}" in out and f"{tiny.mtp} belongs to {tiny.trunk}" in out
    assert cli.main(["doctor", str(small.mtp), str(tiny.trunk), str(tiny.mtp)]) == 1
    out = capsys.readouterr().out
    assert f"{tiny.mtp} belongs to {tiny.trunk}" in out
    assert f"wrong: {small.mtp} does not belong to {tiny.trunk}" in out


TAKEN = """
import sys
import ds4_mtp_plugin
from llama_cpp import Llama
def most(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = most()
draft = ds4_mtp_plugin.MtpDraft(sys.argv[2]) if sys.argv[2:] else None
llm = Llama(sys.argv[1], n_ctx=4096, draft_model=draft, verbose=False)
for i, _ in enumerate(llm.generate([300 + i % 200 for i in range(600)], temp=0)):
    if i == 40: break
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists() or GPU_LAYERS != 0, reason="reads what a process has in RAM")
@pytest.mark.parametrize("files", [[BASE], [BASE, HEAD]], ids=["model", "model and head"])
def test_memory_is_what_a_process_takes(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *map(str, files)]) == 0
    (said,) = re.findall(r"about ([\d.]+) MB for a Llama with a context of 4,096", capsys.readouterr().out)
    done = subprocess.run([sys.executable, "-c", TAKEN, *map(str, files)], capture_output=True, text=True, check=True)
    # Of buffers that are made for the longest text a short one touches a part; states at checkpoints come on top.
    taken = int(done.stdout.splitlines()[-1]) / 1e6
    assert 0.6 * float(said) < taken < 1.2 * float(said) + 30, (taken, said)


@pytest.mark.parametrize("n_ctx", [512, 2048])
def test_memory_is_what_the_engine_allocates(plant: Plant, llama: Callable[..., Llama], n_ctx: int) -> None:
    files = plant(config=SMALL, quant="Q8_0")
    done = doctor._child("memory_check", str(n_ctx), str(files.trunk), str(files.mtp))
    planned = [Memory(**each) for each in json.loads(done.stdout)]
    # Of a file that is mapped the engine counts all between the first and the last weight that stay there, and those
    # that it copies into a layout for AMX in their new place too.
    llm = llama(files.trunk, n_ctx=n_ctx, use_mmap=False, draft_model=ds4_mtp_plugin.MtpDraft(files.mtp))
    of_model = Context(current(), llm._ctx.ctx, owned=False).memory
    assert planned[0] == of_model and len(planned) == 2
    header = read_header(files.mtp)
    shared = same_tensors(header, read_header(files.trunk), ("token_embd.weight", "output.weight"))
    own = sum(place.n_bytes for name, place in header.places.items() if name not in shared)
    assert len(shared) == 2 and planned[1].weights >= own > 0.9 * planned[1].weights


def test_a_head_in_the_models_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = plant_family(tmp_path, "qwen35")
    assert cli.main(["doctor", str(family.trunk), "-c", "1024"]) == 0
    out = capsys.readouterr().out
    block = sum(t.n_bytes for t in gguf.GGUFReader(family.trunk).tensors if t.name.startswith("blk.4."))
    assert f"1 MTP head in it, {block / 1e6:.1f} MB of that\n" in out and block > 1e5
    assert re.search(r"about [\d.]+ MB for a Llama with a context of 1,024 tokens: .*; [\d.]+ for the head\n", out)
    beside = plant_family(tmp_path, "qwen35", beside=True)
    assert cli.main(["doctor", str(beside.trunk)]) == 0
    out = capsys.readouterr().out
    assert "no MTP head in it" in out and "for the head" not in out
    # The engine ends with an error where the header gives no reason to.
    lacking = plant_family(tmp_path, "qwen35", seed=1, without="attn_q")
    assert cli.main(["doctor", str(lacking.trunk)]) == 0
    assert "what it takes in memory is not known: the engine does not take it here (" in capsys.readouterr().out


def test_a_context_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "-c", "0"])
    assert caught.value.code == 2 and "-c 0: expected a whole number, 1 or more" in capsys.readouterr().err
