"""The depth that is chosen by what is measured, on machines and texts that are played to it. No engine, no clock."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from ds4_mtp_plugin.engine import Best
from ds4_mtp_plugin.speculation import CPU_COSTS, GPU_COSTS, AdaptiveDepth, FixedDepth, NominalDepth
from ds4_mtp_plugin.speculation.times import Times

N_MAX = 3

# A draft of which nothing more is known than that it was made.
SURE = Best(0, 1.0, math.inf)


@dataclass(frozen=True)
class Machine:
    """Seconds of decodes of 1, 2, ... rows, of a step of the head, and of each pair that it catches up with."""

    decodes: Sequence[float]
    step: float
    pair: float = 0.01


# Measured, in plain tokens: 500 MB on a Xeon with AMX and a dense model on its AVX2 kernels, DeepSeek-V4-Flash's widths
# on a CPU and on an H100; and two that nobody measured: one where no draft can pay at all, and one whose rows beyond
# the second are free.
MACHINES = {
    "amx": Machine((1, 1.43, 1.81, 2.21), 0.12),
    "dense": Machine((1, 1.21, 1.39, 1.55), 0.12),
    "flash": Machine((1, 1.04, 1.57, 2.0), 0.117),
    "h100": Machine((1, 1.11, 1.265, 1.473), 0.148),
    "hopeless": Machine((1, 1.8, 2.5, 3.2), 0.2),
    "stair": Machine((1, 1.6, 1.65, 1.7), 0.1),
}
TEXTS = {"code": (0.9, 0.85, 0.8), "prose": (0.7, 0.6, 0.5), "hard": (0.5, 0.4, 0.3), "never": (0.0, 0.0, 0.0)}


def noisy(rng: random.Random, seconds: float) -> float:
    """Out by 5 % at random, and by half in one of fifty cases."""
    seconds *= 1 + 0.05 * abs(rng.gauss(0, 1))
    return seconds * 1.5 if rng.random() < 0.02 else seconds


Rates = Callable[[int], Sequence[float]]  # by the number of tokens so far


@dataclass
class Run:
    """Text on a machine, whose clock is `noisy`."""

    machine: Machine
    rates: Rates
    seed: int = 0
    busy: int = 0  # so many times more, every other takes up to four times as long
    seconds: float = 0.0
    tokens: int = 0
    depths: list[int] = field(default_factory=list)
    depth: AdaptiveDepth = field(default_factory=lambda: AdaptiveDepth(N_MAX))

    def __post_init__(self) -> None:
        self._noise, self._text = random.Random(self.seed), random.Random(self.seed + 1)

    def _takes(self, seconds: float) -> float:
        seconds = noisy(self._noise, seconds)
        if self.busy > 0:
            self.busy -= 1
            seconds *= self._noise.choice((1, self._noise.uniform(1, 4)))
        self.seconds += seconds
        return seconds

    def _right(self, position: int) -> bool:
        return self._text.random() < self.rates(self.tokens)[position]

    def until(self, n_tokens: int, fixed: int | None = None) -> Run:
        idle = 0
        while self.tokens < n_tokens:
            most = self.depth.choose(N_MAX) if fixed is None else fixed
            made, k = most, most
            if fixed is None and (most or self.depth.probing):
                made = 1
                while self.depth.more(SURE) and made < most:
                    made += 1
            if made:
                self.depth.drafted(made, self._takes(made * self.machine.step + idle * self.machine.pair))
                k = self.depth.worth(made) if fixed is None else made
                idle = 0
            self.depths.append(k)
            idle += k == 0
            self.depth.decoded(k + 1, self._takes(self.machine.decodes[k]))
            self.tokens += 1
            if made and k == 0:
                self.depth.outcome(0, self._right(0))
            for i in range(k):
                right = self._right(i)
                self.depth.outcome(i, right)
                if not right:
                    break
                self.tokens += 1
        return self

    @property
    def cost(self) -> float:
        return self.seconds / self.tokens


def mean_cost(machine: Machine, rates: Rates, n: int, fixed: int | None = None) -> float:
    return sum(Run(machine, rates, seed).until(n, fixed).cost for seed in range(5)) / 5


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_it_is_about_as_fast_as_the_best_depth(machine: str, text: str) -> None:
    it, best = (
        mean_cost(MACHINES[machine], lambda n: TEXTS[text], 2000),
        [mean_cost(MACHINES[machine], lambda n: TEXTS[text], 2000, fixed) for fixed in range(N_MAX + 1)],
    )
    assert min(best) / it >= (0.95 if machine in ("amx", "flash", "h100") else 0.9)
    assert best[0] / it >= 0.975  # never a loss


@pytest.mark.parametrize("machine", ["amx", "flash", "h100"])
def test_it_follows_a_text_that_changes(machine: str) -> None:
    def rates(n: int) -> Sequence[float]:
        return TEXTS["code"] if n // 200 % 2 == 0 else (0.05, 0.05, 0.05)

    it = mean_cost(MACHINES[machine], rates, 4000)
    phases = [
        min(mean_cost(MACHINES[machine], lambda n, text=text: text, 2000, fixed) for fixed in range(N_MAX + 1))
        for text in (TEXTS["code"], (0.05, 0.05, 0.05))
    ]
    assert sum(phases) / 2 / it >= 0.88  # an oracle knows when it changes
    assert mean_cost(MACHINES[machine], rates, 4000, 0) / it >= 1.05


@pytest.mark.parametrize("seed", range(5))
def test_a_single_row_that_was_timed_in_a_bad_moment_is_timed_again(seed: int) -> None:
    """What drafts seem to gain then, they lose."""
    run = Run(Machine((1.2, 1.75, 2.3, 2.9), 0.2), lambda n: (0.8, 0.75, 0.7), seed).until(12, 0)
    run.machine = Machine((1, 1.75, 2.3, 2.9), 0.2)  # as it is: no depth pays
    run.until(40)
    assert sum(k > 0 for k in run.depths[12:]) > 5
    before = len(run.depths)
    run.until(400)
    assert run.depths[before + 60 :].count(0) > 0.9 * len(run.depths[before + 60 :])


@pytest.mark.parametrize("machine", ["amx", "flash", "h100"])
def test_a_drop_is_seen_within_ten_cycles(machine: str) -> None:
    for seed in range(5):
        run = Run(MACHINES[machine], lambda n: TEXTS["code"] if n < 500 else (0.0, 0.0, 0.0), seed).until(500)
        before = len(run.depths)
        run.until(560)
        assert run.depths[before + 10 : before + 30].count(0) > 15  # not one that is only timed again


def test_a_head_that_is_never_right_is_dropped_after_few_drafts() -> None:
    for seed in range(5):
        run = Run(MACHINES["flash"], lambda n: TEXTS["never"], seed).until(40)
        assert sum(k > 0 for k in run.depths) <= 14


def test_deeper_drafts_are_tried_again_where_the_first_are_right() -> None:
    """What was learned of them in a hard text is of no use in an easy one, and at depth 1 nothing new is learned."""
    hard: list[int] = []
    for seed in range(5):
        run = Run(MACHINES["h100"], lambda n: (0.6, 0.05, 0.05) if n < 400 else (0.98, 0.98, 0.98), seed)
        hard += run.until(400).depths[100:]
        run.until(1400)
        assert max(run.depths[-20:]) == 3 and 1 not in run.depths[-20:]
    assert sum(k > 1 for k in hard) <= 0.03 * len(hard)  # now and then, wherever in the hard text one looks


def test_where_no_draft_can_pay_next_to_none_is_made() -> None:
    """Neither is the head asked: a verify now and then tells whether the machine is still the same."""
    machine, asked = Machine((1, 3, 5, 7), 0.2), 0
    for seed in range(5):
        run = Run(machine, lambda n: (1.0, 1.0, 1.0), seed).until(50)
        seconds, made = run.seconds, len(run.depths)
        told = run.depth.drafted

        def drafted(n: int, seconds: float, told: Callable[[int, float], None] = told) -> None:
            nonlocal asked
            asked += 1
            told(n, seconds)

        run.depth.drafted = drafted  # type: ignore[method-assign]
        run.until(2050)
        assert sum(k > 0 for k in run.depths[made:]) <= 8
        assert mean_cost(machine, lambda n: (1.0, 1.0, 1.0), 2000, 0) * 2000 / (run.seconds - seconds) > 0.98
    assert asked <= 5 * 20


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("after", [0, 2000])
def test_a_hiccup_of_the_machine_is_not_believed_for_long(after: int, most: int) -> None:
    run = Run(MACHINES["flash"], lambda n: TEXTS["code"], depth=AdaptiveDepth(most)).until(after)
    run.machine = Machine((1, 9, 9, 9), 3.0)
    run.until(after + 60)
    assert run.depths[-5:] == [0] * 5
    run.machine = MACHINES["flash"]
    run.until(after + 300)
    assert run.depths[-20:].count(0) < 5


def test_where_verifies_take_for_ever_they_are_seldom_tried_again() -> None:
    """As where a verify has more threads than there are idle cores."""
    machine = Machine((1, 100, 120, 140), 20)
    speeds = []
    for seed in range(5):
        run = Run(machine, lambda n: TEXTS["code"], seed).until(50)
        seconds, tokens = run.seconds, run.tokens
        run.until(4050)
        speeds.append((run.tokens - tokens) / (run.seconds - seconds))
    assert mean_cost(machine, lambda n: TEXTS["code"], 4000, 0) * sum(speeds) / 5 > 0.9


def test_a_machine_that_becomes_slower_does_so_for_all_sizes() -> None:
    """What more rows took before that, where they are seldom, says nothing of those since."""
    machine = MACHINES["amx"]
    for seed in range(5):
        run = Run(machine, lambda n: TEXTS["prose"], seed).until(1000)
        for _ in range(4):
            run.depth.decoded(5, 2.57)
        run.machine = Machine([1.5 * seconds for seconds in machine.decodes], 1.5 * machine.step)
        seconds = run.seconds
        run.until(3000)
        assert 1.5 * mean_cost(machine, lambda n: TEXTS["prose"], 2000, 0) * 2000 / (run.seconds - seconds) > 0.975


def test_fewer_rows_take_no_longer_than_more_did_since_also_where_that_is_no_news() -> None:
    times = Times(at_once=False)
    for n_rows, seconds in ((1, 1.0), (2, 1.2), (1, 2.0)):  # the last ones beside other work
        for _ in range(12):
            times.decoded(n_rows, seconds)
    assert times.decode(1) == 2.0
    times.decoded(2, 1.2)
    assert times.decode(1) == 1.2


def test_an_exception_from_outside_leaves_no_half_known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    depth = AdaptiveDepth(N_MAX)
    for _ in range(2):
        depth.decoded(1, 1.0)

    def interrupted(k: int) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(depth, "_draft", interrupted)
        with pytest.raises(KeyboardInterrupt):
            depth.choose(N_MAX)
    assert depth.choose(N_MAX) == N_MAX


def idle(depth: AdaptiveDepth, n: int, single: float, *, rests: bool) -> tuple[int, int]:
    """n tokens at which drafting does not pay: how many were looked at, and how many drafts were made to compare."""
    looks = probes = tokens = 0
    while tokens < n:
        looks, tokens = looks + 1, tokens + 1
        if depth.choose(N_MAX) == 0 and not depth.probing:
            depth.decoded(1, single)
        else:
            probes += depth.probing
            depth.more(SURE)
            depth.drafted(1, 0.6 * single)
            depth.worth(1)
            depth.decoded(1, single)
            depth.outcome(0, False)
        if rests and depth.rest > 0:
            rest = min(depth.rest, 7)
            depth.rested(rest, single)
            tokens += rest
    return looks, probes


def test_where_drafting_does_not_pay_speculation_rests_and_probes_as_often() -> None:
    (looks, probes), (all_looks, all_probes) = (
        idle(AdaptiveDepth(N_MAX), 4000, 0.001, rests=rests) for rests in (True, False)
    )
    assert all_looks == 4000 and looks < 800
    assert 0.7 * all_probes < probes < 1.1 * all_probes and probes > 40


def test_the_time_between_two_looks_is_a_short_one() -> None:
    rests = {}
    for single in (0.001, 0.004, 0.02):
        depth = AdaptiveDepth(N_MAX)
        idle(depth, 100, single, rests=False)
        rests[single] = depth.rest
    assert rests == {0.001: 10, 0.004: 2, 0.02: 0}


def test_speculation_rests_only_where_there_is_nothing_to_see() -> None:
    depth = AdaptiveDepth(N_MAX)
    assert depth.rest == 0
    idle(depth, 100, 0.001, rests=False)
    depth.take([0.1] * 3)
    assert depth.rest == 0  # the text begins to repeat itself
    depth.take([])
    assert depth.rest > 0
    while not depth.probing:
        depth.choose(N_MAX)
        depth.decoded(1, 0.001)
    depth.drafted(1, 0.0006)
    depth.outcome(0, True)
    assert depth.rest == 0  # a draft was right
    idle(depth, 100, 0.001, rests=False)
    assert depth.rest > 0
    depth.decoded(4, 0.002)
    depth.decoded(1, 0.001)
    assert depth.rest == 0  # drafts of the text were verified
    depth = AdaptiveDepth(N_MAX)
    for _ in range(20):
        if depth.choose(N_MAX) > 0:
            depth.drafted(1, 0.0001)
        depth.decoded(1, 0.001)
    assert depth.choose(N_MAX) > 0 and depth.rest == 0  # drafts pay, but were not worth it of late
    assert AdaptiveDepth(0).rest == FixedDepth(0).rest == FixedDepth(3, text=False).rest == 0
    assert FixedDepth(0, text=False).rest > 1000
    nominal = NominalDepth(N_MAX, CPU_COSTS)
    idle(nominal, 100, 0.001, rests=False)
    assert nominal.rest == 0


def until_drafting_begins(seed: int, *, rests: bool) -> int:
    """Of a text whose drafts are wrong for 1,000 tokens, then right: how many of those. Asked as a session asks."""
    depth, rng, tokens, single, change = AdaptiveDepth(N_MAX), random.Random(seed), 0, 0.001, 1000 + seed
    while True:
        n, right = depth.choose(N_MAX), tokens > change and rng.random() < 0.95
        if n > 0 and tokens > change:
            return tokens - change
        rest = 0
        if n > 0 or depth.probing:
            depth.more(SURE)
            depth.drafted(1, 0.2 * single)
            n = depth.worth(1)
        depth.decoded(n + 1, (1 + 0.4 * n) * single * rng.uniform(1, 1.1))
        if n == 0 and rests:
            rest = min(depth.rest, 7)
        if n > 0 or depth.probing:
            depth.outcome(0, right)
            rest = 0 if right else rest
        if rest > 0:
            depth.rested(rest, single)
        tokens += 1 + rest + (n > 0 and right)


def test_text_that_becomes_predictable_is_found_as_soon_with_rests() -> None:
    with_rests, without = (
        statistics.median(until_drafting_begins(seed, rests=rests) for seed in range(40)) for rests in (True, False)
    )
    assert with_rests < without + 8


def test_an_interrupt_as_a_time_is_learned_leaves_depths_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    depth = AdaptiveDepth(N_MAX)
    depth.decoded(1, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Times, "_changed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            depth.decoded(1, 1.0)
    assert depth.choose(N_MAX) == 0
    depth.decoded(1, 1.0)
    assert depth.choose(N_MAX) == N_MAX


def test_what_single_rows_take_is_learned_from_rests_too() -> None:
    """And not from looks, which take longer."""
    depth = AdaptiveDepth(N_MAX)
    idle(depth, 200, 0.001, rests=True)
    for _ in range(500):
        depth.rested(7, 0.0005)
        depth.decoded(1, 0.002)
    assert depth.times()[0][1] == 0.0005


def test_single_rows_are_timed_seldom_beside_drafts_of_the_text() -> None:
    depth, singles = AdaptiveDepth(0), 0
    for _ in range(3000):
        depth.choose(0)
        n = depth.take([0.95] * 16)
        depth.decoded(n + 1, 1 + 0.1 * n)
        singles += n == 0
    assert singles < 40


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_that_drafting_does_not_pay_is_remembered_as_long_as_nothing_is_learned(machine: str, text: str) -> None:
    it, forgetful = AdaptiveDepth(N_MAX), AdaptiveDepth(N_MAX)
    rng, costs, remembered = random.Random(1), MACHINES[machine], 0
    for _ in range(2000):
        remembered += it._vain > 0
        forgetful._vain = 0
        offered = [0.9] * rng.choice((0, 0, 0, 3))
        (most, n, _), other = ((d.choose(N_MAX), d.take(offered), d.probing) for d in (it, forgetful))
        assert (most, n, it.probing) == other
        made = 1 if it.probing else most if n == 0 else 0
        rows = costs.decodes[n] * rng.uniform(1, 1.3)
        outcomes = [rng.random() < rate for rate in TEXTS[text]]
        for depth in (it, forgetful):
            k = n
            if made:
                k = made
                while len(depth._leads) < made:
                    depth.more(SURE)
                depth.drafted(made, made * costs.step)
                k = depth.worth(made)
            depth.decoded(k + 1, rows * costs.decodes[k] / costs.decodes[n])
            for position in range(min(made, max(k, 1))):
                depth.outcome(position, outcomes[position])
                if not outcomes[position]:
                    break
    assert remembered > 100 or text not in ("hopeless", "never")


@pytest.mark.parametrize("n_max", [0, N_MAX])
def test_where_nothing_is_drafted_few_times_are_learned_and_a_slower_machine_is_noticed(n_max: int) -> None:
    depth, learned = Run(MACHINES["amx"], lambda n: (0.0, 0.0, 0.0), depth=AdaptiveDepth(n_max)).until(500).depth, []

    def single(seconds: float) -> None:
        depth.choose(n_max)
        if depth.probing:
            depth.drafted(1, 0.2)
            depth.worth(1)
        before = depth._times._decodes[1].n if depth._times.known else 0
        depth.decoded(1, seconds)
        learned.append(depth._times.known and depth._times._decodes[1].n > before)
        if depth.probing:
            depth.outcome(0, False)

    for _ in range(1000):
        single(1.0)
    assert 250 <= sum(learned) < (260 if n_max == 0 else 600)  # behind each probe all are, for a while
    for _ in range(40):
        single(2.0)
    assert depth.times()[0][1] == 2.0


def test_a_fixed_depth_knows_how_often_its_drafts_are_right() -> None:
    """By that it takes drafts of the text in their place."""
    depth = FixedDepth(3)
    for i in range(2000):
        depth.worth(depth.choose(3))
        depth.outcome(0, i % 10 > 0)
        if i % 10 > 0:
            depth.outcome(1, i % 20 == 1)
    assert depth.take([1.0]) == 1  # 2 tokens; the head's drafts give 1.97, and 2.12 if they were as good as the first


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("machine", ["amx", "flash", "h100", "dense"])
def test_a_beginning_beside_other_work_is_made_up_for(machine: str, text: str) -> None:
    """Half of the first decodes and drafts take up to four times as long."""
    costs = []
    for seed in range(20):
        run = Run(MACHINES[machine], lambda n: TEXTS[text], seed, busy=16)
        while run.busy > 0:
            run.until(run.tokens + 1)
        seconds, tokens = run.seconds, run.tokens
        run.until(tokens + 600)
        costs.append((run.seconds - seconds) / (run.tokens - tokens))
    best = min(mean_cost(MACHINES[machine], lambda n: TEXTS[text], 600, fixed) for fixed in range(N_MAX + 1))
    assert best / (sum(costs) / len(costs)) >= 0.95


def test_all_depths_are_tried_where_the_first_drafts_are_right() -> None:
    """Two gain little more than one, where three rows are dear: the third, which is worth it, is tried all the same."""
    machine = Machine((1, 1.5, 2.0, 2.3), 0.18)
    for seed in range(10):
        run = Run(machine, lambda n: (0.9, 0.93, 0.93), seed).until(1000)
        assert run.depths[-100:].count(3) > 50


def test_drafts_are_left_off_as_soon_as_they_lose_and_come_back_for_a_gain() -> None:
    """Another depth has to gain 3 %, plain decoding nothing: between the two, drafts are neither begun nor kept."""
    depth = AdaptiveDepth(1)
    for _ in range(10):  # all right: 2 tokens for what takes as long as 1.97 or, at last, 2.02
        depth.decoded(1, 1.0)
        depth.decoded(2, 1.87)
        depth.drafted(1, 0.1)
        for _ in range(30):
            depth.outcome(0, True)
    assert depth.choose(1) == 1
    for _ in range(3):
        depth.decoded(1, 1.0)
    for _ in range(20):
        depth.decoded(2, 1.92)
    assert depth.choose(1) == 0
    for _ in range(3):
        depth.decoded(1, 1.0)
    for _ in range(20):
        depth.decoded(2, 1.87)
    assert depth.choose(1) == 0
    for _ in range(3):
        depth.decoded(1, 1.0)
    for _ in range(20):
        depth.decoded(2, 1.82)
    assert depth.choose(1) == 1


def test_there_is_never_more_than_there_is_room_for() -> None:
    run = Run(MACHINES["flash"], lambda n: TEXTS["code"]).until(300)
    assert run.depth.choose(N_MAX) > 0
    assert [run.depth.choose(room) for room in (0, -1)] == [0, 0]
    assert not run.depth.probing
    assert run.depth.choose(1) == 1


def test_nothing_is_drafted_before_a_single_row_was_timed() -> None:
    depth = AdaptiveDepth(N_MAX)
    assert depth.choose(N_MAX) == 0 and not depth.probing
    depth.decoded(1, 5.0)  # the first one builds graphs: it counts for nothing
    assert depth.choose(N_MAX) == 0
    depth.decoded(1, 1.0)
    assert depth.choose(N_MAX) > 0


def test_the_same_observations_give_the_same_depths() -> None:
    runs = [Run(MACHINES["h100"], lambda n: TEXTS["prose"], seed=4).until(800) for _ in range(2)]
    assert runs[0].depths == runs[1].depths


def test_believed_costs_are_those_of_the_table_and_in_proportion_between() -> None:
    rows = dict(GPU_COSTS.rows)
    assert [GPU_COSTS.decode(n) for n in rows] == pytest.approx(list(rows.values()))
    assert GPU_COSTS.decode(6) == pytest.approx((2 * rows[5] + rows[8]) / 3)
    assert GPU_COSTS.decode(25) == pytest.approx(2 * rows[17] - rows[9])
    for costs in (GPU_COSTS, CPU_COSTS):
        assert sorted(costs.rows) == list(costs.rows) and costs.rows[0] == (1, 1.0)
        assert [v for _, v in costs.rows] == sorted(v for _, v in costs.rows)


@pytest.mark.parametrize("text", TEXTS)
def test_without_a_clock_the_same_text_gives_the_same_depths(text: str) -> None:
    """On machines that differ, where one that reads a clock drafts otherwise."""

    def depths(machine: str, depth: AdaptiveDepth) -> list[int]:
        return Run(MACHINES[machine], lambda n: TEXTS[text], depth=depth).until(500).depths

    runs = [depths(machine, NominalDepth(N_MAX, GPU_COSTS)) for machine in ("h100", "stair", "hopeless")]
    assert runs[0] == runs[1] == runs[2]
    assert depths("h100", AdaptiveDepth(N_MAX)) != depths("hopeless", AdaptiveDepth(N_MAX))


@pytest.mark.parametrize("text", TEXTS)
def test_believed_costs_are_near_the_best_depth_of_the_machine_that_they_are_of(text: str) -> None:
    machine, seeds = MACHINES["h100"], range(5)
    runs = [
        Run(machine, lambda n: TEXTS[text], seed, depth=NominalDepth(N_MAX, GPU_COSTS)).until(2000) for seed in seeds
    ]
    it = sum(run.cost for run in runs) / 5
    best = [mean_cost(machine, lambda n: TEXTS[text], 2000, fixed) for fixed in range(N_MAX + 1)]
    assert min(best) / it >= 0.97 and best[0] / it >= 0.975
