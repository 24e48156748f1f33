"""MtpDraft as an app meets it: options, files that do not fit, lifetime, failures."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, engine, host
from tests.fixtures.planted import BY_CONTEXT, SMALL, TINY, Planted
from tests.text import generate

Make = Callable[..., Llama]
Plant = Callable[..., Planted]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such.gguf: no such file"):
        MtpDraft(tmp_path / "no-such.gguf")
    with pytest.raises(FileNotFoundError, match="it is a directory"):
        MtpDraft(tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("num_pred_tokens", -1, ValueError, "num_pred_tokens is -1, expected 0 or more"),
        ("num_pred_tokens", 2.5, TypeError, "num_pred_tokens is 2.5, expected an integer"),
        ("num_pred_tokens", True, TypeError, "num_pred_tokens is True, expected an integer"),
        ("p_min", "0.5", TypeError, "p_min is '0.5', expected a probability, 0 to 1"),
        ("p_min", 1.5, ValueError, "p_min is 1.5, expected a probability, 0 to 1"),
        ("p_min", float("nan"), ValueError, "p_min is nan, expected a probability"),
        ("margin", "x", TypeError, "margin is 'x', expected a number of 0 or more"),
        ("margin", 10**400, ValueError, "margin is an integer that no float holds, expected a number of 0"),
        ("margin", -1, ValueError, "margin is -1, expected a number of 0 or more"),
        ("exact", "yes", TypeError, "exact is 'yes', expected True or False"),
        ("report", 1, TypeError, "report is 1, expected True or False"),
        ("n_gpu_layers", "1", TypeError, "n_gpu_layers is '1', expected an integer"),
        ("n_gpu_layers", -2, ValueError, "n_gpu_layers is -2, expected -1 to 2147483647"),
        ("n_gpu_layers", 2**31, ValueError, "n_gpu_layers is 2147483648, expected -1 to 2147483647"),
        ("n_threads", -3, ValueError, "n_threads is -3, expected 1 to 512"),
        ("n_threads", 0, ValueError, "n_threads is 0, expected 1 to 512"),
        ("n_threads_batch", 10000, ValueError, "n_threads_batch is 10000, expected 1 to 512"),
        ("n_threads_batch", 1.0, TypeError, "n_threads_batch is 1.0, expected an integer"),
        ("model_path", 5, TypeError, "model_path is 5, expected the path of an MTP GGUF"),
        ("model_path", "", ValueError, "model_path is '', expected the path of an MTP GGUF"),
        ("model_path", "a\0b", FileNotFoundError, "no such file"),
    ],
)
def test_options_are_checked(plant: Plant, option: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^MtpDraft: .*{message}"):
        MtpDraft(**{"model_path": plant().mtp, option: value})


def test_options_of_other_types_are_taken_for_what_they_are(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    head = plant().mtp
    draft = MtpDraft(os.fsencode(head), num_pred_tokens=np.int64(3), p_min=np.float32(0.5), margin=1)
    assert (draft.model_path, draft.num_pred_tokens, draft.p_min, draft.margin) == (str(head), 3, 0.5, 1.0)
    assert type(draft.num_pred_tokens) is int and type(draft.p_min) is type(draft.margin) is float
    assert MtpDraft(head, num_pred_tokens=None).num_pred_tokens == 3
    monkeypatch.setenv("HOME", str(head.parent))
    assert MtpDraft(f"~/{head.name}").model_path == str(head)


def test_a_relative_path_stays_what_it_was(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = plant()
    monkeypatch.chdir(files.mtp.parent)
    draft = MtpDraft(files.mtp.name)
    monkeypatch.chdir(tmp_path)
    assert len(generate(llama(files.trunk, draft_model=pickle.loads(pickle.dumps(draft))), [300], 5)) == 5
    assert draft.model_path == str(files.mtp)


def test_a_path_through_a_symbolic_link_is_the_systems_own(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "below")
    head = tmp_path / "real" / "head.gguf"
    head.write_bytes(plant().mtp.read_bytes())
    assert Path(MtpDraft(f"{tmp_path}/link/../head.gguf").model_path).samefile(head)


def test_options_are_fixed_and_shown(plant: Plant) -> None:
    head = plant().mtp
    assert repr(MtpDraft(head)) == repr(MtpDraft(head, num_pred_tokens=3, adaptive=True)) == f"MtpDraft({str(head)!r})"
    assert repr(MtpDraft(head, num_pred_tokens=2)) == f"MtpDraft({str(head)!r}, num_pred_tokens=2)"
    assert repr(MtpDraft(head, adaptive=False)) == f"MtpDraft({str(head)!r}, num_pred_tokens=3)"
    draft = MtpDraft(head, num_pred_tokens=5, adaptive=True)
    assert repr(draft) == f"MtpDraft({str(head)!r}, num_pred_tokens=5, adaptive=True)"
    draft = MtpDraft(head, num_pred_tokens=3, margin=2.0)
    assert repr(draft) == f"MtpDraft({str(head)!r}, num_pred_tokens=3, margin=2.0)"
    for name in ("model_path", "num_pred_tokens", "p_min", "report"):
        with pytest.raises(AttributeError, match=f"MtpDraft.{name} is fixed: make another MtpDraft"):
            setattr(draft, name, 1)
    for twin in (copy.copy(draft), copy.deepcopy(draft), pickle.loads(pickle.dumps(draft))):
        assert repr(twin) == repr(draft)


def test_a_trunk_is_not_a_head(llama: Make, plant: Plant) -> None:
    files = plant()
    with pytest.raises(ValueError, match="has no MTP .NextN. block"):
        llama(files.trunk, draft_model=MtpDraft(files.trunk))


def test_a_head_of_another_model_is_refused(llama: Make, plant: Plant) -> None:
    with pytest.raises(ValueError, match="does not belong to"):
        llama(plant(config=TINY).trunk, draft_model=MtpDraft(plant(config=SMALL).mtp))


def test_a_draft_serves_one_llama_at_a_time(llama: Make, plant: Plant) -> None:
    files = plant()
    draft = MtpDraft(files.mtp, num_pred_tokens=2)
    first = llama(files.trunk, draft_model=draft)
    with pytest.raises(ValueError, match="in use by another Llama"):
        llama(files.trunk, draft_model=draft)
    assert len(generate(first, [300], 5)) == 5
    first.close()
    assert len(generate(llama(files.trunk, draft_model=draft), [300], 5)) == 5


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copied_llama_has_a_draft_of_its_own(llama: Make, plant: Plant, make: Callable[[Llama], Llama]) -> None:
    files = plant(acceptance=0.8)
    prompt = files.cycle[:4].tolist()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    generate(llm, prompt, 10)
    twin = make(llm)
    try:
        assert generate(twin, prompt, 50) == files.follow(prompt[-1], 50)
        assert twin.draft_model.stats.depth == 3 and twin.draft_model.stats.accepted > 0
    finally:
        twin.close()
    assert generate(llm, prompt, 50) == files.follow(prompt[-1], 50)


def test_a_draft_in_use_is_refused_before_the_model_is_loaded(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = MtpDraft(plant().mtp)
    llama(plant().trunk, draft_model=draft)
    monkeypatch.delattr(llama_cpp._internals, "LlamaModel")
    with pytest.raises(ValueError, match="in use by another Llama"):
        llama(plant().trunk, draft_model=draft)


def test_zero_tokens_draft_none(llama: Make, plant: Plant) -> None:
    files = plant()
    draft = MtpDraft(files.mtp, num_pred_tokens=0, checkpoints_mb=0)
    llm = llama(files.trunk, draft_model=draft)
    assert generate(llm, [300], 20) == generate(llama(files.trunk), [300], 20)
    assert draft.stats.iters == 0
    assert llm.context_params.n_rs_seq == 0
    assert "_ds4_mtp" not in llm.__dict__  # not even for checkpoints


@pytest.mark.parametrize("options", [{"embedding": True}, {"vocab_only": True}])
def test_where_speculation_has_no_place_it_stays_off(llama: Make, plant: Plant, options: dict[str, bool]) -> None:
    files = plant()
    with pytest.warns(RuntimeWarning, match="no speculation"):
        llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2), **options)
    assert "_ds4_mtp" not in llm.__dict__


def test_stats_outlive_the_llama_and_the_report_is_printed(
    llama: Make, plant: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    files = plant()
    draft = MtpDraft(files.mtp, num_pred_tokens=2, report=True)
    llm = llama(files.trunk, draft_model=draft)
    generate(llm, [300], 30)
    stats = draft.stats
    assert stats.iters == 10 and stats.draft_decodes == 20 and stats.verify_ms > 0 and stats.draft_ms > 0
    llm.close()
    llm.close()
    assert draft.stats == stats
    assert capsys.readouterr().err.count(f"ds4_mtp_plugin: {stats}\n") == 1
    quiet = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    generate(quiet, [300], 30)
    quiet.close()
    assert "mtp accept" not in capsys.readouterr().err


def test_a_dropped_llama_is_freed_at_once(plant: Plant) -> None:
    files = plant()
    gc.collect()
    gc.disable()
    try:
        llm = Llama(str(files.trunk), n_ctx=512, verbose=False, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
        generate(llm, [300], 10)
        gone = weakref.ref(llm)
        del llm
        assert gone() is None
    finally:
        gc.enable()


def test_a_generation_dropped_after_the_close_touches_nothing(llama: Make, plant: Plant) -> None:
    files = plant()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    generation = llm.generate([300], temp=0.0)
    next(generation), next(generation)
    llm.close()
    generation.close()


def test_a_generation_that_goes_on_after_the_close_is_an_error(llama: Make, plant: Plant) -> None:
    """Not the end of the process, which it is without a draft."""
    files = plant()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    generation = llm.generate([300], temp=0.0)
    next(generation), next(generation)
    llm.close()
    with pytest.raises(RuntimeError, match="the Llama is closed"):
        next(generation)


def test_a_draft_pickles_as_its_options(plant: Plant) -> None:
    draft = MtpDraft(plant().mtp, num_pred_tokens=3, report=True)
    copy = pickle.loads(pickle.dumps(draft))
    assert (copy.model_path, copy.num_pred_tokens, copy.report) == (draft.model_path, 3, True)


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize(
    "where", ["verify", "verify, memory", "hidden rows", "draft", "draft's row", "head's hidden row", "rollback"]
)
def test_a_failure_inside_is_told_once_and_changes_no_text(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    files = plant(**BY_CONTEXT)  # a text that a wrong evaluation changes
    plain = generate(llama(files.trunk), [300, 301, 302], 80)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    spec = llm._ds4_mtp._spec
    calls = 0

    def failing(original: Callable[..., object], result: object) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                if where == "verify, memory":
                    llama_cpp.llama_memory_clear(llm._ctx.memory, True)
                if isinstance(result, Exception):
                    raise result
                return result
            return original(*args, **kwargs)

        return call

    head = spec.drafter._context
    owner, name, result = {
        "verify": (spec.target, "decode", engine.DecodeError("injected", -3)),
        "verify, memory": (spec.target, "decode", engine.DecodeError("injected, and the memory with it", -3)),
        "hidden rows": (spec.target, "hidden_rows", engine.NoSuchRow("injected")),  # the prompt's come first
        "draft": (head, "decode", engine.DecodeError("injected", -3)),
        "draft's row": (head, "best", engine.NoSuchRow("injected")),
        "head's hidden row": (head, "hidden", engine.NoSuchRow("injected")),
        "rollback": (spec.target, "seq_rm", False),
    }[where]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), result))
    with pytest.warns(RuntimeWarning, match="decoding plainly") as caught:
        assert generate(llm, [300, 301, 302], 80) == plain
    assert len(caught) == 1
    assert calls == at + 1
    stats = spec.stats()
    assert stats.failures == 1
    assert stats.plain + stats.iters + stats.accepted >= 79  # every token that was evaluated is accounted for
    before = stats.iters
    assert generate(llm, [300], 80) == generate(llama(files.trunk), [300], 80)
    assert spec.stats().iters > before  # the next generation drafts again


@pytest.mark.parametrize("what", ["BOS", "EOS", "chance", "no token"])
def test_whatever_is_drafted_the_text_is_plain(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    rng = np.random.default_rng(1)
    draft: dict[str, Callable[[], int]] = {
        "BOS": llm.token_bos,
        "EOS": llm.token_eos,
        "chance": lambda: int(rng.integers(512)),
        "no token": lambda: 10**6,
    }
    monkeypatch.setattr(llm._ds4_mtp._spec.drafter, "draft", lambda *args: [draft[what]() for _ in range(args[3])])
    assert generate(llm, [300, 301, 302], 80) == generate(llama(files.trunk), [300, 301, 302], 80)
    stats = llm.draft_model.stats
    assert (stats.failures, stats.iters > 70) == (0, what != "no token")


@pytest.mark.parametrize("what", ["the model", "a context", "rollback"])
def test_memory_refused_for_the_head_leaves_a_plain_llama(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    files = plant(**BY_CONTEXT)
    plain = generate(llama(files.trunk), [300, 301, 302], 60)
    with monkeypatch.context() as patch:
        lib = engine.Library(host.library_path()).lib
        if what == "rollback":
            create = llama_cpp._internals.llama_cpp.llama_init_from_model
            patch.setattr(
                llama_cpp._internals.llama_cpp,
                "llama_init_from_model",
                lambda model, params: None if params.n_rs_seq else create(model, params),
            )
        else:
            name = {"the model": "ds4_mtp_load_head", "a context": "llama_init_from_model"}[what]
            patch.setattr(engine.Library, "lib", property(lambda _: Refusing(lib, name)), raising=False)
        draft = MtpDraft(files.mtp, num_pred_tokens=2)
        with pytest.warns(RuntimeWarning, match="no speculation: the engine could not") as caught:
            llm = llama(files.trunk, draft_model=draft)
    assert len(caught) == 1
    assert generate(llm, [300, 301, 302], 60) == plain
    assert draft.stats.iters == 0
    assert [llm._ctx.kv_cache_seq_rm(-1, p0, -1) for p0 in (llm.n_tokens - 1, 5)] == [False, False]
    llm.close()
    again = llama(files.trunk, draft_model=draft)  # the draft is free for a Llama that there is memory for
    assert generate(again, [300, 301, 302], 60) == plain
    assert draft.stats.accepted > 0


class Refusing:
    """The library, but that the function `name` returns null."""

    def __init__(self, lib: object, name: str) -> None:
        self._lib, self._name = lib, name

    def __getattr__(self, name: str) -> object:
        return (lambda *_: engine.ffi.NULL) if name == self._name else getattr(self._lib, name)


@pytest.mark.parametrize("at", range(6))
def test_a_rollback_that_the_head_refuses_costs_no_text_and_no_warning(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, at: int
) -> None:
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    head, calls = llm._ds4_mtp._spec.drafter._context, 0
    seq_rm = head.seq_rm

    def refusing(seq_id: int, p0: int, p1: int = -1) -> bool:
        nonlocal calls
        calls += p0 > 0
        return False if calls == at + 1 and p0 > 0 else seq_rm(seq_id, p0, p1)

    monkeypatch.setattr(head, "seq_rm", refusing)
    assert generate(llm, [300, 301, 302], 80) == generate(llama(files.trunk), [300, 301, 302], 80)
    assert calls > at + 1 and llm.draft_model.stats.accepted > 0
    assert not [warning for warning in recwarn if "MtpDraft" in str(warning.message)]


@pytest.mark.parametrize("at", range(3))
def test_a_head_that_keeps_what_it_should_drop_costs_no_text(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Far into a text its memory, of one size, drops what no query sees any more: here it refuses to."""
    files = plant(acceptance=1.0)
    draft = MtpDraft(files.mtp, num_pred_tokens=3)
    llm = llama(files.trunk, n_ctx=2304, draft_model=draft)
    head, calls = llm._ds4_mtp._spec.drafter._context, 0
    seq_rm = head.seq_rm

    def refusing(seq_id: int, p0: int, p1: int = -1) -> bool:
        nonlocal calls
        calls += p1 > 0
        return False if calls == at + 1 and p1 > 0 else seq_rm(seq_id, p0, p1)

    monkeypatch.setattr(head, "seq_rm", refusing)
    prompt = files.cycle[:3].tolist()
    with pytest.warns(RuntimeWarning, match="refused to remove positions below") as caught:
        assert generate(llm, prompt, 1300) == files.follow(prompt[-1], 1300)
    assert len(caught) == 1
    before = draft.stats.accepted
    assert generate(llm, prompt, 100) == files.follow(prompt[-1], 100)
    assert draft.stats.accepted > before


