"""Heads of other families, in the model's file and beside it: the text is plain's, and what is drafted is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from ds4_mtp_plugin import MtpDraft, NgramDraft
from ds4_mtp_plugin.gguf import check_inside
from ds4_mtp_plugin.gguf.families import FAMILIES
from ds4_mtp_plugin.host.wraps import session_of
from tests.fixtures import GPU_LAYERS
from tests.fixtures.mtp_gguf import Planted as Family
from tests.fixtures.mtp_gguf import plant as plant_family
from tests.fixtures.planted import Planted
from tests.host.lives import Resting
from tests.text import check_plain, generate, text_and_logits

Make = Callable[..., Llama]
Plant = Callable[..., Planted]

HYBRID = ("qwen35", "qwen35moe", "qwen3next", "nemotron_h_moe", "bailingmoe3")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, directory: Path) -> Family:
    return plant_family(directory, request.param)


@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 1.0}], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "options",
    [{"num_pred_tokens": 1}, {"num_pred_tokens": 3}, {"num_pred_tokens": 3, "adaptive": True}],
    ids=["1", "3", "automatic"],
)
def test_text_and_logits_are_plain(
    llama: Make, family: Family, options: dict[str, Any], sampling: dict[str, Any]
) -> None:
    found = []
    for draft in (None, MtpDraft(**options)):
        llm = llama(family.trunk, draft_model=draft, seed=7, n_ctx=1024)
        found.append(text_and_logits(llm, family.prompt(40), 150, **sampling))
    assert draft is not None and draft.stats.failures == 0
    check_plain(*found, exact=draft.stats.exact)
    assert draft.stats.exact == (GPU_LAYERS == 0)
    assert draft.adaptive or draft.stats.accepted > 20  # on a busy machine drafts may not pay


@pytest.mark.parametrize("options", [{}, {"n_batch": 128, "n_ubatch": 64}, {"n_batch": 96}], ids=str)
@pytest.mark.parametrize("n_prompt", [600, 700])
def test_prompts_of_several_batches(llama: Make, family: Family, options: dict[str, Any], n_prompt: int) -> None:
    """Hidden rows of all tokens are kept at their end, and their last logits are those without."""
    found = []
    for draft in (None, MtpDraft(num_pred_tokens=3)):
        llm = llama(family.trunk, draft_model=draft, n_ctx=1024, **options)
        found.append(text_and_logits(llm, family.prompt(n_prompt, seed=n_prompt), 60))
    check_plain(*found, exact=GPU_LAYERS == 0)


def test_a_draft_that_is_taken_off_leaves_plain_logits(llama: Make, family: Family) -> None:
    found = []
    for draft in (None, MtpDraft()):
        llm = llama(family.trunk, draft_model=draft)
        llm.draft_model = None
        found.append(text_and_logits(llm, family.prompt(300), 20))
    check_plain(*found, exact=GPU_LAYERS == 0)


def test_each_draft_is_made_from_the_right_hidden_row(llama: Make, family: Family) -> None:
    """Given that of another token the head is wrong: at once, or behind its first draft."""
    llm = llama(family.trunk, draft_model=MtpDraft(num_pred_tokens=3), n_ctx=1024)
    text = generate(llm, family.prompt(40), 400)
    stats = llm.draft_model.stats
    as_planted = sum(family.first[a] == b for a, b in zip(text, text[1:])) / len(text)
    first, second, third = stats.rate_per_position
    assert first > as_planted**2 - 0.1 and second > first * (as_planted - 0.15) and third > second * (as_planted - 0.2)


def test_behind_a_rest_each_draft_is_the_one_without(llama: Make, family: Family) -> None:
    """Rows of tokens at which speculation did not look reach the head all the same."""
    made: list[dict[int, list[int]]] = []
    for rest in (0, 4):
        llm = llama(family.trunk, draft_model=MtpDraft(num_pred_tokens=3, ngram=False), n_ctx=1024)
        session, found = session_of(llm), {}
        assert session is not None
        session.choose_by(Resting(rest))
        draft = session._spec.draft

        def noted(seq_id: int, n_past: int, *args: Any, found: Any = found, draft: Any = draft) -> list[int]:
            found[n_past] = draft(seq_id, n_past, *args)
            return list(found[n_past])

        session._spec.draft = noted  # type: ignore[method-assign]
        generate(llm, family.prompt(40), 700)
        made.append(found)
    both = made[0].keys() & made[1].keys()
    assert len(both) > 4 and all(made[0][p] == made[1][p] for p in both)


def test_several_heads_make_one_draft_each(llama: Make, directory: Path) -> None:
    """Of a family that may have one or several."""
    for n_heads in (1, 2):
        files = plant_family(directory, "hy_v3", n_heads=n_heads)
        llm = llama(files.trunk, draft_model=MtpDraft(num_pred_tokens=3), n_ctx=1024)
        text = generate(llm, files.prompt(40), 200)
        stats = llm.draft_model.stats
        assert len(stats.rate_per_position) == (3 if n_heads == 1 else n_heads)
        as_planted = sum(files.first[a] == b for a, b in zip(text, text[1:])) / len(text)
        first, second = stats.rate_per_position[:2]
        assert first > as_planted**2 - 0.1 and second > first * (as_planted - 0.15)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_head_beside_the_model_does_the_same(llama: Make, directory: Path, architecture: str) -> None:
    inside, beside = plant_family(directory, architecture), plant_family(directory, architecture, beside=True)
    texts, stats = [], []
    for files in (inside, beside):
        draft = MtpDraft(files.head, num_pred_tokens=2)
        llm = llama(files.trunk, draft_model=draft, n_ctx=1024)
        texts.append(generate(llm, files.prompt(40), 100))
        stats.append(draft.stats)
    assert texts[0] == texts[1]
    assert stats[0].accepted_per_position == stats[1].accepted_per_position


def test_a_chat_goes_on(llama: Make, family: Family) -> None:
    """Prompts that begin as the one before, and answers that are dropped."""
    plain, ours = (llama(family.trunk, draft_model=draft, n_ctx=2048, n_batch=256) for draft in (None, MtpDraft()))
    text = family.prompt(900)
    for prompt in (text[:600], text[:700], [*text[:650], *family.prompt(50, seed=1)], text[:300], text):
        answers = [text_and_logits(llm, prompt, 40) for llm in (plain, ours)]
        check_plain(*answers, exact=GPU_LAYERS == 0)
    stats = ours.draft_model.stats
    assert stats.failures == 0 and (stats.resumed > 0) == (family.architecture in HYBRID and GPU_LAYERS == 0)


def test_states(llama: Make, family: Family) -> None:
    prompt = family.prompt(80)
    plain, ours = (llama(family.trunk, draft_model=draft, n_ctx=512) for draft in (None, MtpDraft(num_pred_tokens=2)))
    texts = []
    for llm in (plain, ours):
        first = generate(llm, prompt, 30)
        state = llm.save_state()
        on = generate(llm, [*prompt, *first], 30)
        llm.load_state(state)
        texts.append((first, on, generate(llm, [*prompt, *first], 30)))
    assert texts[0] == texts[1]
    assert ours.draft_model.stats.failures == 0


@pytest.mark.parametrize("architecture", FAMILIES)
def test_drafts_from_the_text(llama: Make, directory: Path, architecture: str) -> None:
    """For a hybrid model there are few: each costs a copy of its states in every decode."""
    files = plant_family(directory, architecture, noise=0.05)  # its text goes round in a circle
    found = []
    for draft in (None, NgramDraft(adaptive=False)):  # on a busy machine drafts may not pay
        llm = llama(files.trunk, draft_model=draft, n_ctx=1024)
        found.append(text_and_logits(llm, files.prompt(40), 300))
    assert found[0][0] == found[1][0]
    if GPU_LAYERS == 0:
        np.testing.assert_array_equal(found[0][1], found[1][1])
    stats = llm.draft_model.stats
    assert stats.ngram_accepted > 60 and llm._ds4_mtp._spec.n_draft == (3 if architecture in HYBRID else 16)


@pytest.mark.skipif(GPU_LAYERS != 0, reason="exact on the CPU")
@pytest.mark.parametrize("flash", [False, True])
def test_exact_is_said_where_it_holds(llama: Make, directory: Path, flash: bool) -> None:
    """Flash attention computes a single row in other parts than several, except where there are sinks."""
    files = plant_family(directory, "glm4moe")
    llm = llama(files.trunk, draft_model=MtpDraft(), flash_attn=flash)
    assert llm.draft_model.stats.exact == (not flash)
    if flash:
        with pytest.raises(ValueError, match="flash_attn"):
            llama(files.trunk, draft_model=MtpDraft(exact=True), flash_attn=True)


def test_without_a_path_the_head_has_to_be_in_the_model_s_file(llama: Make, plant: Plant, directory: Path) -> None:
    beside = plant_family(directory, "glm4moe", beside=True)
    with pytest.raises(ValueError, match=r"glm4moe.*gguf has no MTP block in it\. Take a GGUF that has one"):
        llama(beside.trunk, draft_model=MtpDraft())
    with pytest.raises(ValueError, match="has no MTP block in it"):
        llama(plant().trunk, draft_model=MtpDraft())
    inside = plant_family(directory, "glm4moe")
    with pytest.raises(ValueError, match=r"give it to the Llama, and the draft no path: MtpDraft\(\)"):
        MtpDraft(inside.trunk)
    with pytest.raises(ValueError, match=r"n_gpu_layers is 1, but without a path"):
        MtpDraft(n_gpu_layers=1)
    assert repr(MtpDraft()) == "MtpDraft()"
    # A head of its own goes before the one in the model.
    llm = llama(inside.trunk, draft_model=MtpDraft(beside.head, num_pred_tokens=1))
    generate(llm, inside.prompt(20), 30)
    assert llm.draft_model.stats.accepted > 0


def test_without_a_draft_the_head_is_not_loaded(llama: Make, family: Family) -> None:
    llama(family.trunk, draft_model=MtpDraft())
    assert not llama(family.trunk).model_params.load_mtp
    assert llama(family.trunk, draft_model=MtpDraft()).model_params.load_mtp
    assert not llama(family.trunk, draft_model=MtpDraft(num_pred_tokens=0)).model_params.load_mtp


@pytest.mark.parametrize(
    ("architecture", "overrides", "match"),
    [
        ("glm4moe", {"glm4moe.rope.dimension_sections": 1}, "rotary dimensions are in sections"),
        ("deepseek2", {"deepseek2.attention.temperature_scale": 0.1}, r"temperature_scale is 0\.1.*expected 0"),
        ("deepseek2", {"deepseek2.leading_dense_block_count": 4}, "leading_dense_block_count is 4; expected 3 at most"),
        ("glm-dsa", {"glm-dsa.attention.q_lora_rank": 0}, "attention.q_lora_rank is 0"),
        ("qwen35", {"qwen35.nextn_predict_layers": 2}, "1 MTP blocks and nextn_predict_layers 2; expected 1 and 1"),
        ("mimo2", {"mimo2.nextn_predict_layers": 2}, "3 MTP blocks and nextn_predict_layers 2; expected as many"),
        ("step35", {"step35.attention.sliding_window": 1 << 20}, "sliding_window is 1048576; expected 1 to 4096 rows"),
    ],
)
def test_what_the_engine_would_abort_on_is_refused(
    llama: Make, directory: Path, architecture: str, overrides: dict[str, Any], match: str
) -> None:
    """Before anything is loaded; a Llama without a draft runs some of these."""
    files = plant_family(directory, architecture)
    with pytest.raises(ValueError, match=match):
        llama(files.trunk, draft_model=MtpDraft(), kv_overrides=overrides)


@pytest.mark.parametrize(
    ("architecture", "without"),
    [
        ("hy_v3", "nextn.eh_proj"),
        ("hy_v3", "ffn_down_exps"),
        ("hy_v3", "ffn_gate_inp"),
        ("deepseek2", "ffn_gate_inp"),
        ("glm4moe", "ffn_gate_shexp"),
        ("nemotron_h_moe", "nextn.shared_head_norm"),
        ("step35", "ffn_up_shexp"),
        ("mimo2", "ffn_up"),
        ("mimo2", "attn_qkv"),
    ],
)
def test_a_head_that_lacks_a_tensor_is_refused(tmp_path: Path, architecture: str, without: str) -> None:
    files = plant_family(tmp_path, architecture, without=without)
    with pytest.raises(ValueError, match="has no MTP block" if "eh_proj" in without else "lacks"):
        check_inside(files.trunk)
