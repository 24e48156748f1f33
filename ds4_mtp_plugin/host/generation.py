"""One run of the host's generation loop."""

from __future__ import annotations


class Generation:
    """What speculation knows of one ``Llama.generate()``.

    Attributes:
        wanted: tokens that the app still wants of it; None where nobody has said.
        drafting: whether it drafts. It does not without a draft, and no longer once something failed in it.
    """

    def __init__(self, wanted: int | None = None, *, drafting: bool = True) -> None:
        self.wanted = wanted
        self.drafting = drafting

    def chosen(self) -> None:
        """A token was sampled and is about to be handed out."""
        if self.wanted is not None:
            self.wanted -= 1

    def room(self, n_past: int, n_ctx: int) -> int:
        """How many drafts behind a token at n_past can be of use: no more than the context holds or the app wants.

        That token's successor is sampled from its own row, so the last token wanted is never evaluated.
        """
        room = n_ctx - 1 - n_past
        return room if self.wanted is None else min(room, self.wanted - 1)
