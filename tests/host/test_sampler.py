"""The sampler's stream with a draft is the plain stream: tokens, chunks, log-probabilities, and what processors see.

Every row of the table runs over drafts that are right as often as can be, mostly and never, at several depths, each
with a seed of its own; in the long mode at all depths from 1 to 8, with more seeds. The text depends on every row of
every cache (BY_CONTEXT), so that even the best drafts are wrong now and then.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama, LlamaGrammar, LogitsProcessorList, StoppingCriteriaList

from ds4_mtp_plugin import MtpDraft, MtpStats
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from tests import LONG
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, Planted

Plant = Callable[..., Planted]
Options = dict[str, Any]

N_SEEDS = 4 if LONG else 1
# On a GPU the same text is to be had on request, up to depth 4.
DEEPEST = 4 if GPU_LAYERS else 8
DEPTHS = range(1, DEEPEST + 1) if LONG else (1, 3, DEEPEST)
ACCEPTANCES = (1.0, 0.8, 0.0)
N_TOKENS = 24

# Half of the letters: what the planted text would be goes through, and is bent now and then.
LETTERS = r"root ::= [^aeiou02468#-/]*"
WORDS = r'root ::= ("yes" | "no" | "maybe") (", " ("yes" | "no" | "maybe"))*'
SCHEMA = """{"type": "object", "required": ["name", "age", "tags"], "properties": {"name": {"type": "string"},
"age": {"type": "integer"}, "tags": {"type": "array", "items": {"enum": ["a", "b", "cc"]}}}}"""

#: What an app may ask of a completion; a name that ends in "=" is a function that makes the value anew for each run.
SAMPLERS: dict[str, Options] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1.2": {"temperature": 1.2, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "top-k": {"temperature": 1.0, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
    "top-p": {"temperature": 1.2, "top_k": 0, "top_p": 0.6, "min_p": 0.0},
    "min-p": {"temperature": 1.3, "top_k": 0, "top_p": 1.0, "min_p": 0.2},
    "typical": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 0.4},
    "repeat penalty": {"temperature": 0.9, "repeat_penalty": 1.4},
    "presence penalty": {"temperature": 0.9, "presence_penalty": 1.5},
    "frequency penalty": {"temperature": 0.9, "frequency_penalty": 1.2},
    "all penalties, greedy": {
        **{"temperature": 0.0, "repeat_penalty": 1.2},
        **{"presence_penalty": 0.7, "frequency_penalty": 0.7},
    },
    "mirostat 1": {"temperature": 1.0, "mirostat_mode": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
    "mirostat 2": {"temperature": 1.0, "mirostat_mode": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
    "grammar of letters": {"temperature": 0.7, "grammar=": lambda: LlamaGrammar.from_string(LETTERS, verbose=False)},
    "grammar of words": {"temperature": 1.0, "grammar=": lambda: LlamaGrammar.from_string(WORDS, verbose=False)},
    "grammar, greedy": {"temperature": 0.0, "grammar=": lambda: LlamaGrammar.from_string(LETTERS, verbose=False)},
    "json schema": {"temperature": 0.8, "grammar=": lambda: LlamaGrammar.from_json_schema(SCHEMA, verbose=False)},
    "json schema, mirostat": {
        **{"temperature": 0.8, "mirostat_mode": 2, "repeat_penalty": 1.1},
        "grammar=": lambda: LlamaGrammar.from_json_schema(SCHEMA, verbose=False),
    },
    "logit bias": {"temperature": 1.0, "logit_bias": {str(token): 2.0 - token % 5 for token in range(261, 400)}},
    "processor with memory": {"temperature": 1.0, "processor": True},
    "processor with memory, penalties": {"temperature": 1.0, "repeat_penalty": 1.3, "processor": True},
    "criterion": {"temperature": 1.0, "stopping_criteria=": lambda: StoppingCriteriaList([ends_on_a_sum])},
    "seed of the Llama": {"temperature": 1.0, "seed": None},
}


#: What the planted models would not say of themselves: their drafts are hardly ever right. Those of real text are.
FOREIGN = ("grammar of words", "json schema", "json schema, mirostat")


def ends_on_a_sum(ids: Any, logits: Any) -> bool:
    """True some tokens on, at a place that every token has a say in."""
    return int(np.sum(ids)) % 11 == 0


class Remembers:
    """A processor that forbids what it counted, and notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.counts: dict[int, int] = {}

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.calls.append((type(ids), ids.dtype, ids.tolist(), scores.dtype, scores.tobytes()))
        last = int(ids[-1])
        self.counts[last] = self.counts.get(last, 0) + 1
        scores = scores.copy()
        for token, n in self.counts.items():
            scores[token] -= 2.0 * n
        return scores


