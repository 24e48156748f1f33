"""The host's own tests, as the pinned sdist has them: with a draft in every Llama each ends as it does without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.apps import needs

needs("scipy", "huggingface_hub", "fastapi")

# isort: split
from ds4_mtp_plugin import host
from tests.apps.stand_ins import stand_ins
from vendor.fetch import fetch_sdist, read_pin

ROOT = Path(__file__).resolve().parents[2]

Record = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests and the vocabulary that they open, out of the sdist; what they test is the installed package."""
    folder = tmp_path_factory.mktemp("host")
    top = read_pin().filename.removesuffix(".tar.gz")
    with tarfile.open(fetch_sdist(read_pin())) as archive:
        for member in archive:
            path = member.name.removeprefix(f"{top}/")
            if path == "pyproject.toml" or path.startswith("tests/") or path.endswith("/ggml-vocab-llama-spm.gguf"):
                member.name = path
                archive.extract(member, folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def records(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """What came of each test without drafts, with right ones, and with wrong ones."""
    folder = tmp_path_factory.mktemp("models")
    pair, repositories = stand_ins(folder)
    found = {}
    for drafts in ("none", "right", "wrong"):
        settings = {
            "drafts": drafts,
            "trunk": str(pair.trunk),
            "head": str(pair.mtp),
            "repositories": {name: str(path) for name, path in repositories.items()},
            "record": str(folder / f"{drafts}.json"),
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "tests.apps.injected", "-p", "no:cacheprovider", "-q", "-rA"],
            cwd=suite,
            capture_output=True,
            text=True,
            timeout=600,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "LLAMA_CPP_LIB_PATH": str(Path(host.library_path()).parent),
                "DS4_TEST_INJECT": str(folder / "settings.json"),
            },
        )
        print(done.stdout[-6000:], done.stderr[-3000:])
        found[drafts] = json.loads(Path(settings["record"]).read_text())
    return found


def test_every_test_passes(records: dict[str, Record]) -> None:
    for drafts, record in records.items():
        assert len(record) == 26, drafts
        assert {name: each for name, each in record.items() if each["outcome"] != "passed"} == {}, drafts


def test_they_do_draft(records: dict[str, Record]) -> None:
    for drafts in ("right", "wrong"):
        drafting = {name: each for name, each in records[drafts].items() if each["proposed"]}
        assert len(drafting) >= 5, records[drafts]
        proposed, accepted = (sum(each[key] for each in drafting.values()) for key in ("proposed", "accepted"))
        assert accepted < proposed, "no draft was rejected"
        assert (accepted > 0) == (drafts == "right")
