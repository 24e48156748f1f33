"""The suite has a long mode, with ``DS4_TEST_LONG=1`` in the environment: the same tests over far more cases."""

from __future__ import annotations

import os

LONG = os.environ.get("DS4_TEST_LONG", "") not in ("", "0")
