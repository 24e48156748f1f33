"""Contenders for the same text, timed in turn.

Timings of one run after the other compare the machine's moods. Here every round runs each contender once, in an order
that turns, and what is reported are ratios within a round: their median and their spread (least and greatest).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from ds4_mtp_plugin import MtpDraft, NgramDraft
from ds4_mtp_plugin.cli.prefix import ask


@dataclasses.dataclass
class Contender:
    """A way to generate; `error` is set where it did not survive, and it takes no further part.

    Attributes:
        stamps: of each run when its tokens came, in seconds behind the first.
    """

    name: str
    options: Callable[[], dict[str, Any]]
    llm: Llama | None = None
    error: str | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    text: list[int] = dataclasses.field(default_factory=list)
    stamps: list[list[float]] = dataclasses.field(default_factory=list)

    def load(self, trunk: Path, **options: Any) -> None:
        self.llm = Llama(str(trunk), verbose=False, **{**options, **self.options()})

    def run(self, prompt: Sequence[int], n: int, temperature: float = 0.0) -> None:
        """n tokens behind the prompt: adds the time to the first to `first`, and that from there to the last to
        `seconds`."""
        assert self.llm is not None
        self.llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
        self.llm.set_seed(1)
        self.text, at = [], []
        start = time.perf_counter()
        for token in self.llm.generate(prompt, temp=temperature):
            at.append(time.perf_counter())
            self.text.append(token)
            if len(self.text) == n:
                break
        self.first.append(at[0] - start)
        self.seconds.append(at[-1] - at[0])
        self.stamps.append([t - at[0] for t in at])

    def continues(self, prompt: Sequence[int], n: int) -> tuple[float, list[int]]:
        """The host goes on from what it holds: seconds to the first token, and n greedy tokens."""
        assert self.llm is not None
        return ask(self.llm, prompt, n)

    def stats(self) -> dict[str, Any]:
        """What speculation did, nothing without it."""
        assert self.llm is not None
        stats = getattr(self.llm.draft_model, "stats", None)
        if stats is None:
            return {}
        return {
            "accepted": [round(rate, 3) for rate in stats.rate_per_position],
            "tokens_per_cycle": 1 + stats.per_iter,
            "verify_ms": stats.verify_ms / max(1, stats.iters),
            "step_ms": stats.draft_ms / max(1, stats.draft_decodes),
            "of_the_text": stats.ngram_accepted,
        }

    def close(self) -> None:
        if self.llm is not None:
            self.llm.close()


def contenders(mtp: Path | None, depths: Sequence[int] = (1, 2, 3)) -> list[Contender]:
    """Plain decoding, the head at the depth that it chooses and at fixed ones, and the host's stock draft model.

    `mtp`: None for a head in the model's file.
    """
    return [
        Contender("plain", dict),
        Contender("automatic", lambda: {"draft_model": MtpDraft(mtp)}),
        *(
            Contender(f"mtp k={k}", lambda k=k: {"draft_model": MtpDraft(mtp, num_pred_tokens=k)})  # type: ignore[misc]
            for k in depths
        ),
        Contender("n-grams alone", lambda: {"draft_model": NgramDraft()}),
        Contender("prompt lookup", lambda: {"draft_model": LlamaPromptLookupDecoding(), "logits_all": True}),
    ]


class Contest:
    """Rounds of all contenders on one model and prompt; the first decodes plainly, and the others are held to it."""

    def __init__(
        self,
        trunk: Path,
        field: Sequence[Contender],
        prompt: str | Sequence[int],
        n: int,
        *,
        temperature: float = 0.0,
        **options: Any,
    ) -> None:
        self.field, self._n, self._temperature = list(field), n, temperature
        for each in self.field:
            each.load(trunk, **options)
        if isinstance(prompt, str):
            assert self.field[0].llm is not None
            prompt = self.field[0].llm.tokenize(prompt.encode())
        self.prompt = list(prompt)
        self._turn = 0

    def round(self) -> None:
        """Each contender once: seconds from the first token to the last, the prompt apart."""
        order = self.field[self._turn :] + self.field[: self._turn]
        self._turn = (self._turn + 1) % len(self.field)
        for each in order:
            if each.error is None:
                try:
                    each.run(self.prompt, self._n, self._temperature)
                except RuntimeError as err:
                    each.error = f"{type(err).__name__}: {err}"

    def results(self) -> dict[str, dict[str, Any]]:
        """By contender: tokens a second (median), ratio to plain (median, least, greatest; of the best rounds), text.

        `best` is least disturbed by what else the machine does, which only ever takes time.
        """
        plain = self.field[0]
        table: dict[str, dict[str, Any]] = {}
        for each in self.field:
            if each.error is not None:
                table[each.name] = {"did not survive": each.error}
                continue
            ratios = sorted(p / s for p, s in zip(plain.seconds, each.seconds))
            table[each.name] = {
                "tokens_per_s": (self._n - 1) / statistics.median(each.seconds),
                "ratio": statistics.median(ratios),
                "least": ratios[0],
                "greatest": ratios[-1],
                "best": min(plain.seconds) / min(each.seconds),
                "same_text": each.text == plain.text,
                "first_token": statistics.median(f / p for p, f in zip(plain.first, each.first)),
            }
            table[each.name] |= each.stats()
        return table

    def close(self) -> None:
        for each in self.field:
            each.close()


def render(title: str, table: dict[str, dict[str, Any]]) -> str:
    lines = [
        title,
        f"  {'':14} {'tok/s':>8} {'ratio':>6} {'(least, greatest)':>18} {'best':>5} {'text':>6} {'first':>5}"
        "  accepted, cycle",
    ]
    for name, row in table.items():
        if "ratio" not in row:
            lines.append(f"  {name:14} did not survive: {row['did not survive']}")
            continue
        spread = f"({row['least']:.2f}, {row['greatest']:.2f})"
        line = f"  {name:14} {row['tokens_per_s']:8.1f} {row['ratio']:6.2f} {spread:>18} {row['best']:5.2f}"
        line += f" {'same' if row['same_text'] else 'OTHER':>6} {row['first_token']:5.2f}"
        if "accepted" in row:
            line += f"  {row['accepted']} {row['tokens_per_cycle']:.2f} tokens"
        if "verify_ms" in row:
            line += f", verify {row['verify_ms']:.1f} ms, step {row['step_ms']:.1f} ms"
        if row.get("of_the_text"):
            line += f", {row['of_the_text']} accepted of the text"
        lines.append(line)
    return "\n".join(lines)
