"""What the head drafts at every token of a text, written down: the text that `tests/unit/test_traces.py` replays.

    python -m bench.traces FILE.json [-m BASE --mtp HEAD] [-n TOKENS]

The text is decoded plainly and three tokens are drafted at each, none of which is verified. Text and drafts are the
same however many are verified, so this alone tells what any choice of depths would have come to. Written for each
position: how many of the drafts are right, and by how much the best logit of each leads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ds4_mtp_plugin import MtpDraft

# isort: split
from llama_cpp import Llama

from bench.test_decode import PROMPTS
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from ds4_mtp_plugin.engine import Best
from ds4_mtp_plugin.host.wraps import session_of
from ds4_mtp_plugin.speculation import FixedDepth

DEPTH = 3


class Recorder(FixedDepth):
    """Drafts at every token and verifies nothing."""

    def __init__(self) -> None:
        super().__init__(DEPTH, text=False)
        self.drafts: list[list[Best]] = []

    def choose(self, room: int) -> int:
        n = super().choose(room)
        if n:
            self.drafts.append([])
        return n

    def more(self, best: Best) -> bool:
        self.drafts[-1].append(best)
        return True

    def worth(self, n: int) -> int:
        return 0

    def drafted(self, n: int, seconds: float) -> None:
        pass


def record(base: Path, head: Path, prompt: str, n: int, **sampling: Any) -> list[tuple[int, list[float]]]:
    """For each token of the text: of three drafts behind it, how many are right, and their leads."""
    llm = Llama(
        str(base), n_ctx=2048, verbose=False, draft_model=MtpDraft(head, ngram=False, adaptive=True, checkpoints_mb=0)
    )
    session, recorder = session_of(llm), Recorder()
    assert session is not None
    session.choose_by(recorder)
    text: list[int] = []
    llm.set_seed(1)
    for token in llm.generate(llm.tokenize(prompt.encode()), **sampling):
        text.append(token)
        if len(text) == n or token == llm.token_eos():
            break
    llm.close()
    rows = []
    for at, drafts in enumerate(recorder.drafts[: len(text) - DEPTH], start=1):
        right = 0
        while right < len(drafts) and drafts[right].id == text[at + right]:
            right += 1
        rows.append((right, [round(draft.margin, 1) for draft in drafts]))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traces", description=__doc__)
    parser.add_argument("path", type=Path, metavar="FILE.json")
    parser.add_argument("-m", "--model", type=Path, default=BASE, metavar="BASE", help="(the embedded model)")
    parser.add_argument("--mtp", type=Path, default=HEAD, metavar="HEAD", help="(the embedded head)")
    parser.add_argument("-n", type=int, default=400, metavar="TOKENS", help="at most, of each text (%(default)s)")
    args = parser.parse_args()
    lines = []
    for name, prompt in PROMPTS.items():
        for temperature in (0.0, 0.8):
            rows = record(args.model, args.mtp, prompt, args.n, temp=temperature)
            shares = [sum(right > i for right, _ in rows) / max(1, len(rows)) for i in range(DEPTH)]
            title = f"{name}, {'greedy' if temperature == 0 else f'temperature {temperature}'}"
            print(f"{title}: {len(rows)} tokens, drafts 1, 2, 3 right: {', '.join(f'{s:.2f}' for s in shares)}")
            lines.append(f"{json.dumps(title)}: {json.dumps(rows, separators=(',', ':'))}")
    args.path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
