"""A pytest plugin, passed with -p to the host's own tests: an MtpDraft in every Llama, and local models.

The environment variable ``DS4_TEST_INJECT`` names a JSON file: which "drafts" ("none", "right" or "wrong"), the "trunk"
and its "head", a file for each of the "repositories" that the tests download from, and where the "record" is written:
for each test its outcome, its failure's message, and how many drafts were proposed and accepted.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds4_mtp_plugin import MtpDraft

# isort: split
import huggingface_hub
import llama_cpp
import pytest

from tests.apps.wrong import wrong_drafts

SETTINGS = json.loads(Path(os.environ["DS4_TEST_INJECT"]).read_text())

made: list[MtpDraft] = []
record: dict[str, dict[str, Any]] = {}

huggingface_hub.hf_hub_download = lambda repo_id, filename, **_: SETTINGS["repositories"][repo_id]

original = llama_cpp.Llama.__init__


@functools.wraps(original)
def init(self: Any, model_path: str, **options: Any) -> None:
    # A head has to belong to its model: the host's tests of other architectures run as they are.
    mine = model_path == SETTINGS["trunk"] or options.get("vocab_only") or options.get("embedding")
    if mine and SETTINGS["drafts"] != "none":
        options["draft_model"] = MtpDraft(SETTINGS["head"], num_pred_tokens=3)
        made.append(options["draft_model"])
    options.update(n_threads=1, n_threads_batch=1)  # so that the tests of small models do not wait for each other's
    original(self, model_path, **options)


llama_cpp.Llama.__init__ = init


def pytest_configure() -> None:
    if SETTINGS["drafts"] == "wrong":
        wrong_drafts(pytest.MonkeyPatch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    made.clear()
    record[item.nodeid] = {"outcome": "passed", "message": ""}
    result = yield
    stats = [draft.stats for draft in made]
    record[item.nodeid] |= {
        "llamas": len(stats),
        "proposed": sum(each.proposed for each in stats),
        "accepted": sum(each.accepted for each in stats),
    }
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.passed:
        crash = getattr(report.longrepr, "reprcrash", None)
        record[report.nodeid] |= {
            "outcome": report.outcome,
            "message": str(crash.message if crash else report.longrepr),
        }


def pytest_sessionfinish() -> None:
    Path(SETTINGS["record"]).write_text(json.dumps(record, indent=1))
