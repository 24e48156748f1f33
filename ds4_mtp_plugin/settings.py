"""The DS4_MTP_* environment: switches that carry ds4's names and override what an app passed.

Read once per process. A switch is off when it is unset, empty or ``0``.
"""

from __future__ import annotations

import dataclasses as _dataclasses
import functools as _functools
import math as _math
import os as _os
import typing as _t

from . import options as _options


@_dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment asks for; None leaves the app's argument in force."""

    # DS4_MTP_SPEC_DISABLE: load no head, draft nothing; output and cost of a Llama without a draft.
    disable: bool = False
    # DS4_MTP_STRICT: the bytes of plain decoding, or an error.
    strict: bool = False
    # DS4_MTP_ACCEPT_REPORT: the line of statistics when a Llama is closed.
    report: bool = False
    # DS4_MTP_SPEC_LOG: a line for every rejected draft.
    log: bool = False
    # DS4_MTP_MIN_MARGIN: the margin gate; 0 turns it off.
    margin: float | None = None
    # DS4_MTP_RPC_SERVERS: "host:port,...", whose devices every Llama gets (rpc.add_servers).
    rpc_servers: tuple[str, ...] = ()

    @classmethod
    def of(cls, env: _t.Mapping[str, str]) -> Settings:
        """The settings of `env`.

        Raises:
            ValueError: a value that cannot be read, named with its variable.
        """

        def on(name: str) -> bool:
            return env.get(name, "") not in ("", "0")

        margin: float | None = None
        if given := env.get("DS4_MTP_MIN_MARGIN"):
            try:
                margin = float(given)
            except ValueError:
                margin = _math.nan
            if not margin >= 0:
                raise ValueError(f"DS4_MTP_MIN_MARGIN is {given!r}, expected a number of 0 or more (0: no gate)")
        try:
            servers = tuple(map(_options.endpoint, filter(None, env.get("DS4_MTP_RPC_SERVERS", "").split(","))))
        except ValueError as err:
            raise ValueError(f"DS4_MTP_RPC_SERVERS: {err}") from None
        # DS4_MTP_CONTINUOUS is accepted and needs nothing: the continuous cycle is the only one here.
        return cls(
            disable=on("DS4_MTP_SPEC_DISABLE"),
            strict=on("DS4_MTP_STRICT"),
            report=on("DS4_MTP_ACCEPT_REPORT"),
            log=on("DS4_MTP_SPEC_LOG"),
            margin=margin,
            rpc_servers=servers,
        )


@_functools.cache
def current() -> Settings:
    """The settings of this process."""
    return Settings.of(_os.environ)
