"""patches/: the applier takes a diff that fits exactly and no other, and the series keeps its rules."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from patches import apply as patches
from patches.apply import PatchError, apply, edit, parse, read_series

ENGINE = patches.HERE.parent / "vendor" / "src"

BEFORE = b"".join(b"line %d\n" % number for number in range(1, 21))
AFTER = BEFORE.replace(b"line 10\n", b"line ten\nand a half\n")
DIFF = b"""\
What:     a change
Why:      a reason
Tested:   a test
Upstream: None.

diff --git a/src/a.cpp b/src/a.cpp
index 1111111..2222222 100644
--- a/src/a.cpp
+++ b/src/a.cpp
@@ -8,5 +8,6 @@ int function()
 line 8
 line 9
-line 10
+line ten
+and a half
 line 11
 line 12
"""


def patched(content: bytes, diff: bytes) -> bytes:
    [(path, hunks)] = parse(diff)
    assert path == "src/a.cpp"
    return edit(content, hunks)


class TestEdit:
    def test_at_the_stated_line(self) -> None:
        assert patched(BEFORE, DIFF) == AFTER

    def test_elsewhere_if_there_is_one_such_place(self) -> None:
        assert patched(b"new\n" * 3 + BEFORE, DIFF) == b"new\n" * 3 + AFTER

    def test_not_if_there_are_two_and_neither_is_the_stated_one(self) -> None:
        with pytest.raises(PatchError, match="not at line 8, and 2 places have its lines"):
            patched(b"new\n" + BEFORE + BEFORE, DIFF)

    def test_the_stated_line_decides_between_two(self) -> None:
        old, new = (text[text.index(b"line 8\n") : text.index(b"line 13\n")] for text in (BEFORE, AFTER))
        assert patched(old + b"one\ntwo\n" + old, DIFF) == old + b"one\ntwo\n" + new

    @pytest.mark.parametrize("line", [b"line 8\n", b"line 9\n", b"line 10\n", b"line 11\n", b"line 12\n"])
    def test_no_fuzz_anywhere(self, line: bytes) -> None:
        with pytest.raises(PatchError, match="no place has its lines"):
            patched(BEFORE.replace(line, line[:-1] + b" \n"), DIFF)

    def test_later_hunks_move_with_the_earlier_ones(self) -> None:
        diff = DIFF + b"@@ -15,3 +16,2 @@\n line 15\n-line 16\n line 17\n"
        twice = BEFORE + BEFORE[BEFORE.index(b"line 13") :]  # the second hunk fits at two places
        assert patched(b"new\n" + twice, diff) == b"new\n" + (AFTER + twice[len(BEFORE) :]).replace(
            b"line 16\n", b"", 1
        )

    def test_hunks_keep_their_order(self) -> None:
        diff = DIFF + b"@@ -15,3 +16,2 @@\n line 1\n-line 2\n line 3\n"
        with pytest.raises(PatchError, match="@@ -15,3.*no place"):
            patched(BEFORE, diff)

    def test_a_last_line_without_its_end(self) -> None:
        bare = b"\\ No newline at end of file\n"
        hunk = b"@@ -1,2 +1,2 @@\n one\n-two\n" + bare + b"+three\n" + bare
        diff = DIFF[: DIFF.index(b"@@")] + hunk
        assert patched(b"one\ntwo", diff) == b"one\nthree"
        with pytest.raises(PatchError, match="no place"):
            patched(b"one\ntwo\n", diff)


class TestParse:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (b"@@ -8,5 +8,6", b"@@ -8,6 +8,7", "more lines than follow"),
            (b"@@ -8,5 +8,6", b"@@ -8,4 +8,5", "fewer lines than follow"),
            (b"@@ -8,5 +8,6", b"@@ -8,5 +8,5", "does not count"),
            (b"index 1111111", b"new file mode 100644\nindex 1111111", "only edits"),
            (b"--- a/src/a.cpp", b"--- /dev/null", "not a/PATH"),
            (b"+++ b/src/a.cpp", b"+++ b/src/b.cpp", "only edits"),
            (b"/src/a.cpp", b"/../a.cpp", "in the engine's tree"),
            (DIFF[DIFF.index(b"@@") :], b"", "without a hunk"),
            (DIFF[DIFF.index(b"@@") :], b"@@ -8,1 +8,1 @@\n-line 8\n+line eight\n", "no context"),
        ],
    )
    def test_refuses(self, old: bytes, new: bytes, message: str) -> None:
        with pytest.raises(PatchError, match=message):
            list(parse(DIFF.replace(old, new)))

    def test_skips_what_git_adds_around(self) -> None:
        mail = b"From 1234\n---\n a.cpp | 3 +-\n\n" + DIFF + b"-- \n2.39.5\n\n"
        assert list(parse(mail)) == list(parse(DIFF))


class TestApply:
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Path:
        engine = tmp_path / "engine"
        (engine / "src").mkdir(parents=True)
        (engine / "src" / "a.cpp").write_bytes(BEFORE)
        (engine / "src" / "b.cpp").write_bytes(b"b\n")
        return engine

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "patches"
        (folder / "src").mkdir(parents=True)
        (folder / "series").write_text("# comment\n0001-a.patch\n", encoding="utf-8")
        (folder / "0001-a.patch").write_bytes(DIFF)
        (folder / "src" / "new.cpp").write_bytes(b"new\n")
        return folder

    def test_makes_a_tree_of_its_own(self, engine: Path, folder: Path, tmp_path: Path) -> None:
        dest = tmp_path / "dest"
        patchset = apply(engine, dest, folder)
        assert (dest / "src" / "a.cpp").read_bytes() == AFTER
        assert (dest / "src" / "b.cpp").read_bytes() == b"b\n"
        assert (dest / "src" / "new.cpp").read_bytes() == b"new\n"
        assert f'#define DS4_MTP_PATCHSET "{patchset}"' in (dest / patches.VERSION_HEADER).read_text("ascii")
        assert (engine / "src" / "a.cpp").read_bytes() == BEFORE

    def test_writes_only_what_differs(self, engine: Path, folder: Path, tmp_path: Path) -> None:
        dest = tmp_path / "dest"
        apply(engine, dest, folder)
        for path in (dest / "src").iterdir():
            os.utime(path, (1, 1))
        (dest / "src" / "b.cpp").write_bytes(b"edited by hand\n")
        (dest / "src" / "stray.cpp").write_bytes(b"")
        (folder / "src" / "new.cpp").write_bytes(b"newer\n")
        apply(engine, dest, folder)
        written = {path.name for path in (dest / "src").iterdir() if path.stat().st_mtime != 1}
        assert written == {"b.cpp", "new.cpp", "ds4-mtp-version.h"}
        assert not (dest / "src" / "stray.cpp").exists()
        assert (dest / "src" / "b.cpp").read_bytes() == b"b\n"

    def test_a_dropped_diff_leaves_no_trace(self, engine: Path, folder: Path, tmp_path: Path) -> None:
        dest = tmp_path / "dest"
        first = apply(engine, dest, folder)
        (folder / "series").write_text("", encoding="utf-8")
        (folder / "0001-a.patch").unlink()
        (folder / "src" / "new.cpp").unlink()
        assert apply(engine, dest, folder) != first
        assert (dest / "src" / "a.cpp").read_bytes() == BEFORE
        assert not (dest / "src" / "new.cpp").exists()

    def test_diffs_build_on_each_other(self, engine: Path, folder: Path, tmp_path: Path) -> None:
        second = DIFF.replace(b"-line 10\n+line ten\n+and a half\n", b"-line ten\n-and a half\n+line 10\n")
        (folder / "0002-b.patch").write_bytes(second.replace(b"@@ -8,5 +8,6", b"@@ -8,6 +8,5"))
        (folder / "series").write_text("0001-a.patch\n0002-b.patch\n", encoding="utf-8")
        forwards = apply(engine, tmp_path / "dest", folder)
        assert (tmp_path / "dest" / "src" / "a.cpp").read_bytes() == BEFORE
        (folder / "series").write_text("0002-b.patch\n0001-a.patch\n", encoding="utf-8")
        assert read_series(folder).patchset != forwards
        with pytest.raises(PatchError, match=r"^0002-b\.patch: src/a\.cpp: @@ -8,6 \+8,5 @@ .*no place"):
            apply(engine, tmp_path / "dest", folder)

    def test_a_failure_changes_nothing(self, engine: Path, folder: Path, tmp_path: Path) -> None:
        apply(engine, tmp_path / "dest", folder)
        (engine / "src" / "b.cpp").write_bytes(b"changed\n")
        (engine / "src" / "a.cpp").write_bytes(b"changed\n")
        with pytest.raises(PatchError):
            apply(engine, tmp_path / "dest", folder)
        assert (tmp_path / "dest" / "src" / "b.cpp").read_bytes() == b"b\n"

    def test_a_diff_of_a_missing_file(self, engine: Path, folder: Path, tmp_path: Path) -> None:
        (engine / "src" / "a.cpp").unlink()
        with pytest.raises(PatchError, match=r"0001-a\.patch: src/a\.cpp: the engine has no such file"):
            apply(engine, tmp_path / "dest", folder)

    def test_a_new_file_cannot_hide_the_engines(self, engine: Path, folder: Path, tmp_path: Path) -> None:
        (folder / "src" / "b.cpp").write_bytes(b"mine\n")
        with pytest.raises(PatchError, match=r"src/b\.cpp: the engine has this file"):
            apply(engine, tmp_path / "dest", folder)

    def test_a_listed_diff_has_to_be_there(self, folder: Path) -> None:
        (folder / "0001-a.patch").unlink()
        with pytest.raises(PatchError, match=r"lists 0001-a\.patch, which is not there"):
            read_series(folder)

    def test_a_diff_has_to_be_listed(self, folder: Path) -> None:
        (folder / "0002-b.patch").write_bytes(DIFF)
        with pytest.raises(PatchError, match=r"does not list 0002-b\.patch"):
            read_series(folder)


class TestSeries:
    """The real one."""

    def test_is_all_that_the_folder_holds(self) -> None:
        listed = {name for name, _ in read_series().diffs}
        tools = {"README.md", "apply.py", "series", ".gitattributes"}
        assert {path.name for path in patches.HERE.iterdir() if path.is_file()} == listed | tools

    @pytest.mark.parametrize(("name", "diff"), read_series().diffs, ids=lambda value: str(value)[:40])
    def test_diffs_say_what_they_are(self, name: str, diff: bytes) -> None:
        assert name[:4].isdigit() and name[4] == "-" and name.endswith(".patch")
        header = diff[: diff.index(b"\ndiff --git ")].decode()
        for key in ("What", "Why", "Backends", "Tested", "Upstream"):
            assert re.search(rf"^{key}: +\S", header, re.MULTILINE), f"{name} has no {key}: line"
        assert b"\r" not in diff

    @pytest.mark.skipif(not ENGINE.is_dir(), reason="needs the engine's source: python vendor/fetch.py")
    def test_applies_to_the_pinned_engine(self, tmp_path: Path) -> None:
        files = patches.changed_files(ENGINE, read_series())
        assert patches.VERSION_HEADER in files
        hooked = files.get("src/CMakeLists.txt", b"").decode()
        for source in read_series().sources:
            if source.startswith("src/") and source.endswith(".cpp"):
                assert Path(source).name in hooked, f"{source} is compiled by nobody"