class Both:
    """Plain and drafted Llamas of a kind, made when asked for and kept: a case begins where another ended."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self.llama = functools.lru_cache(maxsize=None)(self._llama)
        self._made: list[Any] = []

    def _llama(self, acceptance: float | None, depth: int, *, walk: bool = False, **options: Any) -> Any:
        """`acceptance` None: the model that comes with the plugin. `walk`: drafts are right that often, and exactly."""
        if acceptance is None:
            base, head = BASE, HEAD
        else:
            files = self.plant(acceptance=acceptance, **({} if walk else BY_CONTEXT))
            base, head = files.trunk, files.mtp
        draft = MtpDraft(head, num_pred_tokens=depth, exact=bool(GPU_LAYERS) or None) if depth else None
        defaults = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 5}
        defaults["n_gpu_layers"] = GPU_LAYERS
        self._made.append(Llama(str(base), draft_model=draft, **{**defaults, **options}))
        return self._made[-1]

    def close(self) -> None:
        for each in self._made:
            each.close()


@pytest.fixture(scope="module")
def both(plant: Plant) -> Iterator[Both]:
    both = Both(plant)
    yield both
    both.close()


def observed(llm: Any, prompt: str | list[int], options: Options, *, stream: bool) -> list[Any]:
    """All that an app sees of a completion, less what is of the clock."""
    made = {name.rstrip("="): value() if name.endswith("=") else value for name, value in options.items()}
    processor = None
    if made.pop("processor", False):
        processor = Remembers()
        made["logits_processor"] = LogitsProcessorList([processor])
    answer = llm.create_completion(prompt, stream=stream, **{"max_tokens": N_TOKENS, **made})
    chunks = list(answer) if stream else [answer]
    seen: list[Any] = [{k: v for k, v in chunk.items() if k not in ("id", "created")} for chunk in chunks]
    for chunk in seen:
        chunk.pop("model")  # the path, of which acceptance is a part
    seen.append((llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()))
    if processor is not None:
        assert len(processor.calls) > 5
        seen.append(processor.calls)
    return seen


def beginning(seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(261, 500, rng.integers(5, 40))]


class Tally:
    """What speculation did in a test: the Llamas, and so their counters, are shared with others."""

    def __init__(self) -> None:
        self.cases = self.proposed = self.accepted = 0

    def add(self, before: MtpStats, after: MtpStats) -> None:
        self.cases += 1
        self.proposed += after.proposed - before.proposed
        self.accepted += after.accepted - before.accepted


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    tally = Tally()
    yield tally
    request.node.user_properties += vars(tally).items()  # --junitxml keeps them


def same(llms: tuple[Any, Any], tally: Tally, prompt: str | list[int], case: Options, *, stream: bool) -> list[Any]:
    """What is seen of the second Llama, which drafts, being what is seen of the first one, which does not."""
    plain, drafted = llms
    for llm in llms:
        if "seed" in case and case["seed"] is None:
            llm.set_seed(len(prompt))
    before = drafted.draft_model.stats
    seen = observed(drafted, prompt, case, stream=stream)
    expected = observed(plain, prompt, case, stream=stream)
    if seen != expected:  # asserted, pytest would spend minutes on the difference of two lists of scores
        first = next(pair for pair in itertools.zip_longest(seen, expected) if pair[0] != pair[1])
        pytest.fail(f"{case}: {str(first)[:1000]}")
    tally.add(before, drafted.draft_model.stats)
    # Not a row more in the engine's memory either.
    assert drafted._ds4_mtp._spec.target.seq_pos_max(0) == drafted.n_tokens - 1
    return seen


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_stream_is_plain(both: Both, tally: Tally, name: str, acceptance: float) -> None:
    for depth in DEPTHS:
        for i in range(N_SEEDS):
            seed = 1000 * i + 10 * depth + int(10 * acceptance)
            llms = both.llama(acceptance, 0), both.llama(acceptance, depth)
            case = {"seed": seed, **SAMPLERS[name]}
            same(llms, tally, beginning(seed), case, stream=seed % 20 < 10)
            assert llms[1].draft_model.stats.depth == depth
    assert tally.accepted < tally.proposed
    if acceptance == 1.0 and name not in FOREIGN:
        assert tally.accepted > 0


LOGPROBS = ("greedy", "temperature 1.2", "repeat penalty", "mirostat 1", "mirostat 2", "json schema", "logit bias")


def log_probabilities(seen: list[Any]) -> list[float]:
    """Of every token of the completion, less the first of a prompt, which has none."""
    each = [chunk["choices"][0]["logprobs"] for chunk in seen[:-1] if chunk["choices"][0]["logprobs"]]
    return [value for found in each for value in found["token_logprobs"] if value is not None]


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("name", LOGPROBS)
def test_log_probabilities_are_plain_to_the_bit(both: Both, tally: Tally, name: str, acceptance: float) -> None:
    """Those of each token and of the likeliest ones; and with logits_all every row of scores."""
    for depth in DEPTHS:
        seed = 10 * depth + int(10 * acceptance)
        plain, drafted = (both.llama(acceptance, k, logits_all=True) for k in (0, depth))
        case = {"seed": seed, "logprobs": 4, **SAMPLERS[name]}
        values = log_probabilities(same((plain, drafted), tally, beginning(seed), case, stream=seed % 20 < 10))
        assert len(values) > 5 and max(values) < 0
        np.testing.assert_array_equal(drafted._scores[: drafted.n_tokens], plain._scores[: plain.n_tokens])
    assert tally.accepted < tally.proposed
    if acceptance == 1.0 and name not in FOREIGN:
        assert tally.accepted > 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_stop_string_may_end_anywhere_in_a_draft(both: Both, tally: Tally, depth: int) -> None:
    """Of every length, beginning and ending within tokens, from the first token to beyond the second verify."""
    llms = both.llama(0.5, 0, walk=True), both.llama(0.5, depth, walk=True)
    prompt = beginning(3)[:5]
    text = llms[0].create_completion(prompt, max_tokens=2 * depth + 6, temperature=0.0)["choices"][0]["text"]
    cases = [(start, length) for start in range(len(text) - 1) for length in (1, 2, 3, 5, 8)]
    rng = np.random.default_rng(depth)
    stopped = 0
    for start, length in rng.permutation(cases)[: 20 * N_SEEDS].tolist():
        case = {"temperature": 0.0, "stop": [text[start : start + length], "no such text"]}
        seen = same(llms, tally, prompt, case, stream=(start + length) % 2 == 0)
        stopped += seen[-2]["choices"][0]["finish_reason"] == "stop"
    assert stopped > 10
    assert 0 < tally.accepted < tally.proposed


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_max_tokens_may_end_anywhere_in_a_draft(both: Both, tally: Tally, depth: int, acceptance: float) -> None:
    llms = both.llama(acceptance, 0, walk=True), both.llama(acceptance, depth, walk=True)
    for n in range(1, 2 * depth + 4):
        case = {"seed": n, "temperature": 0.7, "max_tokens": n, "echo": n % 3 == 0}
        same(llms, tally, llms[0].detokenize(beginning(n)).decode(), case, stream=n % 2 == 0)
    assert (tally.accepted > 0) == (acceptance > 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_stream_of_real_text_is_plain(both: Both, tally: Tally, name: str) -> None:
    """The model that comes with the plugin, quantised, whose drafts are as good as its card says."""
    options = dict(SAMPLERS[name])
    if "logit_bias" in options:
        options["logit_bias"] = {"10": 3.0, "11": -100.0, "300": 2.0}
    neutral = {"temperature": options["temperature"]}
    changed = 0
    for depth, prompt in ((1, "import os\n"), (3, "class A:\n    def "), (DEEPEST, "The following functions")):
        for seed in range(N_SEEDS):
            case = {"seed": seed, **options}
            seen = same((both.llama(None, 0), both.llama(None, depth)), tally, prompt, case, stream=False)
            changed += seen != observed(both.llama(None, 0), prompt, {"seed": seed, **neutral}, stream=False)
    assert 0 < tally.accepted < tally.proposed
    assert changed or options.keys() == neutral.keys()  # what is asked for has an effect on these texts


def test_log_probabilities_of_real_text_are_plain_to_the_bit(both: Both, tally: Tally) -> None:
    plain, drafted = (both.llama(None, depth, logits_all=True) for depth in (0, 3))
    for name in LOGPROBS[:-1]:
        case = {"seed": 3, "logprobs": 4, **SAMPLERS[name]}
        same((plain, drafted), tally, "def main():", case, stream=False)
        np.testing.assert_array_equal(drafted._scores[: drafted.n_tokens], plain._scores[: plain.n_tokens])
    assert 0 < tally.accepted < tally.proposed


@pytest.mark.parametrize("stream", [False, True])
def test_chats_are_plain(both: Both, tally: Tally, stream: bool) -> None:
    """Turn by turn, each on what the one before left in memory, and log-probabilities as chats give them."""

    def chat(llm: Any) -> list[Any]:
        messages: list[Any] = []
        seen = []
        for i, question in enumerate(("What is a list?", "And a tuple?", "Write a loop.")):
            messages.append({"role": "user", "content": question})
            options = {"seed": i, "temperature": 0.8, "max_tokens": 30, "logprobs": True, "top_logprobs": 3}
            answer = llm.create_chat_completion(messages, stream=stream, **options)
            chunks = list(answer) if stream else [answer]
            seen += [{k: v for k, v in chunk.items() if k not in ("id", "created")} for chunk in chunks]
            given = [chunk["choices"][0].get("delta") or chunk["choices"][0].get("message") or {} for chunk in chunks]
            messages.append({"role": "assistant", "content": "".join(each.get("content") or "" for each in given)})
        assert len(messages[-1]["content"]) > 10
        return seen

    plain, drafted = (both.llama(None, depth, logits_all=True) for depth in (0, 3))
    before = drafted.draft_model.stats
    assert chat(drafted) == chat(plain)
    tally.add(before, drafted.draft_model.stats)
    assert 0 < tally.accepted < tally.proposed


@pytest.mark.parametrize("name", ["greedy", "temperature 1.2", "mirostat 2", "json schema"])
def test_reruns_are_identical(both: Both, name: str) -> None:
    """At a fixed depth; and not the text alone: a rerun drafts and accepts what the run did."""

    def run(acceptance: float, depth: int) -> tuple[Any, ...]:
        fresh = Both(both.plant)
        try:
            llm = fresh.llama(acceptance, depth)
            seen = [observed(llm, beginning(n), {"seed": n, **SAMPLERS[name]}, stream=False) for n in range(3)]
            stats = dataclasses.replace(llm.draft_model.stats, draft_ms=0.0, verify_ms=0.0)
            return seen, stats
        finally:
            fresh.close()

    for depth in DEPTHS:
        first = run(0.8, depth)
        assert first == run(0.8, depth)
        assert first[1].iters > 0
