"""The training text of ds4-mini: the standard library of the running Python, as files and as questions about them.

Every machine that can train the model has this text already, under a licence that allows the use (PSF-2.0): the
``*.py`` files of the ``Lib`` folder, the language reference inside ``pydoc_data/topics.py``, and the docstrings of the
built-in types. Left out: tests (four times the rest, and not what a reader asks about), installed packages, code page
tables (``encodings/cp*.py`` and the like: numbers, not language), and generated grammar pickles.

Two kinds of documents come out of it:

* **files**: one document per file, headed by a comment with its path;
* **chats**: questions whose answer stands in the text ("What does `textwrap.dedent` do?" is answered by its docstring,
  "Show the source of ..." by its source), in DeepSeek's chat format, non-thinking form
  ``<bos>[system]<｜User｜>question<｜Assistant｜></think>answer<eos>``.

The order is deterministic for one Python version: files sorted by path, one seeded shuffle. The split is by file: a
held-out file gives held-out documents of both kinds.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import random
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
SPECIALS = (BOS, EOS, PAD, USER, ASSISTANT)  # control tokens: never shown, matched only when asked for
TAGS = (THINK, END_THINK)  # shown, and matched in any text, as in DeepSeek's own tokenizer

SYSTEM = "You are a helpful assistant who knows the Python standard library."

# Our own words for DeepSeek-V4's chat format, without tools: those would be noise to a model of this size.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages if message.role == 'system' -%}{{- message.content -}}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{- '" + USER + "' + message.content -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- '" + ASSISTANT + END_THINK + "' + (message.content or '') + '" + EOS + "' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + END_THINK + "' -}}{%- endif -%}"
)

_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "__pycache__", "idle_test", "lib-dynload", "ensurepip"}
_SKIPPED_FILES = {"pydoc_data/topics.py", "stringprep.py", "html/entities.py"}
_LONGEST_ANSWER = 4000  # characters; about two training sequences
_C_MODULES = ("math", "itertools", "time", "cmath", "operator", "gc", "zlib", "select", "unicodedata", "errno")


@dataclass(frozen=True)
class Document:
    """One training document: its text without BOS and EOS, and the file that it came from."""

    source: str
    kind: str  # "file" or "chat"
    text: str


def is_held_out(source: str, share: float = 0.02) -> bool:
    """Whether a source file belongs to the held-out part: by a checksum of its path, so that no list is needed."""
    return zlib.crc32(source.encode()) % 10_000 < share * 10_000


def chat(question: str, answer: str, system: str = "") -> str:
    """One question and answer as the chat template would render them, without the leading BOS and the last EOS."""
    return f"{system}{USER}{question}{ASSISTANT}{END_THINK}{answer}"


def library() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _wanted(relative: Path) -> bool:
    if _SKIPPED_FOLDERS & set(relative.parts) or relative.as_posix() in _SKIPPED_FILES:
        return False
    if relative.parts[0].startswith("config-") or relative.name.startswith("_sysconfigdata"):
        return False
    # A code page table is nothing but a list of characters.
    return relative.parts[0] != "encodings" or relative.stem in {"__init__", "aliases", "idna", "punycode", "utf_8"}


def _files() -> Iterator[tuple[str, str]]:
    root = library()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not _wanted(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = "\n".join(line.rstrip() for line in text.expandtabs(8).splitlines()).strip() + "\n"
        if len(text) > 40:
            yield relative.as_posix(), text


def _module_name(source: str) -> str:
    return source[: -len(".py")].replace("/", ".").removesuffix(".__init__")


def _first_sentence(doc: str) -> str:
    paragraph = " ".join(doc.split("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]


def _fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def _described(name: str, what: str, doc: str, rng: random.Random) -> str:
    question = rng.choice(
        (
            f"What does `{name}` do?",
            f"What is `{name}`?",
            f"Explain `{name}`.",
            f"What is the {what} `{name}` for?",
            f"Describe the {what} `{name}`.",
        )
    )
    return chat(question, doc, SYSTEM if rng.random() < 0.3 else "")


_Def = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for node in tree.body:
        if isinstance(node, _Def):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for child in node.body:
                    if isinstance(child, _Def):
                        yield f"{node.name}.{child.name}", child


def _chats(source: str, text: str, rng: random.Random) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError:  # lib2to3 carries files that are wrong on purpose
        return
    module = _module_name(source)
    lines = text.splitlines()
    about = ast.get_docstring(tree)
    if about and len(about) < _LONGEST_ANSWER:
        yield _described(module, "module", about, rng)
        if rng.random() < 0.5:
            yield chat(f"Describe the module `{module}` in one sentence.", _first_sentence(about))
    names = [name for name, node in _definitions(tree) if "." not in name and not name.startswith("_")]
    if 2 <= len(names) <= 40:
        yield chat(f"What does the module `{module}` define?", "\n".join(f"- `{name}`" for name in names))
    for name, node in _definitions(tree):
        what = "class" if isinstance(node, ast.ClassDef) else "method" if "." in name else "function"
        full = f"{module}.{name}"
        doc = ast.get_docstring(node)
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if doc and len(doc) > 20 and len(doc) < _LONGEST_ANSWER:
            yield _described(full, what, doc, rng)
        if what == "class" or not 60 < len(code) < _LONGEST_ANSWER / 2 or code.count("\n") < 2:
            continue
        kind = rng.random()
        if kind < 0.35:
            yield chat(f"Show the source of `{full}`.", _fenced(code))
        elif kind < 0.6:
            head = lines[node.lineno - 1 : node.body[0].lineno - 1] or [lines[node.lineno - 1]]
            begin = textwrap.dedent("\n".join(head))
            yield chat(f"Complete this {what} of the module `{module}`:\n{_fenced(begin)}", _fenced(code))
        elif doc and kind < 0.85:
            yield chat(f"Write the {what} `{node.name}`: {_first_sentence(doc)}", _fenced(code))
        elif doc:
            yield chat(f"What does this {what} do?\n{_fenced(code)}", _first_sentence(doc))


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield name, topics.topics[name].strip() + "\n"


def _builtin_docs() -> Iterator[tuple[str, str]]:
    for name in sorted(vars(builtins)):
        thing = getattr(builtins, name)
        if name.startswith("_") or not callable(thing):
            continue
        if doc := inspect.getdoc(thing):
            yield name, doc
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            for method in sorted(vars(thing)):
                if not method.startswith("_") and (doc := inspect.getdoc(getattr(thing, method))):
                    yield f"{name}.{method}", doc
    for module in _C_MODULES:
        try:
            loaded = importlib.import_module(module)
        except ImportError:  # not every build has every one
            continue
        for name, thing in sorted(vars(loaded).items()):
            if not name.startswith("_") and callable(thing) and (doc := inspect.getdoc(thing)):
                yield f"{module}.{name}", doc


def documents(seed: int = 0) -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents, each shuffled by ``seed``."""
    found: list[Document] = []
    for source, text in _files():
        rng = random.Random(f"{seed}:{source}")
        found.append(Document(source, "file", f"# Lib/{source}\n\n{text}"))
        found += (Document(source, "chat", sample) for sample in _chats(source, text, rng))
    for name, text in _topics():
        source = f"topics/{name}"
        found.append(Document(source, "file", text))
        if len(text) < 2 * _LONGEST_ANSWER:
            found.append(Document(source, "chat", chat(f"What does the Python manual say about `{name}`?", text)))
    rng = random.Random(f"{seed}:builtins")
    for name, doc in _builtin_docs():
        if len(doc) < _LONGEST_ANSWER:
            what = "method" if "." in name else "builtin"
            found.append(Document(f"builtins/{name}", "chat", _described(name, what, doc, rng)))
    random.Random(seed).shuffle(found)
    held_out = [document for document in found if is_held_out(document.source)]
    return [document for document in found if not is_held_out(document.source)], held_out


if __name__ == "__main__":
    for part, docs in zip(("train", "held out"), documents()):
        for kind in ("file", "chat"):
            texts = [document.text for document in docs if document.kind == kind]
            print(f"{part:9} {kind}: {len(texts):6} documents, {sum(map(len, texts)) / 1e6:.2f} million characters")