@pytest.mark.parametrize("at", range(9))
def test_a_drafter_closed_in_the_middle_costs_no_text(llama: Make, plant: Plant, at: int) -> None:
    files = plant(**BY_CONTEXT)
    plain = generate(llama(files.trunk), [300, 301, 302], 60)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    generation = llm.generate([300, 301, 302], temp=0.0)
    tokens = [next(generation) for _ in range(at)]
    llm._ds4_mtp._spec.drafter.close()
    with pytest.warns(RuntimeWarning, match="the drafter is closed") as caught:
        tokens += [next(generation) for _ in range(60 - at)]
        generation.close()
        assert generate(llm, [300, 301, 302], 60) == plain
    assert tokens == plain
    assert len(caught) == 1
    assert llm.draft_model.stats.failures == 2


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("what", ["the Llama", "its model", "its context"])
def test_a_model_freed_in_the_middle_is_an_error_and_not_the_end(llama: Make, plant: Plant, what: str, at: int) -> None:
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    generation = llm.generate([300, 301, 302], temp=0.0)
    for _ in range(at):
        next(generation)
    {"the Llama": llm, "its model": llm._model, "its context": llm._ctx}[what].close()
    if at:
        with pytest.raises(RuntimeError, match="the Llama is closed"):
            next(generation)
    generation.close()
    with pytest.raises(RuntimeError, match="the Llama is closed"):
        llm.eval([300])
    llm.close()


