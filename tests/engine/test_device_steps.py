"""bench/device/steps.py: what only a machine with a GPU would show."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.device import steps
from tests.fixtures.ds4_gguf import mtp_shapes, stored_size, tensor_type, trunk_shapes
from tests.fixtures.planted import FLASH, FLASH_QUANT, first_layers


def size(n_layer: int) -> int:
    """Bytes of trunk and head."""
    config = first_layers(steps.BIG, n_layer)
    shapes = [*trunk_shapes(config).items(), *mtp_shapes(config).items()]
    return sum(stored_size(shape, tensor_type(name, shape, FLASH_QUANT)) for name, shape in shapes)


@pytest.mark.parametrize(
    ("gpu_mib", "disk", "tighter"),
    [
        (40000, 300e9, 40000 * 2**20 - steps.SPARE_GPU),
        (143000, 30e9, 30e9 - steps.SPARE_DISK),
        (0, 30e9, 30e9 - steps.SPARE_DISK),
    ],
)
def test_as_many_layers_as_fit(
    gpu_mib: float, disk: float, tighter: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "gpu", lambda field: gpu_mib)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    n = steps.fitting_layers(tmp_path)
    assert size(n) <= tighter < size(n + 2)


def test_all_layers_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "gpu", lambda field: 1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    assert steps.fitting_layers(tmp_path) == FLASH.n_layer
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8e9))
    with pytest.raises(RuntimeError, match="no room for 4 layers"):
        steps.fitting_layers(tmp_path)
