"""Fixtures of the tests that run models. The plugin comes first, so that the host runs on its library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ds4_mtp_plugin  # noqa: F401

# isort: split
import pytest
from llama_cpp import Llama
from llama_cpp._logger import set_verbose

from tests.fixtures import GPU_LAYERS
from tests.fixtures.planted import Planted, planted

set_verbose(False)  # the engine's log; a Llama's own `verbose` sets it again


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Planted]:
    """Planted models in a folder of this run: plant(acceptance=..., quant=..., ...)."""
    directory = tmp_path_factory.mktemp("planted")
    return lambda **options: planted(directory, **options)


@pytest.fixture
def llama() -> Iterator[Callable[..., Llama]]:
    """Makes Llamas on one thread (so that tests do not wait for each other's) and closes them."""
    made: list[Llama] = []

    def make(path: Path | str, **options: Any) -> Llama:
        defaults: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        defaults["n_gpu_layers"] = GPU_LAYERS
        made.append(Llama(str(path), **{**defaults, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()