@pytest.mark.parametrize("at", range(1, 8))
def test_a_reevaluation_that_fails_is_tried_again(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Memory is refused for the verify, and then for what is to replace it; later there is some."""
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, n_batch=8, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    target, decode = llm._ds4_mtp._spec.target, llm._ctx.decode
    prompt = list(range(300, 330))
    generation = llm.generate(prompt, temp=0.0)
    tokens = [next(generation) for _ in range(at)]
    calls = 0

    def failing(batch: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("llama_decode returned -2")
        decode(batch)

    def refused(batch: object) -> None:
        raise engine.DecodeError("injected", -2)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="returned -2"):
        patch.setattr(target, "decode", refused)
        patch.setattr(llm._ctx, "decode", failing)
        while True:
            tokens.append(next(generation))
    text = prompt + tokens
    assert llm.n_tokens == len(text) - 1 and llm._input_ids.tolist() == text[:-1]
    llm.eval(text[-1:])
    assert target.seq_pos_max(0) == llm.n_tokens - 1
    assert [llm.sample(temp=0.0)] == generate(llama(files.trunk), text, 1)
    assert generate(llm, text, 40) == generate(llama(files.trunk), text, 40)


def test_a_prompt_whose_decode_takes_the_memory_with_it_is_evaluated_again(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, n_batch=8, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    decode, calls = llm._ctx.decode, 0

    def failing(batch: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            llama_cpp.llama_memory_clear(llm._ctx.memory, True)
            raise RuntimeError("llama_decode returned -3")
        decode(batch)

    prompt = list(range(300, 330))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="returned -3"):
        patch.setattr(llm._ctx, "decode", failing)
        llm.eval(prompt)
    assert llm.n_tokens == 16
    assert generate(llm, prompt, 40) == generate(llama(files.trunk), prompt, 40)


def test_what_an_app_has_cut_off_is_not_evaluated_again(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    prompt = list(range(300, 330))
    llm.eval(prompt)

    def failing(_: object) -> None:
        llama_cpp.llama_memory_clear(llm._ctx.memory, True)
        raise RuntimeError("llama_decode returned -3")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="returned -3"):
        patch.setattr(llm._ctx, "decode", failing)
        llm.eval([400])
    llm.n_tokens = 20
    fresh = llama(files.trunk)
    fresh.eval(prompt[:20])

    def go_on(llm: Llama) -> list[int]:
        generation = llm.generate([345], temp=0.0, reset=False)
        return [next(generation) for _ in range(40)]

    assert go_on(llm) == go_on(fresh)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("where", ["verify", "rollback"])
def test_rows_that_only_the_app_knows_are_not_made_up(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, where: str, saved: bool
) -> None:
    """A picture's rows have no tokens: where the engine lost them, an error says so, and the next prompt is right."""
    files = plant(acceptance=0.3)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    target = llm._ds4_mtp._spec.target
    llm.eval([300, 301, 302])
    batch = llama_cpp._internals.LlamaBatch(n_tokens=4, embd=0, n_seq_max=1)
    batch.set_batch([310, 311, 312, 313], 3, False)
    llama_cpp.llama_decode(llm.ctx, batch.batch)
    llm.n_tokens = 7
    llm.eval([320])
    if saved:
        state = llm.save_state()
        llm.reset()
        llm.load_state(state)

    def refused(*_: object) -> bool:
        if where == "verify":
            raise engine.DecodeError("injected", -3)
        return False

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="only 3 of the "):
        patch.setattr(target, "decode" if where == "verify" else "seq_rm", refused)
        for _ in llm.generate([330], reset=False, temp=0.0):
            pass
    assert (llm.n_tokens, target.seq_pos_max(0)) == (0, -1)
    assert generate(llm, files.cycle[:9].tolist(), 40) == files.follow(int(files.cycle[8]), 40)


