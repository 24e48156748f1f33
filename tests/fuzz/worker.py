"""Runs mutants in a process that may die of them: seeds in on stdin, one line of JSON a seed out.

The engine's log and last words go to stderr, which the parent keeps in a file.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # whose threads' stacks are address space

import ds4_mtp_plugin  # noqa: F401

# isort: split
import llama_cpp
import numpy as np
from llama_cpp import Llama
from llama_cpp._logger import set_verbose

from ds4_mtp_plugin import MtpDraft
from tests.fuzz.mutants import Rng, mutated
from tests.text import generate

PROMPT = [300, 301, 302, 303]
N_TOKENS = 24

#: Address space that a worker may take, in bytes, and how much it may have taken at most behind a good file.
LIMIT, BOUND = 6 << 30, 1 << 30


class NotFiniteError(Exception):
    """The model's own weights make it compute NaN: what it says then is chance, with a draft or without."""


def text(base: Path, head: Path | None) -> list[int]:
    draft = None if head is None else MtpDraft(head, num_pred_tokens=3)
    llm = Llama(str(base), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, draft_model=draft)
    if head is None:
        sample = llm.sample

        def checked(*args: Any, **kwargs: Any) -> int:
            if not np.isfinite(llama_cpp.llama_get_logits_ith(llm.ctx, -1)[: llm.n_vocab()]).all():
                raise NotFiniteError
            return int(sample(*args, **kwargs))

        llm.sample = checked
    try:
        return generate(llm, PROMPT, N_TOKENS)
    finally:
        llm.close()


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def mutate(seed: int, base: Path, head: Path, folder: Path) -> tuple[Path, Path, str]:
    """Mostly the head; sometimes both in the same way, so that they still fit together, or the model alone."""
    rng = Rng(seed)
    which = rng.choices(("head", "both", "model"), (75, 15, 10))[0]
    what = ""
    paths = []
    for path, changed in ((base, which != "head"), (head, which != "model")):
        if changed:
            data, what = mutated(seed, path)
            path = folder / path.name
            path.write_bytes(data)
        paths.append(path)
    return paths[0], paths[1], f"{which}: {what}"


def run(seed: int, base: Path, head: Path, folder: Path, plain: list[int], *, drafted: bool) -> dict[str, Any]:
    base_, head_, what = mutate(seed, base, head, folder)
    result = {"seed": seed, "what": what, "said": "", "rss": 0}
    if not drafted:
        return {**result, "outcome": outcome(base_, None)[0]}
    found, said = outcome(base_, head_)
    named = any(str(path) in str(said) for path in (base_, head_))
    # Another model has a text of its own, or an error of the host's own.
    anew = base_ != base and (found == "text" or not named)
    expected = outcome(base_, None) if anew else ("text", plain)
    if found == "text" and expected[0] == "not finite":
        found = "not finite"
    elif found == "text":
        found, said = ("text", "") if ("text", said) == expected else ("wrong text", f"{said} for {expected}")
    elif found == "refused" and not named and (found, said) != expected:
        found = "no file named"
    if status("VmPeak") > BOUND:
        found = "memory"
    return {**result, "outcome": found, "said": str(said), "rss": status("VmRSS")}


def outcome(base: Path, head: Path | None) -> tuple[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # drafts that fail are told of, and the text goes on
            return "text", text(base, head)
    except (ValueError, FileNotFoundError) as err:
        return "refused", str(err)
    except NotFiniteError:
        return "not finite", ""
    except MemoryError as err:
        return "memory", repr(err)
    except Exception as err:
        return "another exception", repr(err)


def main() -> None:
    base, head, folder = map(Path, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    set_verbose(False)
    # Lines of our own go out by a descriptor that no library prints to.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plain = text(base, None)
    assert text(base, head) == plain
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seed, drafted = json.loads(line)
        os.ftruncate(2, 0)
        print(json.dumps(run(seed, base, head, folder, plain, drafted=drafted)), file=out, flush=True)


if __name__ == "__main__":
    main()
