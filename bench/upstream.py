"""Beside llama.cpp's own server on its own engine, without this package's patches: the same files, depths and threads.

    DS4_LLAMA_SERVER=PATH python -m bench.upstream [half|flash|code|prose|...] [-r ROUNDS] [-n TOKENS] [--depths 0,1,3]

One Llama with a head takes all of our turns, at each depth. *plain* is it at depth 0, where a token of the small model
takes some 4 % more than without a draft. One server per depth: at Flash's widths (9 GB each) give one depth per run.
CONTRIBUTING.md says how the server is built.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ds4_mtp_plugin import MtpDraft

# isort: split
from bench.contest import Contender
from bench.server import BINARY, ServerContender
from bench.test_decode import PROMPTS
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from ds4_mtp_plugin.host.wraps import session_of
from ds4_mtp_plugin.speculation import AdaptiveDepth, FixedDepth
from tests.fixtures.planted import BENCH, FLASH, FLASH_QUANT, first_layers, planted

Turn = Callable[[], tuple[float, list[int]]]


def ratios(over: Sequence[float], under: Sequence[float]) -> str:
    each = sorted(a / b for a, b in zip(over, under))
    return f"{statistics.median(each):6.2f} ({each[0]:.2f}, {each[-1]:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.upstream", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("half", "flash", *PROMPTS), nargs="?", default="half")
    parser.add_argument("--acceptance", type=float, default=0.9, help="of a planted head (%(default)s)")
    parser.add_argument("--depths", default="0,1,3", help="of the server, 0 for none (%(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-n", type=int, default=128, help="tokens (%(default)s)")
    options = parser.parse_args()
    if BINARY not in os.environ:
        parser.error(f"{BINARY} names no llama-server")
    directory = Path(os.environ.get("DS4_BENCH_DIR", "build/bench"))
    directory.mkdir(parents=True, exist_ok=True)
    trunk, head, prompt = BASE, HEAD, []
    if options.what not in PROMPTS:
        few = first_layers(dataclasses.replace(FLASH, n_expert=32), 10)
        quant: dict[str, object] = {"quant": "Q8_0"} if options.what == "half" else {"quant": FLASH_QUANT, "draw": True}
        config = BENCH if options.what == "half" else few
        files = planted(directory, config=config, acceptance=options.acceptance, **quant)  # type: ignore[arg-type]
        trunk, head, prompt = files.trunk, files.mtp, files.cycle[:64].tolist()
    threads = {"n_threads": os.cpu_count(), "n_threads_batch": os.cpu_count()}

    ours = Contender("ours", lambda: {"draft_model": MtpDraft(head)})
    ours.load(trunk, n_ctx=2048, **threads)
    session = session_of(ours.llm)
    assert ours.llm is not None and session is not None
    prompt = prompt or ours.llm.tokenize(PROMPTS[options.what].encode())

    def of_ours(depth: AdaptiveDepth) -> Turn:
        def turn() -> tuple[float, list[int]]:
            session.choose_by(depth)
            ours.run(prompt, options.n)
            return ours.seconds[-1], list(ours.text)

        return turn

    def of_server(server: ServerContender) -> Turn:
        def turn() -> tuple[float, list[int]]:
            server.run(prompt, options.n)
            return server.seconds[-1], server.text

        return turn

    turns = {"plain": of_ours(FixedDepth(0, text=False)), "automatic": of_ours(session._depth)}
    turns |= {f"depth {k}": of_ours(FixedDepth(k, text=False)) for k in (1, 2, 3)}
    servers = []
    try:
        for k in map(int, options.depths.split(",")):
            server = ServerContender(f"server {k}", head, k, 0, directory / f"upstream-{k}.log")
            servers.append(server)
            server.load(trunk, n_ctx=2048, **threads)
            turns[f"server {k}"] = of_server(server)
        names = list(turns)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        texts = {name: turn()[1] for name, turn in turns.items()}  # weights into memory, graphs built
        for i in range(options.rounds):
            for name in (*names[i % len(names) :], *names[: i % len(names)]):
                seconds[name].append(turns[name]()[0])
    finally:
        for each in (*servers, ours):
            each.close()
    for name in names:
        same = "same" if texts[name] == texts["plain"] else "OTHER"
        speed = (options.n - 1) / statistics.median(seconds[name])
        line = f"{name:10s} {speed:8.1f} tokens/s {ratios(seconds['plain'], seconds[name])}  {same}"
        if name.removeprefix("server ") in ("1", "2", "3"):
            depth = name.removeprefix("server ")
            line += f"  depth {depth} over it {ratios(seconds[name], seconds['depth ' + depth])}"
            line += f"  automatic over it {ratios(seconds[name], seconds['automatic'])}"
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
