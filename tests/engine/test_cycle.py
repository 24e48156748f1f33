"""The cycle on the real engine: what it costs in decodes, what reaches the drafter, what it drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

import ds4_mtp_plugin.host as host
from ds4_mtp_plugin import engine
from ds4_mtp_plugin.speculation import CommonSpeculative, MtpDrafter, NoDrafter, RollbackRefused
from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import BY_CONTEXT, Planted

WINDOW = 128


class Counted(engine.Context):
    """A context that notes the number of rows of each of its decodes."""

    decodes: list[int]

    def decode(self, batch: engine.Batch) -> None:
        self.decodes.append(int(batch.struct.n_tokens))
        super().decode(batch)


class Pair:
    """Trunk and head of a planted model, each in a counting context, and the speculation over them."""

    def __init__(self, planted: Planted, *, n_draft: int, n_ctx: int = 2048, n_seq: int = 1) -> None:
        self.planted = planted
        library = engine.Library(host.library_path())
        self._models = [
            engine.Model(library, str(planted.trunk), n_gpu_layers=GPU_LAYERS),
            engine.Model(library, str(planted.mtp), load_mtp=True, n_gpu_layers=GPU_LAYERS),
        ]
        threads = {"n_threads": 1, "n_threads_batch": 1, "n_seq_max": n_seq}
        self.target, self.head = (
            self._models[0].new_context(n_ctx=n_ctx * n_seq, n_rs_seq=n_draft, **threads),
            self._models[1].new_context(
                mtp=True, n_ctx=3 * WINDOW * n_seq, n_batch=WINDOW, n_ubatch=WINDOW, swa_full=False, **threads
            ),
        )
        for context in (self.target, self.head):
            context.__class__ = Counted
            context.decodes = []  # type: ignore[attr-defined]
        self.drafter = MtpDrafter(self.head, on_close=self._models[1].close)
        self.spec = CommonSpeculative(self.target, self.drafter, n_draft=n_draft)
        self._batch = engine.Batch(2048)

    def decodes(self) -> tuple[list[int], list[int]]:
        """Rows of the target's and the head's decodes since the last call."""
        rows = self.target.decodes, self.head.decodes  # type: ignore[attr-defined]
        self.target.decodes, self.head.decodes = [], []  # type: ignore[attr-defined]
        return rows

    def prompt(self, tokens: Sequence[int], n_past: int = 0, seq_id: int = 0, keep: int = WINDOW) -> int:
        """Evaluate a prompt, keep hidden rows of its last `keep` tokens; the best next token."""
        self.target.set_hidden(engine.HIDDEN_ALL)
        self.target.decode(self._batch.set(tokens, n_past, seq_id))
        n = min(keep, len(tokens))
        hidden = np.empty((n, self.target.n_embd_out), np.float32)
        for i in range(n):
            self.target.hidden(len(tokens) - n + i, hidden[i])
        best = self.target.best().id
        self.spec.process(seq_id, n_past, tokens, hidden)
        return best

    def greedy(self, id_last: int, n_past: int, n: int, seq_id: int = 0) -> Iterator[int]:
        """The text behind `id_last`, cycle by cycle, at least n tokens."""
        while n > 0:
            drafts = self.spec.draft(seq_id, n_past, id_last, self.spec.n_draft)
            verify = self.spec.verify(seq_id, n_past, id_last, drafts)
            best = [self.target.best(i).id for i in range(len(drafts) + 1)]
            while verify.advance(best[verify.row]):
                self.spec.counters.accepted(verify.row - 1)
            self.spec.accept(verify)
            yield from best[: verify.row + 1]
            n_past, id_last, n = verify.n_committed, best[verify.row], n - verify.row - 1

    def close(self) -> None:
        self.spec.close()
        self.target.close()
        self._models[0].close()


@pytest.fixture
def pair(plant: Callable[..., Planted]) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(n_draft: int, **options: object) -> Pair:
        pair_options = {key: options.pop(key) for key in ("n_ctx", "n_seq") if key in options}
        made.append(Pair(plant(**options), n_draft=n_draft, **pair_options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("acceptance", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_drafts_cost_k_head_decodes_and_one_of_the_trunk(
    pair: Callable[..., Pair], k: int, acceptance: float
) -> None:
    p = pair(k, acceptance=acceptance)
    first = int(p.planted.cycle[0])
    id_last = p.prompt([first, *p.planted.follow(first, 9)])
    p.decodes()
    text = list(p.greedy(id_last, 10, 100))
    cycles = p.spec.stats().iters
    trunk, head = p.decodes()
    assert text == p.planted.follow(id_last, len(text))
    assert trunk == [k + 1] * cycles  # no decode of the sampled token alone, no replay
    assert len(head) == k * cycles  # no decode to catch up with accepted tokens
    # Every pair of the text is decoded once, the newest included; deeper drafts add a row each.
    newest = p.drafter._sequences[0].kv_hi - 1
    assert sum(head) == newest + (k - 1) * cycles


def test_only_the_last_window_of_a_prompt_reaches_the_head(pair: Callable[..., Pair]) -> None:
    p = pair(2, **BY_CONTEXT)
    prompt = np.random.default_rng(1).integers(260, 500, 700).tolist()
    id_last = p.prompt(prompt)
    assert p.decodes() == ([700], [])  # a prompt alone costs the head nothing
    p.spec.draft(0, 700, id_last, 2)
    assert p.decodes() == ([], [WINDOW, 1])


def test_drafts_of_the_window_are_those_of_the_whole_prompt(pair: Callable[..., Pair]) -> None:
    """Bit for bit: what the drafter makes of the last window of rows, and a head that was shown every row."""
    p = pair(1, **BY_CONTEXT)
    n_past = 5 * WINDOW
    prompt = np.random.default_rng(2).integers(260, 500, n_past + 1).tolist()
    p.drafter.window = n_past  # for once the ring takes all rows, as material for the comparison
    p.prompt(prompt[:-1], keep=n_past)
    hidden = p.drafter._sequences[0].hidden.copy()
    batch = engine.Batch(WINDOW, n_embd_out=p.head.n_embd_out)

    def show(first: int) -> np.ndarray:
        """Pairs first .. n_past in batches of a window, the newest a full one; logits of the newest pair."""
        p.head.seq_rm(0, -1)
        for q in range(first, n_past + 1, WINDOW):
            n = min(WINDOW, n_past + 1 - q)
            p.head.seq_rm(0, -1, q - WINDOW + 1)  # three windows hold no more than one before and the batch
            batch.embd[:n] = hidden[q - 1 : q - 1 + n]
            p.head.decode(batch.set(prompt[q : q + n], q, 0))
        return p.head.logits().copy()

    whole = show(1)
    np.testing.assert_array_equal(show(n_past - WINDOW + 1), whole)
    assert not np.array_equal(show(n_past - WINDOW + 2), whole)  # one row less shows

    p.drafter.window = WINDOW
    p.spec.begin(0)
    p.drafter._sequences.clear()
    p.spec.process(0, 0, prompt[:-1], hidden)
    drafts = p.spec.draft(0, n_past, prompt[-1], 1)
    np.testing.assert_array_equal(p.head.logits(), whole)
    assert drafts == [int(whole.argmax())]


def test_the_heads_memory_does_not_grow(pair: Callable[..., Pair]) -> None:
    """Far past its own n_ctx, drafting goes on as right as ever, and the newest pair sees a whole window."""
    p = pair(2, acceptance=1.0)
    first = int(p.planted.cycle[0])
    id_last = p.prompt([first])
    text = []
    for token in p.greedy(id_last, 1, 1500):
        text.append(token)
        held = p.drafter._sequences[0]
        assert held.kv_lo <= max(1, held.kv_hi - WINDOW)
    assert text == p.planted.follow(id_last, len(text))
    stats = p.spec.stats()
    assert stats.accepted == stats.proposed
    assert p.head.n_ctx < 1000 < len(text)


def test_sequences_do_not_disturb_each_other(pair: Callable[..., Pair]) -> None:
    """Interleaved cycles of sequences of different text and length; one ends and starts anew."""
    p = pair(2, n_seq=3, n_ctx=512, acceptance=0.7)
    starts = [int(p.planted.cycle[i]) for i in (0, 50, 300)]
    lengths = [5, 150, 1]
    streams = []
    for seq_id, (start, n) in enumerate(zip(starts, lengths)):
        id_last = p.prompt([start, *p.planted.follow(start, n - 1)], seq_id=seq_id)
        assert id_last == p.planted.follow(start, n)[-1]
        streams.append(p.greedy(id_last, n, 200, seq_id))
    texts: list[list[int]] = [[] for _ in streams]
    for i in range(80):
        for seq_id, stream in enumerate(streams):
            texts[seq_id].append(next(stream))
        if i == 40:
            for _ in streams[0]:
                pass
            p.spec.begin(0)
            p.target.seq_rm(0, -1)
            streams[0] = p.greedy(p.prompt([starts[2]], seq_id=0), 1, 200, 0)
            texts[0] = []
    for seq_id, (start, n) in enumerate(zip(starts, lengths)):
        if seq_id == 0:
            start, n = starts[2], 1
        whole = p.planted.follow(start, 300)[n:]
        assert texts[seq_id] == whole[: len(texts[seq_id])]


def test_each_sequence_has_the_text_that_it_has_alone(pair: Callable[..., Pair]) -> None:
    """Here the context decides: a row that another sequence sees, or a rollback of the wrong one, shows."""
    p = pair(3, n_seq=3, n_ctx=512, **BY_CONTEXT)
    rng = np.random.default_rng(6)
    prompts = [rng.integers(260, 500, n).tolist() for n in (5, 150, 40, 70)]

    def alone(prompt: list[int], n: int) -> list[int]:
        context = p._models[0].new_context(n_ctx=512, n_threads=1, n_threads_batch=1)
        context.decode(p._batch.set(prompt, 0, 0))
        text = [context.best().id]
        for i in range(n - 1):
            context.decode(p._batch.set(text[-1:], len(prompt) + i, 0))
            text.append(context.best().id)
        context.close()
        return text

    def begin(prompt: list[int], seq_id: int) -> tuple[list[int], list[int], Iterator[int]]:
        id_last = p.prompt(prompt, seq_id=seq_id)
        return prompt, [id_last], p.greedy(id_last, len(prompt), 300, seq_id)

    streams = [begin(prompts[seq_id], seq_id) for seq_id in range(3)]
    ended = []
    for i in range(90):
        for seq_id, (_, text, stream) in enumerate(streams):
            if i % (seq_id + 1) == 0:  # each at a pace of its own
                text.append(next(stream))
        if i == 40:  # in the middle of whatever the others do
            ended.append(streams[1])
            p.spec.begin(1)
            p.target.seq_rm(1, -1)
            streams[1] = begin(prompts[3], 1)
    for prompt, text, _ in (*streams, *ended):
        assert len(text) > 20
        assert text == alone(prompt, len(text))
    stats = p.spec.stats()
    assert 0 < stats.accepted < stats.proposed


def test_a_refused_rollback_is_an_error(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    p = pair(2, acceptance=0.0)
    id_last = p.prompt([300, 301])
    drafts = p.spec.draft(0, 2, id_last, 2)
    verify = p.spec.verify(0, 2, id_last, drafts)
    monkeypatch.setattr(p.target, "seq_rm", lambda *_: False)
    with pytest.raises(RollbackRefused, match="positions 3 and up"):
        p.spec.accept(verify)


def test_cold_means_no_drafts(pair: Callable[..., Pair]) -> None:
    p = pair(2)
    assert p.spec.draft(0, 0, 300, 2) == []  # position 0 has no hidden row before it
    p.prompt([300, 301, 302])
    assert p.spec.draft(0, 7, 300, 2) == []  # rows that it was never shown
    assert len(p.spec.draft(0, 3, 300, 2)) == 2
    p.spec.begin(0)
    assert p.spec.draft(0, 3, 300, 2) == []


def test_limits_are_checked(pair: Callable[..., Pair]) -> None:
    p = pair(2, n_ctx=512)
    with pytest.raises(ValueError, match="rolls back 2 rows, 3 drafts need 3"):
        CommonSpeculative(p.target, p.drafter, n_draft=3)
    with pytest.raises(ValueError, match="n_draft is -1"):
        CommonSpeculative(p.target, p.drafter, n_draft=-1)
    p.prompt([300] * 509)
    assert len(p.spec.draft(0, 509, 300, 2)) == 2  # rows 509, 510 and 511 fill the context
    p.spec.begin(0)
    p.target.seq_rm(0, -1)
    p.prompt([300] * 510)
    assert len(p.spec.draft(0, 510, 300, 2)) == 1


def test_rows_shown_one_by_one_are_those_shown_at_once(pair: Callable[..., Pair]) -> None:
    """More rows than a window, without a draft on the way: the ring holds the newest of them."""
    text = np.random.default_rng(3).integers(260, 500, 301).tolist()
    found = []
    for step in (300, 1):
        p = pair(2, **BY_CONTEXT)
        rows = np.random.default_rng(4).standard_normal((300, p.target.n_embd_out)).astype(np.float32)
        for i in range(0, 300, step):
            p.spec.process(0, i, text[i : min(300, i + step)], rows[i : i + step])
        drafts = p.spec.draft(0, 300, text[300], 2)
        found.append((drafts, p.decodes()[1], p.head.logits().tolist()))
    assert found[0] == found[1]
    assert found[0][1] == [WINDOW, 1]


class Account(NoDrafter):
    """Knows up to which position it was told of text, and whether it drafted behind that."""

    end = rollbacks = 0
    drafted = False

    def process(self, seq_id: int, n_past: int, tokens: Sequence[int], hidden: engine.Floats) -> None:
        assert self.end <= n_past and not self.drafted
        self.end = n_past + len(tokens)

    def draft(self, seq_id: int, n_past: int, id_last: int, n_max: int, more: object = None) -> list[int]:
        self.drafted = True
        return []

    def rollback(self, seq_id: int, n_past: int) -> None:
        self.end, self.drafted = min(self.end, n_past), False
        self.rollbacks += 1


def test_a_drafter_takes_back_what_it_has_to_and_is_not_asked_for_nothing(pair: Callable[..., Pair]) -> None:
    target, drafter, none = pair(2).target, Account(), np.empty((0, 1), np.float32)
    spec = CommonSpeculative(target, drafter, n_draft=2)
    spec.process(0, 0, [300] * 4, none)
    drafter.rollbacks = 0
    for n_past in (4, 5, 6):
        spec.process(0, n_past, [300], none)
    assert drafter.rollbacks == 0
    spec.process(0, 4, [301], none)  # the text was cut
    spec.draft(0, 5, 302, 2)
    spec.process(0, 5, [302], none)
    target.decode(engine.Batch(8).set([300] * 6, 0, 0))
    verify = spec.verify(0, 6, 303, [304, 305], ready=True)
    verify.advance(304)
    spec.accept(verify)
    spec.process(0, 6, [306], none)  # and again
    spec.begin(0)
    spec.process(0, 0, [300], none)


@pytest.mark.parametrize("sliding", [True, False])
def test_a_head_that_fell_far_behind_starts_over_with_few_rows(pair: Callable[..., Pair], sliding: bool) -> None:
    p = pair(1, **BY_CONTEXT)
    p.drafter._sliding = sliding  # in truth it is: one that looks at everything would lose what it saw
    text = np.random.default_rng(3).integers(260, 500, 301).tolist()
    rows = np.random.default_rng(4).standard_normal((300, p.target.n_embd_out)).astype(np.float32)
    shown, at = [], 0
    for n in (200, 5, 16, 17, 1, 60, 1):
        p.spec.process(0, at, text[at : at + n], rows[at : at + n])
        at += n
        drafts = p.spec.draft(0, at, text[at], 1)
        shown += p.decodes()[1]
    assert shown == ([128, 6, 16, 16, 2, 16, 2] if sliding else [128, 6, 17, 18, 2, 61, 2])
    other = pair(1, **BY_CONTEXT)
    first = at - 17 if sliding else at - 128  # the pairs of 16 positions and of the one that came since
    other.spec.process(0, first, text[first:at], rows[first:at])
    assert other.spec.draft(0, at, text[at], 1) == drafts
    np.testing.assert_allclose(other.head.logits(), p.head.logits(), atol=0.02)


def test_behind_a_gap_only_what_follows_it_is_used(pair: Callable[..., Pair]) -> None:
    """Rows that someone else decoded have no hidden rows here; what lies before them is not joined to what follows."""
    p = pair(1)
    rows = np.ones((3, p.target.n_embd_out), np.float32)
    p.spec.process(0, 0, [300, 301, 302], rows)
    p.spec.process(0, 7, [310, 311], rows[:2])
    p.spec.draft(0, 9, 312, 1)
    assert p.decodes()[1] == [2]  # the pairs of positions 8 and 9
    p.spec.process(0, 20, [320], rows[:1])
    p.spec.draft(0, 21, 321, 1)
    assert p.decodes()[1] == [1]  # and the head's memory starts anew as well
    assert p.head.seq_pos_max(0) == 21


@pytest.mark.parametrize("at", [1, 2])
def test_an_exception_behind_a_decode_of_the_head_spoils_no_later_draft(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Its memory then holds rows that the drafter has not counted."""
    p = pair(3, acceptance=1.0)
    prompt = p.planted.cycle[:20].tolist()
    id_last = p.prompt(prompt)
    expected = p.spec.draft(0, 20, id_last, 3)
    p.drafter.rollback(0, 20)
    left, decode = [at], p.head.decode

    def interrupted(batch: engine.Batch) -> None:
        decode(batch)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(p.head, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        p.spec.draft(0, 20, id_last, 3)
    assert p.spec.draft(0, 20, id_last, 3) == expected == p.planted.follow(id_last, 3)
