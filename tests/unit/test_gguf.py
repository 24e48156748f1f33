"""Headers of GGUF files: read right, refused where they do not fit, and every refusal says which file and why."""

from __future__ import annotations

import dataclasses
import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ds4_mtp_plugin import gguf as files
from ds4_mtp_plugin.gguf import deepseek4
from ds4_mtp_plugin.gguf import header as gguf_header
from tests.fixtures import ds4_gguf
from tests.fixtures.ds4_gguf import Ds4Config


class Unchecked(Ds4Config):
    """A configuration that the engine would abort on."""

    def __post_init__(self) -> None:
        pass


SMALL = Ds4Config()


def write(path: Path, part: Any, config: Ds4Config = SMALL, **options: Any) -> Path:
    shapes = (ds4_gguf.trunk_shapes if part == "trunk" else ds4_gguf.mtp_shapes)(config)
    ds4_gguf.write_gguf(path, config, {n: np.zeros(s, np.float32) for n, s in shapes.items()}, part=part, **options)
    return path


def craft(
    path: Path,
    tensors: Sequence[str] = (),
    metadata: dict[str, Any] | None = None,
    *,
    architecture: str = "deepseek4",
    tokens: Sequence[str] = (),
) -> Path:
    """A GGUF with these keys and 32 x 1 F32 tensors of these names."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    if tokens:
        writer.add_token_list(list(tokens))
        writer.add_token_merges([f"{token} {token}" for token in tokens])
    for name in tensors:
        writer.add_tensor(name, np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    return write(tmp_path / "trunk.gguf", "trunk")


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return write(tmp_path / "head.gguf", "mtp")


def refused(check: Callable[..., object], *paths: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        check(*paths)
    assert any(str(path) in str(caught.value) for path in paths), "no file is named"


# -- reading --


def test_a_header_is_what_the_gguf_package_reads(head: Path) -> None:
    header = files.read_header(head)
    reader = gguf.GGUFReader(head)
    assert header.tensors == {t.name: tuple(t.shape.tolist()) for t in reader.tensors}
    assert header.types == {t.name: t.tensor_type.name for t in reader.tensors}
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert set(header.metadata) | set(header.lengths) == set(fields)
    for key, value in header.metadata.items():
        expected = fields[key].contents()
        assert (list(value) if isinstance(value, tuple) else value) == expected, key
    assert header.lengths["tokenizer.ggml.tokens"] == SMALL.n_vocab
    assert header.n_bytes == head.stat().st_size


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    # Q2_0 (ggml-common.h: 64 elements, a half and two bits each) is newer than the package.
    assert gguf_header._BLOCKS[42] == ("Q2_0", 64, 2 + 64 // 4)
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    theirs.pop(9)  # Q8_1, which is never stored: the package has it larger than ggml-common.h
    assert {kind: block for kind, block in gguf_header._BLOCKS.items() if kind in theirs} == theirs


def test_a_vocabulary_is_stepped_over(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(129_280)]
    path = craft(tmp_path / "x.gguf", ["a.weight"], {"deepseek4.block_count": 7}, tokens=tokens)
    header = files.read_header(path)
    assert header.lengths["tokenizer.ggml.tokens"] == header.lengths["tokenizer.ggml.merges"] == 129_280
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert header.tensors == {"a.weight": (32, 1)}


def test_models_are_told_apart(trunk: Path, head: Path) -> None:
    model = files.read_model(trunk)
    assert (model.kind, model.n_layer, model.n_nextn, model.ratios) == (files.TRUNK, 3, 0, SMALL.compress_ratios)
    model = files.check_head(head)
    assert (model.kind, model.n_layer, model.n_nextn) == (files.HEAD, 3, 1)
    sizes = (model.n_vocab, model.n_embd, model.n_hc, model.n_head, model.head_dim, model.window)
    assert sizes == (SMALL.n_vocab, SMALL.n_embd, 4, SMALL.n_head, SMALL.head_dim, 128)


def test_a_pair_that_fits_is_taken(trunk: Path, head: Path) -> None:
    base, top = files.check_pair(trunk, head)
    assert (base.path, top.path) == (str(trunk), str(head))


def test_a_file_that_changed_is_read_again(trunk: Path, head: Path) -> None:
    files.check_head(head)
    os.replace(trunk, head)
    refused(files.check_head, head, match="has no MTP")


# -- files that are no whole GGUF --


def test_missing_files_and_directories(tmp_path: Path) -> None:
    for check in (files.read_header, files.check_head):
        with pytest.raises(FileNotFoundError, match="none.gguf: no such file"):
            check(tmp_path / "none.gguf")
        with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))}: it is a directory"):
            check(tmp_path)


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that everyone may enter, while this process is not root."""
    if not hasattr(os, "geteuid"):
        pytest.skip("POSIX permissions")
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        if root:
            os.seteuid(0)


