"""ds4-mtp install-engine, on a copy of the host: what it places works, and --undo leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

import ds4_mtp_plugin.host as plugin_host
from ds4_mtp_plugin import engine
from ds4_mtp_plugin.cli.install_engine import install, undo

LIBRARIES = Path(plugin_host.library_path()).parent
COMMAND = "import sys; sys.argv[0] = 'ds4-mtp'; from ds4_mtp_plugin.cli import main; sys.exit(main())"


def python(host: Path, code: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where ``llama_cpp`` is the copy in `host`."""
    variables = {key: value for key, value in os.environ.items() if key not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    variables["PYTHONPATH"] = os.pathsep.join([str(host.parent), os.getcwd()])
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**variables, **env})


def snapshot(folder: Path) -> dict[str, tuple[bytes | str, int, float]]:
    """Everything below: content or target, mode, time of change."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[path.relative_to(folder).as_posix()] = (content, state.st_mode, state.st_mtime)
    return found


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A copy of the host's Python, without libraries."""
    copy = tmp_path / "site" / "llama_cpp"
    shutil.copytree(Path(llama_cpp.__file__).parent, copy, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return copy


@pytest.fixture
def lib(host: Path) -> Path:
    """A folder of libraries of the host's own: of no use, for they are never loaded here."""
    lib = host / "lib"
    (lib / "empty").mkdir(parents=True)
    (lib / "libllama.so").write_bytes(b"the host's own")
    (lib / "libggml-cuda.so").write_bytes(b"another")
    (lib / "libllama.so").chmod(0o755)
    os.utime(lib / "libllama.so", (1, 1))
    if os.name == "posix":
        (lib / "libllama.so.0").symlink_to("libllama.so")
    return lib


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Libraries to place, of no use either."""
    folder = tmp_path / "engine"
    (folder / "licenses").mkdir(parents=True)
    (folder / "libllama.so").write_bytes(b"ours")
    (folder / "licenses" / "LICENSE").write_text("MIT")
    return folder


def test_a_host_that_is_imported_first_runs_on_the_engine(host: Path) -> None:
    first = "import llama_cpp, ds4_mtp_plugin.host as h; print(h.library_path())"
    before = snapshot(host)
    assert python(host, first).returncode == 1
    # Another's library path may not decide what is placed, unless there are no libraries of the package's own.
    env = {"LLAMA_CPP_LIB_PATH": str(LIBRARIES)}
    done = python(host, COMMAND, "install-engine", **env)
    assert done.returncode == 0, done.stderr
    assert f"now runs on the engine of ds4_mtp_plugin, in {host / 'lib'}" in done.stdout

    done = python(host, first)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == host / "lib"
    done = python(host, COMMAND, "doctor")
    assert (done.returncode, "all well" in done.stdout) == (0, True), done.stdout + done.stderr
    assert f"placed a copy in {host / 'lib'}" in done.stdout

    again = python(host, COMMAND, "install-engine", **env)
    assert (again.returncode, "already" in again.stdout) == (0, True), again.stderr
    done = python(host, COMMAND, "install-engine", "--undo")
    assert done.returncode == 0, done.stderr
    assert snapshot_without_caches(host) == before


def test_an_engine_of_another_build_is_refused(host: Path) -> None:
    """The package was installed anew since; what it placed in the host was not."""
    if not any(engine.LIBRARY_DIR.glob("*llama.*")):
        pytest.skip("the package has no libraries of its own here")
    install(host, engine.LIBRARY_DIR)
    code = "import llama_cpp; from ds4_mtp_plugin import MtpDraft"
    assert python(host, code).returncode == 0
    placed = host / "lib" / Path(plugin_host.library_path()).name
    with placed.open("ab") as file:
        file.write(b"of another build")
    done = python(host, code)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: llama_cpp runs on {placed}, an engine of ds4_mtp_plugin of another build")
    assert "'ds4-mtp install-engine' again" in message
    first = "from ds4_mtp_plugin import MtpDraft; from ds4_mtp_plugin import host; print(host.library_path())"
    assert python(host, first).stdout == f"{engine.LIBRARY_DIR / placed.name}\n"


def snapshot_without_caches(folder: Path) -> dict[str, tuple[bytes | str, int, float]]:
    return {name: what for name, what in snapshot(folder).items() if "__pycache__" not in name}


def test_undo_restores_every_byte(host: Path, lib: Path, small: Path) -> None:
    before = snapshot(host)
    install(host, small)
    assert {p.name for p in lib.iterdir()} == {"libllama.so", "licenses"}
    assert (lib / "libllama.so").read_bytes() == b"ours"
    assert "is as it was before" in undo(host)
    assert snapshot(host) == before


def test_undo_without_a_folder_before_leaves_none(host: Path, small: Path) -> None:
    before = snapshot(host)
    install(host, small)
    undo(host)
    assert snapshot(host) == before
    assert not (host / "lib").exists()


def test_undo_with_nothing_to_undo(host: Path, lib: Path) -> None:
    before = snapshot(host)
    assert "nothing to undo" in undo(host)
    assert snapshot(host) == before


def test_a_newer_engine_replaces_ours_and_keeps_the_hosts(host: Path, lib: Path, small: Path) -> None:
    before = snapshot(host)
    install(host, small)
    assert "already" in install(host, small)
    (small / "libllama.so").write_bytes(b"ours, newer")
    install(host, small)
    assert (lib / "libllama.so").read_bytes() == b"ours, newer"
    undo(host)
    assert snapshot(host) == before


@pytest.mark.parametrize("what", ["changed", "added", "removed", "reinstalled"])
def test_files_changed_since_are_not_touched(host: Path, lib: Path, small: Path, what: str) -> None:
    install(host, small)
    if what == "changed":
        (lib / "libllama.so").write_bytes(b"whose?")
    elif what == "added":
        (lib / "libextra.so").write_bytes(b"whose?")
    elif what == "removed":
        (lib / "libllama.so").unlink()
    else:
        shutil.rmtree(lib)
        lib.mkdir()
        (lib / "libllama.so").write_bytes(b"another version's")
    before = snapshot(host)
    name = "libextra" if what == "added" else "libllama"
    for call in (partial(install, host, small), partial(undo, host)):
        with pytest.raises(RuntimeError, match=f"was changed since the engine was placed there .*{name}"):
            call()
        assert snapshot(host) == before


def test_a_kept_copy_that_was_changed_is_not_put_back(host: Path, lib: Path, small: Path) -> None:
    install(host, small)
    (host / "lib.ds4-mtp" / "lib" / "libllama.so").write_bytes(b"whose?")
    before = snapshot(host)
    for call in (partial(install, host, small), partial(undo, host)):
        with pytest.raises(RuntimeError, match="was changed since it was kept"):
            call()
        assert snapshot(host) == before


@pytest.mark.parametrize("lib_too", [False, True])
def test_without_the_kept_copy_nothing_is_touched(host: Path, lib: Path, small: Path, lib_too: bool) -> None:
    install(host, small)
    shutil.rmtree(host / "lib.ds4-mtp" / "lib")
    if lib_too:
        shutil.rmtree(lib)
    before = snapshot(host)
    for call in (partial(install, host, small), partial(undo, host)):
        with pytest.raises(RuntimeError, match="which held what was there before, is gone"):
            call()
        assert snapshot(host) == before


def test_the_same_host_installed_again_is_the_original(host: Path, lib: Path, small: Path) -> None:
    before = snapshot(host)
    for act in (partial(undo, host), partial(install, host, small)):
        install(host, small)
        shutil.rmtree(lib)
        shutil.copytree(host / "lib.ds4-mtp" / "lib", lib, symlinks=True)
        act()
    assert (lib / "libllama.so").read_bytes() == b"ours"
    undo(host)
    assert snapshot(host) == before


@pytest.mark.parametrize("manifest", [None, "", "{}", "1"])
def test_a_folder_that_is_not_ours_is_not_touched(host: Path, lib: Path, small: Path, manifest: str | None) -> None:
    (host / "lib.ds4-mtp" / "lib").mkdir(parents=True)
    if manifest is not None:
        (host / "lib.ds4-mtp" / "manifest.json").write_text(manifest)
    before = snapshot(host)
    for call in (partial(install, host, small), partial(undo, host)):
        with pytest.raises(RuntimeError, match="holds no manifest"):
            call()
        assert snapshot(host) == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("with_lib", [True, False])
@pytest.mark.parametrize("act", ["install", "undo"])
def test_wherever_it_is_killed_undo_and_install_go_on(
    host: Path, lib: Path, small: Path, monkeypatch: pytest.MonkeyPatch, act: str, with_lib: bool
) -> None:
    """Death before each change of the file system, one after the other; nothing of ours runs behind it."""
    if not with_lib:
        shutil.rmtree(lib)
    before = snapshot(host)
    left = 0
    dead = False

    def mortal(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left, dead
            if dead or left == 0:
                dead = True
                raise Killed
            left -= 1
            return function(*args, **kwargs)

        return call

    for n in range(100):
        if act == "undo":
            install(host, small)
        left, dead = n, False
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "mkdir"), (Path, "rmdir"), (Path, "unlink")):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            for name in ("copytree", "rmtree"):
                patch.setattr(shutil, name, mortal(getattr(shutil, name)))
            try:
                install(host, small) if act == "install" else undo(host)
                finished = True
            except Killed:
                finished = False
        for left_over in host.glob("lib.ds4-mtp.*"):
            shutil.rmtree(left_over)
        if n % 2:
            install(host, small)
            assert (lib / "libllama.so").read_bytes() == b"ours"
        undo(host)
        assert snapshot(host) == before, n
        if finished:
            assert n >= 3
            return
    raise AssertionError("it never finished")


def test_a_failure_while_copying_leaves_everything(
    host: Path, lib: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(host)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space left"):
        install(host, small)
    assert snapshot(host) == before


def test_an_engine_that_changes_while_it_is_copied(
    host: Path, lib: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(host)
    copytree = shutil.copytree

    def torn(*args: Any, **options: Any) -> None:
        copytree(*args, **options)
        if Path(args[1]).name == "new":
            (args[1] / "libllama.so").write_bytes(b"half")

    monkeypatch.setattr(shutil, "copytree", torn)
    with pytest.raises(RuntimeError, match="changed while it was copied"):
        install(host, small)
    assert snapshot(host) == before


def test_the_hosts_own_folder_is_no_engine_to_place(host: Path, lib: Path) -> None:
    before = snapshot(host)
    with pytest.raises(RuntimeError, match="nothing to place"):
        install(host, lib)
    assert snapshot(host) == before


def test_what_is_not_our_engine_is_not_placed(host: Path, tmp_path: Path) -> None:
    if any(engine.LIBRARY_DIR.glob("*llama.*")):
        pytest.skip("the package has libraries of its own, so that LLAMA_CPP_LIB_PATH does not decide")
    (tmp_path / "libllama.so").write_bytes(b"not a library")
    done = python(host, COMMAND, "install-engine", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert (done.returncode, done.stderr.startswith("ds4-mtp install-engine: cannot open the engine")) == (1, True)
    assert not (host / "lib").exists()


def test_another_version_of_the_host_is_left_alone(host: Path) -> None:
    done = python(
        host,
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '0.3.16' if name == 'llama-cpp-python' else real(name)\n" + COMMAND,
        "install-engine",
        LLAMA_CPP_LIB_PATH=str(LIBRARIES),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "ds4-mtp install-engine: llama-cpp-python 0.3.16 is installed; the engine is one of 0.3.36: pip install "
    )
    assert not (host / "lib").exists()


def test_the_manifest_names_what_was_and_what_is(host: Path, lib: Path, small: Path) -> None:
    install(host, small)
    manifest = json.loads((host / "lib.ds4-mtp" / "manifest.json").read_text())
    assert set(manifest["original"]) >= {"libllama.so", "libggml-cuda.so"}
    assert set(manifest["installed"]) == {"libllama.so", "licenses/LICENSE"}
