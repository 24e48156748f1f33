"""A few decodes of the small model, for `ds4-mtp doctor`: ``python -m ds4_mtp_plugin.cli.decode_check``.

A process of its own, because an engine that does not fit its machine may end it.
"""

from __future__ import annotations

from ..engine import Batch, Model
from ..host.library import current
from .demo import BASE

__all__ = ["main"]


def main() -> None:
    """Decode single rows, as many as a verify has, and as many as a prompt has.

    Raises:
        EngineError: a decode failed.
    """
    model = Model(current(), str(BASE))
    context = model.new_context(n_ctx=512)
    batch, n_past = Batch(128), 0
    for n in (64, 1, 3, 17, 1, 128):
        context.decode(batch.set([300 + i for i in range(n)], n_past, 0))
        context.best()
        n_past += n
    context.close()
    model.close()


if __name__ == "__main__":
    main()
