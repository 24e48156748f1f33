"""What generations say of each other: lines for people, an object for programs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..settings import current
from ..stats import MtpStats
from . import arguments
from .generation import Generation

__all__ = ["as_json", "nothing_drafted", "print_report"]


def print_report(plain: Generation | None, drafted: Generation) -> None:
    """What was measured, to stdout: rates, acceptance, what a row costs, and why there is a gain or none."""
    stats = drafted.stats
    assert stats is not None
    if plain is not None:
        print(f"plain        {1000 / plain.ms_per_token:8.1f} tokens/s")
    print(f"speculative  {1000 / drafted.ms_per_token:8.1f} tokens/s", end="")
    print(f"   {plain.ms_per_token / drafted.ms_per_token:.2f} x" if plain is not None else "")
    if not stats.proposed:
        print(nothing_drafted())
        _hint(drafted)
        return
    positions = "  ".join(f"{i + 1}: {100 * rate:.0f} %" for i, rate in enumerate(stats.rate_per_position))
    per_cycle = 1 + stats.per_iter
    verify, step = stats.verify_ms / stats.iters, stats.draft_ms / max(1, stats.draft_decodes)
    print(f"accepted     {positions or f'{100 * stats.rate:.0f} %'}   ({per_cycle:.2f} tokens per cycle)")
    all_cycles = max(1, stats.iters + stats.plain)
    if stats.depth:
        depths = "  ".join(f"{k}: {100 * n / all_cycles:.0f} %" for k, n in enumerate(stats.cycles_per_depth))
        print(f"drafts       {depths} of the cycles")
    if stats.ngram_iters:
        share = 100 * stats.ngram_iters / all_cycles
        print(f"of the text  {share:.0f} % of the cycles, {stats.ngram_accepted} of {stats.ngram_proposed} accepted")
    rows = 1 + stats.proposed / stats.iters
    print(f"cost         verify of {rows:.1f} rows {verify:.2f} ms", end="")
    if stats.draft_decodes:
        print(f", step of the head {step:.2f} ms", end="")
    if plain is None:
        print()
        _hint(drafted)
        return
    print(f", single trunk row {plain.ms_per_token:.2f} ms")
    gain = plain.ms_per_token / drafted.ms_per_token
    print(
        f"A token takes {drafted.ms_per_token:.2f} ms in place of {plain.ms_per_token:.2f}: "
        f"speculation is {'faster' if gain > 1 else 'slower'} here."
    )
    if gain <= 1:
        print("Large models, bound by memory, gain where a small one does not. 'ds4-mtp bench' measures it with care.")
    _hint(drafted)


def _hint(drafted: Generation) -> None:
    """By the host's default a single row has half of the cores; a verify, as a prompt, has all."""
    cores = arguments.cores()
    if drafted.threads_by_default and drafted.threads < cores:
        print(f"A single row had {drafted.threads} of {cores} threads, the host's default: -t {cores} may be faster.")


def nothing_drafted() -> str:
    """Why a generation has no drafts."""
    if current().disable:
        return "nothing was drafted: DS4_MTP_SPEC_DISABLE is set"
    return "nothing was drafted"


def as_json(drafted: Generation, **more: Any) -> str:
    """A generation with a head as one JSON object; `more` are members behind those that every verb gives."""
    assert drafted.stats is not None
    return json.dumps({**plain_members(drafted), "stats": _statistics(drafted.stats), **more})


def plain_members(generation: Generation) -> dict[str, Any]:
    """What every generation gives, for JSON."""
    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": "stop" if generation.ended else "length",
        "timings": {
            "prompt_tokens": len(generation.prompt),
            "prompt_ms": 1000 * generation.prompt_seconds,
            "generation_ms": 1000 * generation.seconds,
            "ms_per_token": generation.ms_per_token,
        },
    }


def _statistics(stats: MtpStats) -> dict[str, Any]:
    derived = {name: getattr(stats, name) for name in ("rate", "per_iter", "rate_per_position")}
    return {**dataclasses.asdict(stats), **derived}
