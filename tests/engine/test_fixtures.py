"""The fixtures are what they claim to be: the engine loads them, and says what was planted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from tests.fixtures import GPU_LAYERS
from tests.fixtures.ds4_gguf import Ds4Config, byte_vocab, mtp_shapes, trunk_shapes, write_gguf
from tests.fixtures.planted import BY_CONTEXT, DECOYS, EOS, FLASH_QUANT, TINY, Planted, planted, replant
from tests.fixtures.row_engine import RowEngine

F32 = npt.NDArray[np.float32]

WIDE = replace(TINY, n_embd=512, q_lora_rank=256, n_ff_exp=256)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


class Context(RowEngine):
    """Decodes on empty memory."""

    def decode(self, tokens: Any, pos: int = 0, hidden: Any = None) -> tuple[F32, F32]:
        self.remove(0)
        return super().decode(tokens, pos, hidden)


@pytest.fixture
def context() -> Iterator[Callable[..., Context]]:
    contexts: list[Context] = []

    def make(path: Path, *, mtp: bool = False) -> Context:
        contexts.append(Context(path, mtp=mtp))
        return contexts[-1]

    yield make
    for made in contexts:
        made.close()


def generate(path: Path, prompt: bytes, n: int) -> tuple[list[int], list[int], bytes]:
    llm = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=1, n_gpu_layers=GPU_LAYERS, verbose=False)
    tokens = llm.tokenize(prompt)
    stream = llm.generate(tokens, temp=0.0)
    text = [next(stream) for _ in range(n)]
    return tokens, text, llm.detokenize(text)


# The trunk


def test_greedy_text_is_the_walk(directory: Path) -> None:
    model = planted(directory)
    prompt, text, written = generate(model.trunk, b"Once upon a time", 650)
    assert text == model.follow(prompt[-1], 650)
    assert len(set(text)) == len(model.cycle)
    written.decode("utf-8")


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "MXFP4"])
def test_quantised_files_walk_too(directory: Path, quant: str) -> None:
    model = planted(directory, quant=quant)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(model.trunk).tensors}
    assert types["blk.1.ffn_up_exps.weight"] == types["blk.1.attn_kv.weight"] == quant
    assert types["blk.0.ffn_gate_tid2eid.weight"] == "I32"
    kept = (
        "blk.1.hc_attn_fn.weight",
        "blk.1.ffn_gate_inp.weight",
        "blk.1.attn_compressor_ape.weight",
        "blk.1.attn_sinks.weight",
    )
    assert {types[name] for name in kept} == {"F32"}
    prompt, text, _ = generate(model.trunk, b"Once", 200)
    assert text == model.follow(prompt[-1], 200)


def test_the_walk_can_end(directory: Path) -> None:
    model = planted(directory, eos_after=10)
    start = int(model.cycle[0])
    assert model.follow(start, 11) == [*model.cycle[1:11], EOS]
    llm = llama_cpp.Llama(str(model.trunk), n_ctx=256, n_threads=1, n_gpu_layers=GPU_LAYERS, verbose=False)
    text: Any = llm.create_completion([start], max_tokens=100, temperature=0.0)
    assert text["choices"][0]["finish_reason"] == "stop"
    assert text["usage"]["completion_tokens"] == 10


def test_any_text_tokenizes(directory: Path) -> None:
    llm = llama_cpp.Llama(str(planted(directory).trunk), vocab_only=True, verbose=False)
    text = "".join(map(chr, range(0x800))).encode() + "日本 🙂".encode()
    assert llm.detokenize(llm.tokenize(text, add_bos=False)) == text
    assert llm.tokenize(b"", add_bos=True) == [llm.token_bos()]
    assert llm.detokenize([DECOYS[-1]]) == b"@"


def test_logits_depend_on_every_earlier_token(directory: Path, context: Callable[..., Context]) -> None:
    model = planted(directory, **BY_CONTEXT)
    trunk = context(model.trunk)
    tokens = np.random.default_rng(0).choice(model.cycle, 700).tolist()
    logits = trunk.decode(tokens, 0)[0]
    assert (trunk.decode(tokens, 0)[0] == logits).all()
    # Within the window, at its edge, and where only compressed rows reach.
    for distance in (1, 60, 127, 128, 200, 400):
        edited = list(tokens)
        edited[-1 - distance] = int(model.walk[edited[-1 - distance]])
        change = trunk.decode(edited, 0)[0][-1] - logits[-1]
        assert np.abs(change).max() > 0.01, distance


def test_context_decides_the_text(directory: Path) -> None:
    model = planted(directory, **BY_CONTEXT)
    prompt, text, _ = generate(model.trunk, b"one beginning", 200)
    walked = np.mean([model.walk[before] == after for before, after in zip([prompt[-1], *text], text)])
    assert 0.6 < walked < 0.95
    _, other, _ = generate(model.trunk, b"two beginning", 200)
    assert text != other


# The MTP head


def drafts(trunk: Context, mtp: Context, model: Planted, n_positions: int) -> list[tuple[list[int], F32]]:
    """Per draft position the tokens that it is fed, a whole cycle of them, and the MTP's logits.

    Row p pairs the token at p with the hidden row of p - 1: the trunk's at the first draft position, and at a
    further one the MTP's own of the position before.
    """
    n = len(model.cycle)
    text = [int(model.cycle[0]), *model.follow(int(model.cycle[0]), n + n_positions - 1)]
    hidden = trunk.decode(text, 0)[1]
    rows = []
    for position in range(n_positions):
        fed = text[1 + position :]
        logits, hidden = mtp.decode(fed, 1 + position, hidden[:-1])
        rows.append((fed[-n:], logits[-n:]))
    return rows


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
@pytest.mark.parametrize("acceptance", [(0.8, 0.5, 0.3, 0.9), (1.0,), (0.0,), (1.0, 0.0)])
def test_drafts_are_right_where_planned(
    directory: Path, context: Callable[..., Context], acceptance: tuple[float, ...], quant: str
) -> None:
    model = planted(directory, acceptance=acceptance, quant=quant)
    assert model.acceptance == pytest.approx(acceptance, abs=0.5 / len(model.cycle))
    by_position = drafts(context(model.trunk), context(model.mtp, mtp=True), model, 5)
    for position, (fed, logits) in enumerate(by_position):
        drafted = logits.argmax(1)
        right = drafted == model.walk[fed]
        assert right.tolist() == [model.draft_is_right(token, position) for token in fed]
        assert right.mean() == pytest.approx(model.acceptance[min(position, len(acceptance) - 1)])
        assert set(drafted[~right]) <= set(DECOYS)
    assert not set(DECOYS) & set(model.walk)


def test_drafts_are_right_in_every_other_phase(directory: Path, context: Callable[..., Context]) -> None:
    model = planted(directory, phases=(40, 1.0, 0.0))
    place = np.zeros(model.config.n_vocab, np.int64)
    place[model.cycle] = np.arange(len(model.cycle))
    for fed, logits in drafts(context(model.trunk), context(model.mtp, mtp=True), model, 2):
        right = logits.argmax(1) == model.walk[fed]
        assert right.tolist() == (place[fed] // 40 % 2 == 0).tolist()
        assert right.any() and not right.all()


def test_a_draft_needs_the_hidden_row_before_its_token(directory: Path, context: Callable[..., Context]) -> None:
    model = planted(directory)
    text = model.follow(int(model.cycle[0]), 300)
    hidden = context(model.trunk).decode(text, 0)[1]
    mtp = context(model.mtp, mtp=True)
    paired = mtp.decode(text[1:], 1, hidden[:-1])[0].argmax(1)
    assert (paired == model.walk[text[1:]]).all()
    for wrong in (hidden, np.zeros_like(hidden), np.roll(hidden, 2, 0)):
        assert not (mtp.decode(text, 0, wrong)[0].argmax(1) == model.walk[text]).any()


def test_only_the_mtp_file_has_a_nextn_layer(directory: Path, context: Callable[..., Context]) -> None:
    model = planted(directory)
    assert context(model.trunk)._context.n_layer_nextn == 0
    assert context(model.mtp, mtp=True)._context.n_layer_nextn == 1


RATES = (0.9, 0.7, 0.5, 0.0)


@pytest.mark.parametrize("draw", [False, True])
def test_a_head_changes_its_acceptance_in_place(tmp_path: Path, context: Callable[..., Context], draw: bool) -> None:
    model = planted(tmp_path / "a", acceptance=0.9, among=RATES, quant=FLASH_QUANT, draw=draw)
    for acceptance in (0.5, 0.0, 0.7):
        model = replant(model, acceptance)
        assert model.acceptance == pytest.approx((acceptance,), abs=0.5 / len(model.cycle))
        other = planted(tmp_path / "b", acceptance=acceptance, among=RATES, quant=FLASH_QUANT, draw=draw)
        assert model.mtp.read_bytes() == other.mtp.read_bytes()
        assert model.trunk.read_bytes() == other.trunk.read_bytes()
    assert sorted((tmp_path / "a").iterdir()) == sorted([model.trunk, model.mtp])
    ((fed, logits),) = drafts(context(model.trunk), context(model.mtp, mtp=True), model, 1)
    assert (logits.argmax(1) == model.walk[fed]).mean() == pytest.approx(model.acceptance[0])
    with pytest.raises(ValueError, match="other rates"):
        replant(model, 0.8)


def test_drawn_blocks_are_distributed_like_values(tmp_path: Path) -> None:
    def rows(quant: Any, draw: bool, types: set[str]) -> dict[str, F32]:
        reader = gguf.GGUFReader(planted(tmp_path, config=WIDE, quant=quant, draw=draw).trunk)
        return {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in reader.tensors
            if tensor.name.startswith("blk.1.") and tensor.tensor_type.name in types
        }

    values, drawn = rows("F32", False, {"F32"}), rows(FLASH_QUANT, True, {"Q8_0", "MXFP4"})
    assert len(drawn) > 10
    for name, rows_drawn in drawn.items():
        expected = values[name].std(-1)
        assert ((rows_drawn.std(-1) == 0) == (expected == 0)).all(), name
        assert rows_drawn.std() == pytest.approx(values[name].std(), rel=0.05), name
        if len(expected) >= 32:  # in blocks of rows: a row alone is too few values to tell
            size = [np.square(rows).reshape(-1, 32 * rows.shape[-1]).mean(1) for rows in (rows_drawn, values[name])]
            assert size[0] == pytest.approx(size[1], rel=0.3), name
        assert abs(rows_drawn.mean()) < 0.1 * rows_drawn.std(), name
        distinct = np.unique(rows_drawn.reshape(-1, rows_drawn.shape[-1]), axis=0)
        assert len(distinct) >= np.count_nonzero(expected), name


# The files


def test_equal_arguments_are_one_file(tmp_path: Path) -> None:
    first = planted(tmp_path, acceptance=0.5)
    written = first.trunk.stat().st_mtime_ns
    again = planted(tmp_path, acceptance=(0.5,))
    assert (again.trunk, again.mtp) == (first.trunk, first.mtp)
    assert again.trunk.stat().st_mtime_ns == written
    other = planted(tmp_path, acceptance=0.5, seed=1)
    assert other.trunk != first.trunk
    elsewhere = planted(tmp_path / "elsewhere", acceptance=0.5)
    assert elsewhere.trunk.read_bytes() == first.trunk.read_bytes()
    assert elsewhere.mtp.read_bytes() == first.mtp.read_bytes() != other.mtp.read_bytes()


@pytest.mark.parametrize("acceptance", [1.1, -0.1, (), (0.5,) * 9, (0.1, 0.2, 0.3, 0.4, 0.5)])
def test_an_acceptance_that_cannot_be_planted_is_refused(tmp_path: Path, acceptance: Any) -> None:
    with pytest.raises(ValueError, match="acceptance"):
        planted(tmp_path, acceptance=acceptance)


SMALLEST = Ds4Config(compress_ratios=(4,))


def zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("part", ["trunk", "mtp"])
def test_a_tensor_missing_unknown_or_misshapen_is_named(tmp_path: Path, part: Any) -> None:
    shapes = trunk_shapes(SMALLEST) if part == "trunk" else mtp_shapes(SMALLEST)
    name = f"blk.{0 if part == 'trunk' else 1}.ffn_down_exps.weight"
    tensors = zeros(shapes)
    missing = {key: value for key, value in tensors.items() if key != name}
    unknown = {**tensors, "blk.7.attn_norm.weight": np.zeros(1)}
    misshapen = {**tensors, name: tensors[name].swapaxes(1, 2)[:, :-1]}
    for wrong, named in ((missing, name), (unknown, "blk.7.attn_norm.weight"), (misshapen, name)):
        with pytest.raises(ValueError, match=named):
            write_gguf(tmp_path / "x.gguf", SMALLEST, wrong, part=part)
    assert list(tmp_path.iterdir()) == []


def test_a_type_or_vocabulary_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tensors = zeros(trunk_shapes(Ds4Config(n_embd=256, compress_ratios=(0,))))
    cfg = Ds4Config(n_embd=256, compress_ratios=(0,))
    with pytest.raises(ValueError, match="Q9_9"):
        write_gguf(tmp_path / "x.gguf", cfg, tensors, part="trunk", quant="Q9_9")
    with pytest.raises(ValueError, match="token_embd.weight: Q8_K"):
        write_gguf(tmp_path / "x.gguf", cfg, tensors, part="trunk", quant="Q8_K")
    with pytest.raises(ValueError, match="300 tokens"):
        write_gguf(tmp_path / "x.gguf", cfg, tensors, part="trunk", vocab=byte_vocab(300))
    assert list(tmp_path.iterdir()) == []


def test_rows_that_no_block_divides_are_f16(tmp_path: Path) -> None:
    cfg = Ds4Config(compress_ratios=(0,), n_ff_exp=48)
    write_gguf(tmp_path / "x.gguf", cfg, zeros(trunk_shapes(cfg)), part="trunk", quant="Q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert types["blk.0.ffn_down_exps.weight"] == "F16"
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"


def test_metadata_is_the_config_and_what_is_added(tmp_path: Path) -> None:
    cfg = Ds4Config(compress_ratios=(0, 4), yarn_factor=2.0)
    write_gguf(tmp_path / "x.gguf", cfg, zeros(mtp_shapes(cfg)), part="mtp", name="n", general={"license": "x"})
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    read = {name: field.contents() for name, field in fields.items()}
    assert read["general.name"] == "n"
    assert read["general.license"] == "x"
    assert read["deepseek4.block_count"] == 3
    assert read["deepseek4.nextn_predict_layers"] == 1
    assert read["deepseek4.attention.compress_ratios"] == [0, 4, 0]
    assert len(read["deepseek4.swiglu_clamp_exp"]) == 3
    assert read["deepseek4.rope.scaling.type"] == "yarn"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"compress_ratios": ()}, "compress_ratios"),
        ({"compress_ratios": (8,)}, "compress_ratios"),
        ({"head_dim": 64}, "head_dim"),
        ({"indexer_head_dim": 32}, "indexer_head_dim"),
        ({"n_expert_used": 5}, "n_expert_used"),
        ({"o_group_count": 3}, "o_group_count"),
        ({"n_rot": 34}, "n_rot"),
        ({"n_hash_layers": 4}, "n_hash_layers"),
        ({"hc_mult": 2}, "hc_mult"),
    ],
)
def test_what_the_engine_would_abort_on_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Ds4Config(**wrong)


def test_tiny_has_layers_of_every_kind() -> None:
    assert set(TINY.compress_ratios) == {0, 4, 128}
    assert 0 < TINY.n_hash_layers < TINY.n_layer
    assert TINY.n_expert_used < TINY.n_expert
    assert TINY.indexer_top_k < 600 // 4
