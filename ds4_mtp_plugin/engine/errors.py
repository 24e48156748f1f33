"""What the engine fails at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .library import Library

# llama.h, llama_decode: the abort callback asked for it.
ABORTED = 2


class EngineError(RuntimeError):
    """What the engine, or a drafter on it, failed at. Speculation ends at one; the text goes on without it."""


class DecodeError(EngineError):
    """A decode that the engine did not carry out; `code` is the value that it returned (llama.h, llama_decode)."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what}: the engine's decode returned {code}")
        self.code = code


class ServerLost(EngineError):
    """A server (RPC) that holds a part of a model is lost; the message names it and says how.

    It could not be reached, closed the connection, was silent for too long, or is no such server. What lay there is
    gone: the model's contexts are empty and of no use, and all that helps is to make them, and the model, anew.
    """


class NoSuchRow(EngineError, IndexError):
    """The last decode kept no such row."""


class DecodeAborted(RuntimeError):
    """The app's abort callback ended a decode (llama.h, llama_set_abort_callback).

    It is no failure and so no EngineError; it reads as the host's own error for an aborted decode.
    """

    def __init__(self) -> None:
        super().__init__(f"llama_decode returned {ABORTED}")


@contextlib.contextmanager
def naming_servers(library: Library) -> Iterator[None]:
    """What fails inside because a server is lost, or not there, raises `ServerLost`."""
    before, _ = library.losses()
    try:
        yield
    except (RuntimeError, ValueError) as err:
        n, why = library.losses()
        if n == before or isinstance(err, ServerLost):
            raise
        raise ServerLost(why) from err