def test_a_file_that_may_not_be_read(as_nobody: Path, head: Path) -> None:
    path = as_nobody / "secret.gguf"
    path.write_bytes(head.read_bytes())
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(PermissionError, match=f"^{re.escape(str(path))}: no permission to read it"):
        files.read_header(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"G", "begins with b'G'"),
        (b"GGUF", "cut off or damaged: it ends after 4 bytes, inside its header"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n <HTML>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (struct.pack("<Q", 80) + b'{"__metadata__":{}}', "is a safetensors file"),
        (b"PK\x03\x04 and so on", "is a PyTorch file"),
        (b"tjgg\x03\0\0\0", "is a GGML file"),
        (b"some text", "begins with b'some', which no GGUF file does"),
        (b"GGUF" + struct.pack("=IQQ", 1, 0, 0), "GGUF version 1; expected 2 or 3"),
        (b"GGUF" + struct.pack("=IQQ", 4, 0, 0), "GGUF version 4; expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ" if sys.byteorder == "little" else "<IQQ", 3, 0, 0), "-endian byte order"),
        (b"GGUF" + struct.pack("=IQQ", 3, 0, 1) + bytes(64), "a key has no name"),
        (b"GGUF" + struct.pack("=IQQQ", 3, 0, 1, 1 << 62), "cut off or damaged"),
        (b"GGUF" + struct.pack("=IQQQ1sI", 3, 0, 1, 1, b"k", 99), "of type 99"),
        (b"GGUF" + struct.pack("=IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 40) + bytes(99), "cut off or damaged"),
        (b"GGUF" + struct.pack("=IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(99), "an array of type 9"),
        (b"GGUF" + struct.pack("=IQQ", 3, 0, 2) + 2 * struct.pack("=Q1sIB", 1, b"k", 0, 1), "'k' comes twice"),
        (b"GGUF" + struct.pack("=IQQQ1sI", 3, 1, 0, 1, b"t", 5) + bytes(99), "has 5 dimensions; expected up to 4"),
    ],
)
def test_what_is_no_gguf_is_said(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    for check in (files.read_header, files.check_head):
        refused(check, path, match=match)


def test_a_file_that_is_cut_off_anywhere(head: Path) -> None:
    content = head.read_bytes()
    header = files.read_header(head)
    for n in (*range(1, 60), *range(60, len(content) - 1, 9973), len(content) - 32):
        head.write_bytes(content[:n])
        refused(files.check_head, head, match="cut off|begins with")
    assert f"its tensors need {header.n_bytes};" in message(files.check_head, head)


def message(check: Callable[..., object], *paths: Path) -> str:
    with pytest.raises(ValueError) as caught:
        check(*paths)
    return str(caught.value)


def test_a_split_model_is_read_from_its_first_part(trunk: Path, head: Path) -> None:
    parts = ds4_gguf.split(trunk, 3)
    base, _ = files.check_pair(parts[0], head)
    assert dataclasses.replace(files.read_model(trunk), path="", n_bytes=0) == dataclasses.replace(
        base, path="", n_bytes=0
    )
    assert base.n_bytes == sum(part.stat().st_size for part in parts)
    refused(files.check_pair, parts[1], head, match="give '.*trunk-00001-of-00003.gguf'")
    parts[2].unlink()
    with pytest.raises(FileNotFoundError, match="trunk-00003-of-00003.gguf: no such file"):
        files.check_pair(parts[0], head)
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    refused(files.check_pair, renamed, head, match="expected 'NAME-00001-of-00003.gguf'")


# -- files that are no head --


def test_a_trunk_is_no_head(trunk: Path) -> None:
    refused(files.check_head, trunk, match=r"has no MTP .NextN. block: it is a model of .*'deepseek4'")


def test_another_model_is_no_head(tmp_path: Path) -> None:
    path = craft(tmp_path / "x.gguf", ["token_embd.weight", "blk.0.attn_norm.weight"], architecture="qwen3")
    refused(files.check_head, path, match="it is a model of architecture 'qwen3'")
    path = craft(tmp_path / "y.gguf", ["v.patch_embd.weight"], architecture="clip")
    refused(files.check_head, path, match="it is something else of architecture 'clip'")
    path = craft(tmp_path / "z.gguf", ["blk.9.nextn.eh_proj.weight"], architecture="bailingmoe2")
    refused(files.check_head, path, match="MTP head of architecture 'bailingmoe2'; expected 'deepseek4' .DeepSeek-V4.")
    block = [f"blk.9.{name}.weight" for name in ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm", "attn_qkv")]
    block += [f"blk.9.ffn_{name}.weight" for name in ("gate", "up", "down")]
    keys = {"mimo2.block_count": 10, "mimo2.nextn_predict_layers": 1, "mimo2.attention.sliding_window": 32}
    path = craft(tmp_path / "v.gguf", ["token_embd.weight", "output_norm.weight", *block], keys, architecture="mimo2")
    refused(files.check_head, path, match="neither output.weight nor blk.9.nextn.shared_head_head.weight is there")
    path = craft(tmp_path / "w.gguf", ["blk.9.nextn.eh_proj.weight"], architecture="gemma4-assistant")
    refused(files.check_head, path, match="its head reads the memory of its model")


@pytest.mark.parametrize(
    ("architecture", "tensors"),
    [
        ("dflash", ["fc.weight", "blk.0.attn_norm.weight", "markov_w1.weight"]),  # conversion/deepseek.py
        ("dflash", ["fc.weight", "blk.0.attn_norm.weight"]),
        ("deepseek4", ["mtp.0.main_proj.weight", "mtp.2.markov_head.markov_w1.weight"]),
    ],
)
def test_a_dspark_head_is_told_from_an_mtp_head(tmp_path: Path, architecture: str, tensors: list[str]) -> None:
    path = craft(tmp_path / "x.gguf", tensors, architecture=architecture)
    refused(files.check_head, path, match=f"is a DSpark or DFlash head of architecture {architecture!r}")


def test_ds4s_own_layout_is_to_be_converted(tmp_path: Path) -> None:
    path = craft(tmp_path / "x.gguf", ["mtp.0.e_proj.weight", "mtp.0.h_proj.weight", "mtp.0.enorm.weight"])
    refused(files.check_head, path, match="layout of antirez/ds4 .*'mtp.0.*convert_hf_to_gguf.py --mtp")


def with_tensors(
    path: Path,
    change: Callable[[dict[str, Any]], object] = lambda tensors: None,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    without: str = "",
    **metadata: Any,
) -> Path:
    """The file again with its names or types of tensors changed, and keys replaced, added or left out, in place."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "deepseek4")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", without):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            value = metadata.get(key.removeprefix("deepseek4."), field.contents())
            writer.add_key_value(key, value, kind, sub_type=sub)
    for key in {f"deepseek4.{name}" for name in metadata} - set(reader.fields) | {without} - {""}:
        if (value := metadata.get(key.removeprefix("deepseek4."))) is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    change(tensors)
    for name, tensor in tensors.items():
        data, kind = tensor.data, tensor.tensor_type
        if types and name in types:
            kind = types[name]
            per_block, block = gguf.GGML_QUANT_SIZES[kind]
            data = np.zeros((*data.shape[:-1], -(-data.shape[-1] // per_block) * block), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path.with_suffix(".new"), path)
    return path


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output.weight", "output_hc_fn.weight", "blk.3.attn_q_a.weight", "blk.3.nextn.enorm.weight"],
)
def test_a_head_that_lacks_a_tensor(head: Path, name: str) -> None:
    with_tensors(head, lambda tensors: tensors.pop(name))
    refused(files.check_head, head, match=f"lacks {name} .*with the trunk's embedding and output in it")


def test_the_names_are_those_that_the_fixtures_write(head: Path) -> None:
    bias = "blk.3.exp_probs_b.bias", "blk.3.nextn.shared_head_norm.weight"
    ours = {f"{n}.weight" for n in deepseek4._ROOT} | {
        f"blk.3.{n}.weight" for n in (*deepseek4.BLOCK, *deepseek4._NEXTN)
    }
    assert ours | set(bias) == set(ds4_gguf.mtp_shapes(SMALL))


def test_a_head_with_another_number_of_blocks(head: Path) -> None:
    with_tensors(head, lambda t: t.update({"blk.4.nextn.eh_proj.weight": t["blk.3.nextn.eh_proj.weight"]}))
    refused(files.check_head, head, match="has 2 MTP blocks and nextn_predict_layers 1; expected 1 and 1")
    with_tensors(head, lambda t: t.pop("blk.4.nextn.eh_proj.weight"), nextn_predict_layers=2)
    refused(files.check_head, head, match="has 1 MTP blocks and nextn_predict_layers 2")


def test_a_head_whose_block_count_is_wrong(head: Path) -> None:
    with_tensors(head, lambda tensors: tensors, block_count=9)
    refused(files.check_head, head, match="lacks blk.8.attn_kv.*block_count - 1 is 8")


def test_trunk_and_head_in_one_file(head: Path) -> None:
    with_tensors(head, lambda t: t.update({"blk.0.attn_norm.weight": t["blk.3.attn_norm.weight"]}))
    refused(files.check_head, head, match="a model with an MTP block: both would share one output mixing")


def test_equal_key_lengths_would_end_the_process(tmp_path: Path) -> None:
    config = Unchecked(head_dim=64, indexer_head_dim=64)
    refused(files.check_head, write(tmp_path / "x.gguf", "mtp", config), match="are both 64, which makes")


@pytest.mark.parametrize(
    "name", ["output_norm.weight", "blk.3.attn_sinks.weight", "blk.3.hc_ffn_scale.weight", "blk.3.exp_probs_b.bias"]
)
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q5_1", "I64"])
def test_vectors_of_another_type_would_end_the_process(head: Path, name: str, kind: str) -> None:
    with_tensors(head, types={name: gguf.GGMLQuantizationType[kind]})
    refused(files.check_head, head, match=f"{name} is of type {kind}; expected F32: the engine aborts on any other")


@pytest.mark.parametrize("name", ["blk.3.attn_q_b.weight", "blk.3.ffn_down_shexp.weight", "token_embd.weight"])
@pytest.mark.parametrize("kind", ["I8", "I16", "I32", "I64", "F64", "Q8_K"])
def test_matrices_of_types_without_kernels_would_end_the_process(head: Path, name: str, kind: str) -> None:
    with_tensors(head, types={name: gguf.GGMLQuantizationType[kind]})
    refused(files.check_head, head, match=f"{name} is of type {kind}, which the engine cannot multiply with")


def test_a_matrix_may_be_of_any_type_that_files_are_quantised_to(trunk: Path, head: Path) -> None:
    for kind in ("F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "IQ2_XXS", "MXFP4", "TQ2_0"):
        with_tensors(head, types={"output.weight": gguf.GGMLQuantizationType[kind]})
        files.check_pair(trunk, head)


def test_more_compress_ratios_than_the_engine_has_layers(head: Path) -> None:
    with_tensors(head, **{"attention.compress_ratios": [0] * 513})
    refused(files.check_head, head, match="compress ratios for 513 layers; expected 512 at most")


def test_a_message_does_not_grow_with_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(b"GGUF" + struct.pack("=IQQQ90000sI", 3, 0, 1, 90000, b"k" * 90000, 99))
    assert len(message(files.read_header, path)) < 400 + len(str(path))


# -- files that do not belong together --


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_vocab": 352}, "vocabulary 352, expected 320"),
        ({"n_embd": 128}, "width 128, expected 64"),
        ({"n_head": 8}, "attention heads 8, expected 4"),
        ({"head_dim": 128}, "head width 128, expected 32"),
        ({"n_swa": 64}, "sliding window 64, expected 128"),
        ({"compress_ratios": (0, 4)}, "layers below the head 2, expected 3"),
        ({"hc_mult": 2}, "hyper-connection streams 2, expected 4"),
    ],
)
def test_a_head_of_another_shape(tmp_path: Path, trunk: Path, change: dict[str, Any], match: str) -> None:
    head = write(tmp_path / "other.gguf", "mtp", Unchecked(**change))
    refused(files.check_pair, trunk, head, match=f"other.gguf does not belong to .*trunk.gguf: {match}. Take")


def test_every_difference_is_named_at_once(tmp_path: Path, trunk: Path) -> None:
    head = write(tmp_path / "other.gguf", "mtp", Unchecked(n_vocab=352, n_embd=128))
    refused(files.check_pair, trunk, head, match="vocabulary 352, expected 320; width 128, expected 64")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"attention.value_length": 16}, "deepseek4.attention.value_length is 16, expected 32"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon is -1.0, expected 9.9"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan, expected 9.9"),
        ({"expert_used_count": 256}, "deepseek4.expert_used_count is 256, expected 2"),
        ({"rope.dimension_count": 2**32 - 1}, "rope.dimension_count is 4294967295, expected 16"),
        ({"without": "deepseek4.attention.value_length"}, "attention.value_length is not there, expected 32"),
    ],
    ids=str,
)
def test_a_head_that_computes_otherwise(trunk: Path, head: Path, change: dict[str, Any], found: str) -> None:
    with_tensors(head, **change)
    files.check_head(head)
    refused(files.check_pair, trunk, head, match=f"does not belong to .*: .*{found}")


def test_a_head_with_keys_that_the_model_has_not(trunk: Path, head: Path) -> None:
    with_tensors(trunk, without="deepseek4.rope.freq_base")
    refused(files.check_pair, trunk, head, match="deepseek4.rope.freq_base is 10000.0, expected not there")


def test_what_counts_blocks_or_tells_an_app_something_may_differ(trunk: Path, head: Path) -> None:
    with_tensors(head, context_length=7, without="tokenizer.chat_template")
    files.check_pair(trunk, head)


def test_a_head_with_other_tokens(trunk: Path, head: Path) -> None:
    vocab = ds4_gguf.byte_vocab(SMALL.n_vocab)
    vocab = dataclasses.replace(vocab, tokens=[*vocab.tokens[:-1], vocab.tokens[-2]])  # twice, which the engine asserts
    write(head, "mtp", vocab=vocab)
    files.check_head(head)
    refused(files.check_pair, trunk, head, match="does not belong to .*: its vocabulary has other tokens")


def test_bases_that_are_none(tmp_path: Path, head: Path) -> None:
    refused(files.check_pair, head, head, match="is an MTP head; expected the model")
    other = craft(tmp_path / "x.gguf", ["token_embd.weight", "blk.0.attn_norm.weight"], architecture="qwen3")
    refused(files.check_pair, other, head, match="'qwen3'; expected 'deepseek4' .DeepSeek-V4.")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"compress_ratios": (0, 128)}, "t.gguf: no layer has a compress ratio of 4"),
        ({"hc_mult": 2}, "t.gguf has 2 hyper-connection streams; expected 4"),
        ({"n_swa": 0}, "t.gguf has a sliding window of 0 rows; expected 1 to 4096"),
        ({"n_swa": 2**24}, "t.gguf has a sliding window of 16777216 rows"),
    ],
)
def test_models_that_would_end_the_process_or_fill_memory(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    config = Unchecked(**change)
    pair = write(tmp_path / "t.gguf", "trunk", config), write(tmp_path / "h.gguf", "mtp", config)
    refused(files.check_pair, *pair, match=match)


def test_compress_ratios_that_are_no_integers(trunk: Path, head: Path) -> None:
    key = "attention.compress_ratios"
    with_tensors(trunk, without=f"deepseek4.{key}", **{key: [0.5, float("inf"), float("nan")]})
    refused(files.check_pair, trunk, head, match="no layer has a compress ratio of 4")


def test_a_model_whose_rows_see_later_ones(trunk: Path, head: Path) -> None:
    for path in (trunk, head):
        with_tensors(path, **{"attention.causal": False})
    refused(files.check_pair, trunk, head, match="t.*gguf: its attention is not causal")
    for path in (trunk, head):
        with_tensors(path, **{"attention.causal": True})
    files.check_pair(trunk, head)


def test_what_the_engine_is_told_in_place_of_metadata_counts(trunk: Path, head: Path) -> None:
    base, _ = files.check_pair(trunk, head, {"deepseek4.attention.sliding_window": 64, "other": 1.0})
    assert base.window == 64
    with pytest.raises(ValueError, match="has 2 hyper-connection streams"):
        files.check_pair(trunk, head, {"deepseek4.hyper_connection.count": 2})
    with pytest.raises(ValueError, match="attention is not causal"):
        files.check_pair(trunk, head, {"deepseek4.attention.causal": False})
    with pytest.raises(ValueError, match="of architecture 'llama'"):
        files.check_pair(trunk, head, {"general.architecture": "llama"})
    files.check_pair(trunk, head)  # and is not remembered for the file


def test_overrides_are_what_the_engine_goes_by() -> None:
    """Its rules (src/llama-model-loader.cpp): a value of another type, or for an array, is not taken."""
    header = gguf_header.Header(
        "x.gguf", {"a": 1, "b": 0.5, "c": True, "d": "text"}, {"list": 3}, {}, {}, {}, {}, "", 0
    )
    given = {"a": 2, "b": 2.0, "c": False, "d": "other", "new": 7, "list": 1}
    assert header.overridden(given).metadata == {"a": 2, "b": 2.0, "c": False, "d": "other", "new": 7}
    assert header.overridden({"a": 2.5, "b": 1, "c": 3, "d": 1}).metadata == header.metadata
    assert header.overridden(None) is header or header.overridden(None) == header


def test_an_override_that_the_engine_would_abort_on_is_refused(trunk: Path, head: Path) -> None:
    overrides = {"deepseek4.nextn_predict_layers": 2}
    with pytest.raises(ValueError, match="has 1 MTP blocks and nextn_predict_layers 2; expected 1 and 1"):
        files.check_pair(trunk, head, overrides)
    with pytest.raises(ValueError, match="nextn_predict_layers 2"):
        files.check_head(head, overrides)


def test_what_is_overridden_for_both_files_differs_no_more(trunk: Path, head: Path) -> None:
    with_tensors(head, **{"attention.value_length": 16})
    overrides = {"deepseek4.attention.value_length": 32}
    refused(files.check_pair, trunk, head, match="value_length is 16, expected 32")
    files.check_pair(trunk, head, overrides)
