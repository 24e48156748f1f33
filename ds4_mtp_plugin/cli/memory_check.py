"""What a Llama takes with a head, for `ds4-mtp doctor`: ``python -m ds4_mtp_plugin.cli.memory_check N BASE [HEAD]``.

The Llama, of a context of N tokens, is made as an app makes it, of models that the engine is told not to allocate
(llama.h, ``no_alloc``): it reads their headers, plans caches and graphs, and says what they would take. A process of
its own, because files may end it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import llama_cpp.llama_cpp as api
from llama_cpp import Llama

from .. import engine, gguf
from ..draft import MtpDraft
from ..host.library import current

__all__ = ["main", "memory"]


def memory(n_ctx: int, base: str, head: str | None) -> list[engine.Memory]:
    """Of the model's context, and behind it of its head's, which may be in the model's own file.

    Raises:
        EngineError, ValueError: the engine does not take the files.
    """
    contexts: list[engine.Context] = []
    new_context, default_params = engine.Model.new_context, api.llama_model_default_params

    def recorded(model: engine.Model, **params: Any) -> engine.Context:
        contexts.append(new_context(model, **params))
        return contexts[-1]

    def unallocated() -> Any:
        params = default_params()
        params.no_alloc = True
        return params

    engine.Model.new_context = recorded  # type: ignore[method-assign,assignment]
    api.llama_model_default_params = unallocated
    inside = head is None and gguf.read_model(base).kind == gguf.TRUNK_AND_HEAD
    draft = MtpDraft(head) if head or inside else None
    # What is not allocated cannot be mapped.
    llama = Llama(base, n_ctx=n_ctx, use_mmap=False, draft_model=draft, verbose=False)
    of_model = engine.Context(current(), llama._ctx.ctx, owned=False)
    found = [context.memory for context in (of_model, *contexts)]
    llama.close()
    return found


def main() -> None:
    """Print a JSON list with an object for each context."""
    n_ctx, base, head = (*sys.argv[1:], None)[:3]
    assert n_ctx is not None and base is not None
    print(json.dumps([dataclasses.asdict(each) for each in memory(int(n_ctx), base, head)]))


if __name__ == "__main__":
    main()
