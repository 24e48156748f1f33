"""``python -m ds4_mtp_plugin``: the command ``ds4-mtp``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
