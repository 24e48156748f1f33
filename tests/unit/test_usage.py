"""The messages that USAGE.md explains are those that the package prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from ds4_mtp_plugin.gguf.families import FAMILIES

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "USAGE.md").read_text(encoding="utf-8").partition("## When something is off")[2]
MESSAGES = re.findall(r"^\| `([^`]+)` \|", TABLE, re.MULTILINE)


def strings() -> Iterator[str]:
    """All strings of the package's code; in place of a value that is formatted into one, an ellipsis."""
    for path in (ROOT / "ds4_mtp_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_in_the_code() -> None:
    code = list(strings())
    assert len(MESSAGES) > 8
    for message in MESSAGES:
        kind, _, text = message.replace("MtpDraft: ", "…: ", 1).partition(": ")  # any draft says it of itself
        assert re.fullmatch(r"\w+(Error|Warning|Lost)", kind), message
        # Every piece of it, in this order, in one string.
        pattern = ".*…?.*".join(re.escape(piece.strip()) for piece in text.split("…"))
        assert any(re.search(pattern, string) for string in code), message


def test_the_readme_names_every_family_that_works_and_no_other() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Models")[2].partition("\n## ")[0]
    named = {name.strip("` ") for names in re.findall(r"\((`[^()]+`)\)", table) for name in names.split(",")}
    assert named - {"NgramDraft"} == set(FAMILIES)