@pytest.mark.parametrize("where", ["verify", "draft"])
def test_an_interrupt_inside_a_cycle_is_survived(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, where: str, recwarn: pytest.WarningsRecorder
) -> None:
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    spec = llm._ds4_mtp._spec
    context = spec.target if where == "verify" else spec.drafter._context
    decode, calls = context.decode, 0

    def interrupted(batch: engine.Batch) -> None:
        nonlocal calls
        decode(batch)
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(context, "decode", interrupted)
    prompt, tokens = [300, 301, 302], []
    with pytest.raises(KeyboardInterrupt):
        for token in llm.generate(prompt, temp=0.0):
            tokens.append(token)
    assert len(tokens) > 2
    longer = prompt + tokens
    plain = llama(files.trunk)
    plain.eval(prompt)
    for token in tokens[:-1]:
        plain.eval([token])
    for each in (llm, plain):  # the token whose evaluation was interrupted, and one more
        each.eval([tokens[-1], 400])
    assert llm.n_tokens == plain.n_tokens
    assert llm.sample(temp=0.0) == plain.sample(temp=0.0)
    np.testing.assert_array_equal(
        spec.target.logits(), np.ctypeslib.as_array(plain._ctx.get_logits(), (spec.target.n_vocab,))
    )
    before = spec.stats().accepted
    assert generate(llm, longer, 100) == generate(llama(files.trunk), longer, 100)
    assert spec.stats().accepted > before
    assert not [warning for warning in recwarn if "MtpDraft" in str(warning.message)]  # nothing failed on the way


