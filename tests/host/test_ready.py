"""One libllama in the process, the patched one, or an ImportError that says how to get there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine

LIBRARIES = Path(host.library_path()).parent


def python(code: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process; env: variables to set, or with None to unset."""
    variables = {**os.environ, "LLAMA_CPP_LIB_PATH": str(LIBRARIES), **env}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={key: value for key, value in variables.items() if value is not None},
    )


@pytest.fixture
def unpatched(tmp_path: Path) -> Path:
    """A folder with libraries that lack our probe: copies with the probe's name overwritten."""
    for library in LIBRARIES.iterdir():
        if library.suffix in (".so", ".dylib") or ".so." in library.name:
            target = tmp_path / library.name
            shutil.copy(library, target)
            if "llama" in library.name:
                data = target.read_bytes()
                assert b"\0ds4_mtp_abi\0" in data
                target.write_bytes(data.replace(b"\0ds4_mtp_abi\0", b"\0xxx_mtp_abi\0"))
    return tmp_path


def test_plugin_first_shares_the_hosts_library() -> None:
    done = python(
        "import ds4_mtp_plugin, llama_cpp\n"
        "from ds4_mtp_plugin import host\n"
        "libs = {l.split()[-1] for l in open('/proc/self/maps') if 'libllama.' in l}\n"
        "print(len(libs), host.library_path())"
        if sys.platform == "linux"
        else "import ds4_mtp_plugin; from ds4_mtp_plugin import host; print(1, host.library_path())"
    )
    assert done.returncode == 0, done.stderr
    count, path = done.stdout.split()
    assert (count, Path(path).parent) == ("1", LIBRARIES)


def test_a_host_on_our_library_may_come_first() -> None:
    done = python("import llama_cpp, ds4_mtp_plugin; print(ds4_mtp_plugin.MtpDraft)")
    assert done.returncode == 0, done.stderr


def test_a_host_on_another_engine_is_refused_with_the_cure(unpatched: Path) -> None:
    done = python("import llama_cpp; from ds4_mtp_plugin import MtpDraft", LLAMA_CPP_LIB_PATH=str(unpatched))
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError:")
    assert str(unpatched) in message and "import ds4_mtp_plugin before llama_cpp" in message


def test_a_library_path_without_a_library_is_named(tmp_path: Path) -> None:
    done = python("from ds4_mtp_plugin import MtpDraft", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError:") and str(tmp_path) in message and "Unset LLAMA_CPP_LIB_PATH" in message


def test_another_host_version_is_refused() -> None:
    done = python(
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '0.3.16' if name == 'llama-cpp-python' else real(name)\n"
        "from ds4_mtp_plugin import MtpDraft"
    )
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "llama-cpp-python 0.3.16 is installed" in message and "llama-cpp-python==0.3.36" in message


def test_a_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = host.library_path()
    found = engine.ABI
    monkeypatch.setattr(engine.library, "ABI", found + 1)
    with pytest.raises(ImportError, match=f"{path} has version {found} .* expects {found + 1}: .*install-engine"):
        engine.Library(path)


def test_no_host_is_an_importerror_with_the_command() -> None:
    done = python("import sys; sys.modules['llama_cpp'] = None\nfrom ds4_mtp_plugin import MtpDraft")
    assert done.returncode == 1
    done = python(
        "import sys, importlib.abc\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'llama_cpp': raise ModuleNotFoundError('No module named llama_cpp', name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "from ds4_mtp_plugin import MtpDraft"
    )
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError:") and "-C wheel.cmake=false" in message


def test_importing_twice_wraps_once() -> None:
    done = python(
        "import ds4_mtp_plugin, llama_cpp\n"
        "before = llama_cpp.Llama.eval\n"
        "from ds4_mtp_plugin import host; host.ready()\n"
        "assert llama_cpp.Llama.eval is before\n"
    )
    assert done.returncode == 0, done.stderr
