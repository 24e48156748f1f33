"""Draws runs of the benchmarks: ``python -m bench.plot RESULTS.json ... PLOT.png`` (needs matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

TITLES = {
    "test_mini[code]": "ds4-mini, code",
    "test_mini[prose]": "ds4-mini, prose",
    "test_mini[an edit]": "ds4-mini,\nan edit",
    "test_mini[json]": "ds4-mini, JSON",
    "test_mini_at_a_temperature[code]": "code,\ntemperature .8",
    "test_mini_at_a_temperature[prose]": "prose,\ntemperature .8",
}
PLANTED = "test_planted_half_a_gigabyte"
CONTENDERS = {
    "automatic": "#d95f02",
    "mtp k=1": "#1b5e9b",
    "mtp k=2": "#4f94cd",
    "mtp k=3": "#9cc5e8",
    "n-grams alone": "#e6ab02",
    "server k=1": "#66806a",
    "server k=3": "#a8c3ab",
    "prompt lookup": "#b0b0b0",
}


def draw(runs: dict[str, dict[str, Any]], planted: dict[float, dict[str, Any]], path: Path) -> None:
    """The median ratio to plain decoding, with its least and greatest: by text and contender, and over acceptance."""
    figure, (axes, right) = plt.subplots(1, 2, figsize=(13, 3.8), layout="constrained", width_ratios=(3, 1.2))
    width = 0.8 / len(CONTENDERS)
    for i, (name, colour) in enumerate(CONTENDERS.items()):
        for at, run in enumerate(runs.values()):
            row = run.get(name, {})
            x = at + (i - (len(CONTENDERS) - 1) / 2) * width
            label = name.replace("mtp k=", "depth ").replace("server k=", "llama-server ") if at == 0 else None
            if "ratio" not in row:
                axes.bar(x, 0, width, color=colour, label=label)
                axes.text(x, 0.02, "fails" if row else "", ha="center", va="bottom", rotation=90, fontsize=8)
                continue
            spread = [[row["ratio"] - row["least"]], [row["greatest"] - row["ratio"]]]
            axes.bar(x, row["ratio"], width * 0.92, yerr=spread, color=colour, label=label, error_kw={"lw": 0.8})
    axes.axhline(1, color="black", lw=1)
    axes.text(len(runs) - 0.5, 1.01, "plain", ha="right", va="bottom", fontsize=8)
    axes.set_xticks(range(len(runs)), [TITLES.get(name, name) for name in runs])
    axes.set_ylabel("speed, ratio to plain decoding")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(CONTENDERS), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for name, colour in CONTENDERS.items():
        rows = {at: run[name] for at, run in sorted(planted.items()) if "ratio" in run.get(name, {})}
        low, high = ([abs(row["ratio"] - row[end]) for row in rows.values()] for end in ("least", "greatest"))
        ratios = [row["ratio"] for row in rows.values()]
        right.errorbar(list(rows), ratios, yerr=[low, high], color=colour, marker="o", ms=4, lw=1.5, elinewidth=0.6)
    right.axhline(1, color="black", lw=1)
    right.set_xlabel("500 MB: share of first drafts that are right")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    *results, path = sys.argv[1:]
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        benchmarks = json.loads(Path(result).read_text())["benchmarks"]
        found |= {each["name"]: each["extra_info"] for each in benchmarks}
    planted = {float(name[len(PLANTED) + 1 : -1]): run for name, run in found.items() if name.startswith(PLANTED)}
    draw({name: found[name] for name in TITLES if name in found}, planted, Path(path))


if __name__ == "__main__":
    main()
