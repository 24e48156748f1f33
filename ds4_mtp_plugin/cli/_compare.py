"""The same text twice, plain and speculative, and a report on the difference."""

from __future__ import annotations

import argparse as _argparse
import sys as _sys
import typing as _t

from .. import MtpDraft as _MtpDraft
from . import EXIT_DIFFERS as _EXIT_DIFFERS
from . import EXIT_OK as _EXIT_OK
from . import _generation
from ._generation import add_arguments

__all__ = ["add_arguments", "compare"]


def compare(model: str, mtp: str, prompt: str, args: _argparse.Namespace, **options: _t.Any) -> int:
    """Generate plainly, then with the head; an exit status."""
    draft = _MtpDraft(mtp, num_pred_tokens=args.num_pred_tokens)  # a wrong path is known before the base is loaded
    print("--- plain ---")
    plain = _generation.generate(model, None, prompt, args, **options)
    print("--- speculative ---")
    drafted = _generation.generate(model, draft, prompt, args, **options)
    print("---")
    same = plain.tokens == drafted.tokens
    n = len(plain.tokens)
    if same:
        print(f"the same {n} tokens")
    else:
        at = next(
            (i for i, (a, b) in enumerate(zip(plain.tokens, drafted.tokens)) if a != b), min(n, len(drafted.tokens))
        )
        print(f"the texts differ from token {at} on (of {n})", file=_sys.stderr)
    _generation.report(plain, drafted)
    return _EXIT_OK if same else _EXIT_DIFFERS
