"""A Hugging Face checkpoint: what its folder says of it, and llama.cpp's own converter as a process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..gguf.families import CHECKPOINTS_WITHOUT

__all__ = ["check", "convert", "script"]

# What the converter imports, by the names of its modules.
_MODULES = ("torch", "transformers", "yaml", "tqdm")
_INSTALL = "pip install torch transformers sentencepiece protobuf pyyaml tqdm"

# Of MTP blocks: named so, or numbered behind the trunk's layers.
_NAMED = re.compile(r"(^|\.)mtp[._]")
_LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")

_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own bound


def check(folder: Path, *, head: bool = True) -> None:
    """Whether the converter can be asked for this checkpoint, and for the head that it has to have.

    Raises:
        FileNotFoundError: it is none.
        ValueError: it has no head, one that the converter leaves out or the engine does not run, or a file is damaged.
    """
    config = _config(folder)
    names = list(_tensors(folder))
    if not head:
        return
    for architecture in config.get("architectures") or ():
        if why := CHECKPOINTS_WITHOUT.get(architecture):
            raise ValueError(
                f"{folder} is a checkpoint of {architecture}: {why}. The model alone, for which NgramDraft() drafts, "
                f"makes 'python {script()} {folder}'"
            )
    n_layer = {**config, **(config.get("text_config") or {})}.get("num_hidden_layers")
    if names and not any(_of_head(name, n_layer) for name in names):
        raise ValueError(
            f"{folder} has no tensors of an MTP head (mtp.*, or of a layer behind the {n_layer} of the model): take "
            "the checkpoint as its makers published it. The model alone, for which NgramDraft() drafts, makes 'python "
            f"{script()} {folder}', with --no-mtp where it is of a family that has heads"
        )


def convert(folder: Path, out: Path, options: Sequence[str]) -> None:
    """Run llama.cpp's ``convert_hf_to_gguf.py``; what it prints goes to stderr as it comes.

    Raises:
        ImportError: it, or a package that it needs, is not installed.
        RuntimeError: it failed.
    """
    program = script()
    if missing := [name for name in _MODULES if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{program.name} needs {', '.join(missing)}: {_INSTALL}")
    # Nothing of its own in the package's folder: 'install-engine' knows its files by their hashes.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(program), str(folder), "--outfile", str(out), *options]
    done = subprocess.run(command, stdout=2, env=env)
    if done.returncode:
        how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        raise RuntimeError(
            f"{folder} was not converted: {program.name} ended with {how}; its own last lines are above. It is that of "
            "llama.cpp, which this engine is built from, so its issues are the place to look"
        )


def script() -> Path:
    """Where the converter is.

    Raises:
        ImportError: nowhere.
    """
    from ..host.library import folder

    path = folder() / "converter" / "convert_hf_to_gguf.py"
    if not path.is_file():
        raise ImportError(f"there is no {path}: the engine was built without it; reinstall ds4_mtp_plugin")
    return path


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no config.json; expected a checkpoint as Hugging Face has it: config.json, *.safetensors "
            "and the tokenizer's files"
        ) from None
    except ValueError as err:
        raise ValueError(f"{path} is no JSON ({err}); download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is {type(config).__name__}; expected an object; download it again")
    return config


def _tensors(folder: Path) -> Iterator[str]:
    """Names of the tensors in the folder's safetensors files, each of which is whole."""
    for path in sorted(folder.glob("*.safetensors")):
        n_bytes = path.stat().st_size
        with open(path, "rb") as file:
            beginning = file.read(8)
            (n_header,) = struct.unpack("<Q", beginning) if len(beginning) == 8 else (_LONGEST_HEADER + 1,)
            try:
                header = dict(json.loads(file.read(n_header) if n_header <= _LONGEST_HEADER else b""))
                tensors = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
                end = 8 + n_header + max(tensors.values(), default=0)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                raise ValueError(
                    f"{path} is no safetensors file, or its beginning is damaged (it begins with {beginning!r}): "
                    "download it again, with 'git lfs pull' where it is a Git LFS pointer"
                ) from None
        if end > n_bytes:
            raise ValueError(f"{path} is cut off: it has {n_bytes} bytes and needs {end}; download it again")
        yield from tensors


def _of_head(name: str, n_layer: Any) -> bool:
    layer = _LAYER.match(name)
    return bool(_NAMED.search(name)) or (layer is not None and isinstance(n_layer, int) and int(layer[1]) >= n_layer)
