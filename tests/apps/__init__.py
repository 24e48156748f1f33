"""Real applications of llama-cpp-python, each doing what its users do, with a draft and without.

The packages are those of the extra ``apps``. Where one is missing its tests are skipped, or fail if the environment
variable ``DS4_TEST_REQUIRE`` says ``apps``.
"""

from __future__ import annotations

import os
from importlib import import_module

import pytest


def needs(*modules: str) -> None:
    """Skip the test module that calls this at its top unless all `modules` can be imported."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as err:
            if os.environ.get("DS4_TEST_REQUIRE") == "apps":
                raise
            pytest.skip(f"{err}: pip install '.[apps]'", allow_module_level=True)
