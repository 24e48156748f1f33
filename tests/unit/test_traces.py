"""The depth that is chosen, on recorded texts, beside what knows better: `python -m bench.traces` wrote them.

Times are played: they are of real machines, and out by some per cent at random. The text is real, and what the head
drafts in it: how many drafts are right, in which order, and how sure the head was. So the same is chosen every time.
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ds4_mtp_plugin.engine import Best
from ds4_mtp_plugin.speculation import AdaptiveDepth
from tests.unit.test_depth import MACHINES, N_MAX, Machine, noisy

# For each token how many of the drafts behind it are right, and the leads of their logits.
Trace = list[tuple[int, list[float]]]

TRACES: dict[str, Trace] = json.loads((Path(__file__).parents[1] / "fixtures/mini_traces.json").read_text())
NEVER: Trace = [(0, [9.0] * N_MAX)] * 400
TIMES = 3  # one generation after the other


@dataclass
class Replay:
    """Tokens and seconds of a text, by a way to choose."""

    machine: Machine
    seed: int
    seconds: float = 0.0
    tokens: int = 0
    verified: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._noise = random.Random(self.seed)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    def takes(self, seconds: float) -> float:
        seconds = noisy(self._noise, seconds)
        self.seconds += seconds
        return seconds

    def chosen(self, trace: Trace) -> Replay:
        depth, at, idle = AdaptiveDepth(N_MAX), 0, 0
        while at < len(trace):
            right, leads = trace[at]
            most, made, k = depth.choose(N_MAX), 0, 0
            if most or depth.probing:
                made = 1
                while depth.more(Best(0, 1.0, leads[made - 1])) and made < min(most, len(leads)):
                    made += 1
                depth.drafted(made, self.takes(made * self.machine.step + idle * self.machine.pair))
                k, idle = depth.worth(made), 0
            idle += k == 0
            depth.decoded(k + 1, self.takes(self.machine.decodes[k]))
            if made and k == 0:
                depth.outcome(0, right > 0)
            for i in range(min(k, right + 1)):
                depth.outcome(i, i < right)
            at = self._went(at, k, right)
        return self

    def fixed(self, trace: Trace, k: int, least: float = 0.0) -> Replay:
        """Always k drafts, or up to the first with a smaller lead."""
        at = 0
        while at < len(trace):
            right, leads = trace[at]
            made = next((i for i, lead in enumerate(leads[:k]) if lead < least), min(k, len(leads)))
            self.takes(self.machine.decodes[made] + min(made + 1, k) * self.machine.step)
            at = self._went(at, made, right)
        return self

    def _went(self, at: int, verified: int, right: int) -> int:
        self.verified.append(verified)
        self.tokens += 1 + min(right, verified)
        return at + 1 + min(right, verified)


def chosen(machine: Machine, trace: Trace) -> float:
    return statistics.mean(Replay(machine, seed).chosen(trace).speed for seed in range(5))


def fixed(machine: Machine, trace: Trace, k: int, least: float = 0.0) -> float:
    return statistics.mean(Replay(machine, seed).fixed(trace, k, least).speed for seed in range(5))


def hindsight(machine: Machine, trace: Trace) -> float:
    """The best number in each cycle, of someone who knows which drafts are right, and without noise."""
    seconds = [0.0] * (len(trace) + 1)
    for at in range(len(trace) - 1, -1, -1):
        seconds[at] = min(
            machine.decodes[k] + k * machine.step + seconds[min(len(trace), at + 1 + min(trace[at][0], k))]
            for k in range(N_MAX + 1)
        )
    return len(trace) / seconds[0]


REAL = ("amx", "flash", "h100", "dense")


@pytest.mark.parametrize("text", TRACES)
@pytest.mark.parametrize("name", REAL)
def test_it_is_as_fast_as_the_best_fixed_depth(name: str, text: str) -> None:
    machine, trace = MACHINES[name], TRACES[text] * TIMES
    it = chosen(machine, trace)
    plain, *drafting = (fixed(machine, trace, k) for k in range(N_MAX + 1))
    assert it >= 0.98 * plain
    # The code is short, and changes within a few tokens from all right to all wrong.
    assert it >= (0.95 if text.startswith("code") else 0.97) * max(plain, *drafting)
    assert it < hindsight(machine, trace)


@pytest.mark.parametrize("name", REAL)
def test_it_is_about_as_fast_as_the_best_rule_that_ends_a_draft(name: str) -> None:
    """Over all texts, the rule that is the best on this machine in hindsight."""
    machine = MACHINES[name]

    def mean(speeds: list[float]) -> float:
        return statistics.geometric_mean(speeds)

    its = mean([chosen(machine, trace * TIMES) for trace in TRACES.values()])
    rules = [
        mean([fixed(machine, trace * TIMES, k, least) for trace in TRACES.values()])
        for k in range(1, N_MAX + 1)
        for least in (0.0, 0.5, 1.0, 2.0, 4.0)
    ]
    assert its >= 0.98 * max(rules)


@pytest.mark.parametrize("name", REAL)
def test_the_head_says_which_drafts_are_worth_it(name: str) -> None:
    """Without leads that tell them apart it is no faster, and mostly slower."""
    machine = MACHINES[name]
    blind = {text: [(right, [9.0] * len(leads)) for right, leads in trace] for text, trace in TRACES.items()}
    ratios = [chosen(machine, TRACES[text] * TIMES) / chosen(machine, blind[text] * TIMES) for text in TRACES]
    assert statistics.geometric_mean(ratios) > (0.99 if name == "flash" else 1.005)


@pytest.mark.parametrize("name", REAL)
def test_a_head_that_is_never_right_costs_next_to_nothing(name: str) -> None:
    machine, trace = MACHINES[name], NEVER * TIMES
    assert chosen(machine, trace) >= 0.98 * fixed(machine, trace, 0)


@pytest.mark.parametrize("name", REAL)
def test_it_follows_a_text_that_changes(name: str) -> None:
    machine, well = MACHINES[name], TRACES["an edit, greedy"][:200]
    badly = NEVER[:200]
    parts = [max(fixed(machine, well, k) for k in range(N_MAX + 1)), fixed(machine, badly, 0)]
    its = [Replay(machine, seed).chosen((well + badly) * 3) for seed in range(5)]
    assert statistics.mean(it.speed for it in its) >= 0.96 * statistics.harmonic_mean(parts)
    for it in its:
        at, tokens = 0, 0
        while tokens < 200:  # the end of the first part
            tokens += 1 + it.verified[at]
            at += 1
        # A wrong draft costs some cycles; where that is little, it takes longer until it does not pay.
        cycles = it.verified.index(0, at) - at
        assert cycles * (machine.decodes[1] + machine.step - 1) <= 5
