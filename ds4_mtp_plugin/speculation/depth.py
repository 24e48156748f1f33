"""How many tokens to draft next: gates that end a draft early.

A gate looks at the drafts alone, never at what the target would say, so it costs or saves time and cannot change a
text.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine import Best


@dataclass(frozen=True)
class Gate:
    """Ends a draft at the first token that the head is not sure enough of.

    Attributes:
        p_min: least softmax probability of a draft (llama.cpp's ``--draft-p-min``); 0 lets every draft pass.
        margin: least lead of a draft over the second best logit (ds4's ``--mtp-margin``); 0 lets every draft pass.
    """

    p_min: float = 0.0
    margin: float = 0.0

    @property
    def open(self) -> bool:
        """Whether every draft passes, so that nobody has to know how sure the head is."""
        return self.p_min <= 0 and self.margin <= 0

    def passes(self, best: Best) -> bool:
        return best.prob >= self.p_min and best.margin >= self.margin