def test_an_app_may_take_the_draft_away_and_put_it_back(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    draft = MtpDraft(files.mtp, num_pred_tokens=2)
    llm = llama(files.trunk, draft_model=draft)
    text = generate(llm, [300], 40)
    iters = draft.stats.iters
    llm.draft_model = None
    assert generate(llm, [300], 40) == text
    assert (draft.stats.iters, llm.draft_model) == (iters, None)
    llm.draft_model = draft
    assert generate(llm, [300], 40) == text
    assert draft.stats.iters == 2 * iters


def test_a_stale_generation_that_is_dropped_disturbs_nothing(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a client hangs up and its stream is freed while another request is in a verify."""
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    stale = [llm.generate([310, 311], temp=0.0)]
    next(stale[0]), next(stale[0])
    target = llm._ds4_mtp._spec.target
    decode, calls = target.decode, 0

    def dropping(batch: engine.Batch) -> None:
        nonlocal calls
        decode(batch)
        calls += 1
        if calls == 3:
            stale.clear()

    monkeypatch.setattr(target, "decode", dropping)
    assert generate(llm, [300, 301], 80) == generate(llama(files.trunk), [300, 301], 80)
    assert not stale


@pytest.mark.parametrize("where", ["accept", "commit"])
def test_an_interrupt_between_memory_and_account_is_survived(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    files = plant(**BY_CONTEXT)
    llm = llama(files.trunk, logits_all=True, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    spec, calls = llm._ds4_mtp._spec, 0

    def interrupting(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt
            return original(*args)

        return call

    if where == "accept":
        monkeypatch.setattr(spec.target, "seq_rm", interrupting(spec.target.seq_rm))
    else:
        monkeypatch.setattr(spec.target, "logits", interrupting(spec.target.logits))
    tokens = []
    with pytest.raises(KeyboardInterrupt):
        for token in llm.generate([300, 301, 302], temp=0.0):
            tokens.append(token)
    llm.eval([400])
    assert spec.target.seq_pos_max(0) == llm.n_tokens - 1
    text = llm.input_ids[: llm.n_tokens].tolist()
    plain = llama(files.trunk)
    plain.eval(text)
    assert llm.sample(temp=0.0) == plain.sample(temp=0.0)


def test_a_state_that_cannot_be_loaded_leaves_the_generation_as_it_is(llama: Make, plant: Plant) -> None:
    files = plant(**BY_CONTEXT)
    other = llama(files.trunk, logits_all=True)
    other.eval([300, 301, 302])
    state = other.save_state()
    state.scores = state.scores[:, :5]

    def run(llm: Llama) -> list[int]:
        generation = llm.generate([300, 301, 302], temp=0.0)
        tokens = [next(generation) for _ in range(6)]
        with pytest.raises(ValueError):
            llm.load_state(state)
        tokens += [next(generation) for _ in range(40)]
        generation.close()
        return tokens

    assert run(llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))) == run(llama(files.trunk))


def test_a_state_whose_rows_cannot_be_loaded_is_evaluated(llama: Make, plant: Plant) -> None:
    """By then the host has taken the state's tokens, and the engine part of its rows."""
    files = plant(**BY_CONTEXT)
    fresh, llm = llama(files.trunk), llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=3))
    fresh.eval(list(range(300, 340)))
    state = fresh.save_state()
    state.llama_state = state.llama_state[: len(state.llama_state) // 2] + bytes(len(state.llama_state) // 2)
    llm.eval([310, 311, 312])
    with pytest.raises((RuntimeError, ValueError)):
        llm.load_state(state)
    assert llm.n_tokens == 40

    def go_on(llm: Llama) -> list[int]:
        generation = llm.generate([345], temp=0.0, reset=False)
        return [next(generation) for _ in range(40)]

    assert go_on(llm) == go_on(fresh)


def test_a_warning_that_is_raised_leaves_a_whole_llama(
    llama: Make, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plant(acceptance=0.0)
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    target = llm._ds4_mtp._spec.target
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(target, "seq_rm", lambda *_: False)
        with pytest.raises(RuntimeWarning, match="decoding plainly"):
            generate(llm, files.cycle[:3].tolist(), 20)
    assert target.seq_pos_max(0) == llm.n_tokens - 1
    assert generate(llm, files.cycle[:3].tolist(), 20) == files.follow(int(files.cycle[2]), 20)


def test_a_second_init_frees_the_first_head(llama: Make, plant: Plant) -> None:
    files = plant()
    llm = llama(files.trunk, draft_model=MtpDraft(files.mtp, num_pred_tokens=2))
    first = llm.draft_model
    llm.__setstate__({**llm.__getstate__(), "draft_model": MtpDraft(files.mtp, num_pred_tokens=2)})
    assert first._spec is None and llm.draft_model is not first
    assert generate(llm, [300], 20) == generate(llama(files.trunk), [300], 20)
