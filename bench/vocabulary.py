"""Whether a head should choose among the first tokens of the vocabulary alone: what that saves, and what it misses.

    python -m bench.vocabulary TOKENIZER.json FILE [FILE ...]

Token ids follow the order in which their tokenizer learned them, so the first N are the frequent ones, and the product
over them is a view of the output matrix. A text's token behind them is never drafted. Printed: the share of tokens that
are among the first N, alone and with those that the text had not long before; and the speed, by what rows and steps
take, in ratio to choosing among all. `tokenizers` reads the file (the extra `reference`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

FIRST = (16384, 32768, 65536, 98304)
LATELY = 4000  # tokens
MOST = 60_000  # characters of a file

# DeepSeek-V4-Flash's widths on two cores of a Xeon with AMX: decodes of 1, 2, ... rows and a step of the head, in
# single rows; and of the step's bytes those of the output matrix.
DECODES, STEP, OF_OUTPUT = (1.0, 1.34, 1.65, 1.89), 0.117, 563 / 792


def shares(texts: Iterable[Sequence[int]], first: int) -> tuple[float, float]:
    """The share of tokens below `first`, and of those that are so or were in the text not long before."""
    below = known = n = 0
    for text in texts:
        last: dict[int, int] = {}
        for at, token in enumerate(text):
            n += 1
            below += token < first
            known += token < first or at - last.get(token, -LATELY - 1) <= LATELY
            last[token] = at
    return below / n, known / n


def speed(right: float, step: float, depth: int) -> float:
    """Tokens per single row, where a draft is `right` so often."""
    return sum(right**i for i in range(depth + 1)) / (DECODES[depth] + depth * step)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.vocabulary", description=__doc__.partition("\n")[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--right", type=float, default=0.85, help="the share of drafts that are right (%(default)s)")
    options = parser.parse_args()
    tokenizer = tokenizers.Tokenizer.from_file(str(options.tokenizer))
    texts = [
        tokenizer.encode(file.read_text(encoding="utf-8", errors="replace")[:MOST], add_special_tokens=False).ids
        for file in options.files
    ]
    if not any(texts):
        parser.error("no text in these files")
    n_vocab = tokenizer.get_vocab_size()
    print(f"{sum(map(len, texts))} tokens of {len(texts)} files, a vocabulary of {n_vocab}")
    print("first     share  speed at depth 1, 2, 3   with those of the text's last", LATELY)
    for first in FIRST:
        step = STEP * (1 - OF_OUTPUT * (1 - min(first, n_vocab) / n_vocab))
        line = f"{first:7d}"
        for share, depth in itertools.product(shares(texts, first), range(4)):
            if depth == 0:
                line += f"   {share:.3f}  "
            else:
                line += f" {speed(options.right * share, step, depth) / speed(options.right, STEP, depth):.3f}"
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
