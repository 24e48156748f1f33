"""vendor/fetch.py: what it takes for the engine's source, and what it leaves when it cannot have it."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from vendor import declarations
from vendor import fetch as vendor
from vendor.fetch import FetchError, Pin, fetch

ENGINE = "engine_sdist-1.0/vendor/llama.cpp/"
FILES = {f"{name}/file": name.encode() for name in vendor.WANTED_DIRS}
FILES.update({name: b"text" for name in vendor.WANTED_FILES})


def make_sdist(path: Path, members: dict[str, bytes], prefix: str = ENGINE) -> Pin:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return Pin("engine-sdist", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "0" * 40, "MIT")


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "given.tar.gz"
    monkeypatch.setenv(vendor.SDIST_VARIABLE, str(path))
    return path


def test_unpacks_what_the_build_needs_and_no_more(sdist: Path, tmp_path: Path) -> None:
    unwanted = {"models/vocab.gguf": b"no", "README.md": b"no", "tools/cli/cli.cpp": b"no"}
    pin = make_sdist(sdist, {**FILES, **unwanted})
    found = tree(fetch(tmp_path / "src", pin=pin))
    assert found.pop(vendor.STAMP).decode().startswith(pin.sha256)
    assert found == FILES


def test_a_member_cannot_leave_the_folder(sdist: Path, tmp_path: Path) -> None:
    pin = make_sdist(sdist, {**FILES, "src/../../../../outside": b"no"})
    fetch(tmp_path / "a" / "b" / "src", pin=pin)
    assert not list(tmp_path.rglob("outside"))


def test_another_hash_is_refused_and_nothing_is_left(sdist: Path, tmp_path: Path) -> None:
    pin = make_sdist(sdist, FILES)
    with pytest.raises(FetchError, match=f"(?s)not the pinned source.*{'0' * 64}.*{vendor.SDIST_VARIABLE}"):
        fetch(tmp_path / "src", pin=replace(pin, sha256="0" * 64))
    assert sorted(path.name for path in tmp_path.iterdir()) == [sdist.name]


def test_half_a_download_is_refused(sdist: Path, tmp_path: Path) -> None:
    pin = make_sdist(sdist, FILES)
    sdist.write_bytes(sdist.read_bytes()[:-20])
    with pytest.raises(FetchError, match="not the pinned source"):
        fetch(tmp_path / "src", pin=pin)
    assert not (tmp_path / "src").exists()


def test_a_pinned_file_that_is_no_archive_leaves_nothing(sdist: Path, tmp_path: Path) -> None:
    sdist.write_bytes(b"not a tar file")
    pin = Pin("engine-sdist", "1.0", hashlib.sha256(b"not a tar file").hexdigest(), "0" * 40, "MIT")
    with pytest.raises(FetchError, match="cannot be unpacked"):
        fetch(tmp_path / "src", pin=pin)
    assert sorted(path.name for path in tmp_path.iterdir()) == [sdist.name]


def test_an_sdist_without_the_engine_is_refused(sdist: Path, tmp_path: Path) -> None:
    pin = make_sdist(sdist, {name: content for name, content in FILES.items() if not name.startswith("src/")})
    with pytest.raises(FetchError, match="has no src in engine_sdist-1.0/vendor/llama.cpp"):
        fetch(tmp_path / "src", pin=pin)
    assert sorted(path.name for path in tmp_path.iterdir()) == [sdist.name]


def test_a_whole_tree_is_used_again(sdist: Path, tmp_path: Path) -> None:
    pin = make_sdist(sdist, FILES)
    fetch(tmp_path / "src", pin=pin)
    sdist.unlink()
    assert fetch(tmp_path / "src", pin=pin) == tmp_path / "src"


def test_a_tree_without_its_stamp_is_unpacked_anew(sdist: Path, tmp_path: Path) -> None:
    pin = make_sdist(sdist, FILES)
    half = tmp_path / "src" / "ggml"
    half.mkdir(parents=True)
    (half / "left-over").write_bytes(b"half a file")
    fetch(tmp_path / "src", pin=pin)
    assert set(tree(tmp_path / "src")) == {*FILES, vendor.STAMP}


def test_a_tree_of_another_pin_is_replaced(sdist: Path, tmp_path: Path) -> None:
    fetch(tmp_path / "src", pin=make_sdist(sdist, {**FILES, "src/gone": b"old"}))
    pin = make_sdist(sdist, {**FILES, "src/file": b"new"})
    fetch(tmp_path / "src", pin=pin)
    assert (tmp_path / "src" / "src" / "file").read_bytes() == b"new"
    assert not (tmp_path / "src" / "src" / "gone").exists()


def test_a_tree_of_another_part_is_replaced(sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = make_sdist(sdist, {**FILES, "tools/cli/file": b"wanted later"})
    fetch(tmp_path / "src", pin=pin)
    monkeypatch.setattr(vendor, "WANTED_DIRS", (*vendor.WANTED_DIRS, "tools/cli"))
    fetch(tmp_path / "src", pin=pin)
    assert (tmp_path / "src" / "tools" / "cli" / "file").read_bytes() == b"wanted later"


def test_a_missing_given_file_is_named(sdist: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"given\.tar\.gz, and no file is there"):
        fetch(tmp_path / "src")


def test_a_full_disk_says_how_much_is_needed(sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = make_sdist(sdist, FILES)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(FetchError, match="No space left.*200 MB"):
        fetch(tmp_path / "src", pin=pin)
    assert sorted(path.name for path in tmp_path.iterdir()) == [sdist.name]


class TestDownload:
    """With pip and a folder in the place of the index, so that no network is asked."""

    @pytest.fixture
    def index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "index"
        folder.mkdir()
        monkeypatch.delenv(vendor.SDIST_VARIABLE, raising=False)
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        return folder

    def put(self, index: Path) -> Pin:
        """An sdist that pip can ask for its metadata without any build backend but its own."""
        backend = (
            "import os\n"
            "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
            "    os.makedirs(os.path.join(folder, 'engine_sdist-1.0.dist-info'))\n"
            "    with open(os.path.join(folder, 'engine_sdist-1.0.dist-info', 'METADATA'), 'w') as file:\n"
            "        file.write('Metadata-Version: 2.1\\nName: engine-sdist\\nVersion: 1.0\\n')\n"
            "    return 'engine_sdist-1.0.dist-info'\n"
        )
        project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        members = {f"vendor/llama.cpp/{name}": content for name, content in FILES.items()}
        members.update({"backend.py": backend.encode(), "pyproject.toml": project.encode()})
        return make_sdist(index / "engine_sdist-1.0.tar.gz", members, prefix="engine_sdist-1.0/")

    def test_keeps_the_sdist_for_the_next_time(self, index: Path, tmp_path: Path) -> None:
        pin = self.put(index)
        fetch(tmp_path / "src", pin=pin, cache=tmp_path / "cache")
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [pin.filename]
        (index / pin.filename).unlink()
        again = fetch(tmp_path / "again", pin=pin, cache=tmp_path / "cache")
        assert set(tree(again)) == {*FILES, vendor.STAMP}

    def test_a_damaged_file_in_the_cache_is_downloaded_anew(self, index: Path, tmp_path: Path) -> None:
        pin = self.put(index)
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / pin.filename).write_bytes(b"half")
        fetch(tmp_path / "src", pin=pin, cache=tmp_path / "cache")
        assert hashlib.sha256((tmp_path / "cache" / pin.filename).read_bytes()).hexdigest() == pin.sha256

    def test_another_file_on_the_index_is_refused_before_it_runs(self, index: Path, tmp_path: Path) -> None:
        pin = self.put(index)
        with pytest.raises(FetchError, match=f"(?s)could not download.*{vendor.SDIST_VARIABLE}=") as error:
            fetch(tmp_path / "src", pin=replace(pin, sha256="0" * 64), cache=tmp_path / "cache")
        assert "DO NOT MATCH THE HASHES" in str(error.value)
        assert "metadata" not in str(error.value)
        assert not list((tmp_path / "cache").iterdir())

    def test_no_network_says_what_to_do(self, index: Path, tmp_path: Path) -> None:
        pin = Pin("engine-sdist", "1.0", "0" * 64, "0" * 40, "MIT")
        remedy = f"download engine_sdist-1.0.tar.gz by other means.*{vendor.SDIST_VARIABLE}"
        with pytest.raises(FetchError, match=remedy):
            fetch(tmp_path / "src", pin=pin, cache=tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())


def test_the_command_fails_with_the_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(vendor.SDIST_VARIABLE, str(tmp_path / "missing"))
    assert vendor.main(["--dest", str(tmp_path / "src")]) == 1
    assert "no file is there: mend or unset it" in capsys.readouterr().err


def test_a_path_from_elsewhere_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip builds in a folder of its own, so that the file beside which it was called is not found by its name alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(vendor.SDIST_VARIABLE, "missing.tar.gz")
    with pytest.raises(FetchError, match=f"nor in {re.escape(str(tmp_path))}, .* give its whole path"):
        fetch(tmp_path / "src")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_pin_is_the_toml_that_it_looks_like() -> None:
    import tomllib

    values = tomllib.loads((vendor.HERE / "engine.toml").read_text(encoding="utf-8"))
    pin = vendor.read_pin()
    assert {name: values[name] for name in Pin.__dataclass_fields__} == vars(pin)
    assert (len(pin.sha256), len(pin.commit)) == (64, 40)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_host_that_we_depend_on_is_the_pinned_one() -> None:
    import tomllib

    project = tomllib.loads((vendor.HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pin = vendor.read_pin()
    assert f"{pin.name}=={pin.version}" in project["dependencies"]


def test_the_declarations_are_compiled() -> None:
    """A declaration that was added, and not compiled, would be missed where it is called."""
    found = (declarations.ENGINE / f"{declarations.MODULE}.py").read_text(encoding="utf-8")
    assert found == declarations.compiled(), "run python -m vendor.declarations"
