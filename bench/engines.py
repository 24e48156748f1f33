"""What a change of the engine costs plain decoding: two builds of the libraries decode the same text, in turn.

    python -m bench.engines FOLDER FOLDER [-m MODEL] [-p PROMPT] [-n TOKENS] [-r ROUNDS] [-t THREADS] [--flash]

Each folder holds the libraries of one build; the first is the one that the ratios are to. Both run plain, each in a
process of its own, one waiting while the other decodes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def work(args: argparse.Namespace) -> None:
    """Decode once for each line of stdin: seconds and the last token to stdout."""
    import ds4_mtp_plugin  # noqa: F401  first, so that the host runs on the folder's library

    # isort: split
    from llama_cpp import Llama

    options: dict[str, Any] = {"n_threads": args.threads, "n_threads_batch": args.threads, "flash_attn": args.flash}
    llm = Llama(str(args.model), n_ctx=args.prompt + args.n, verbose=False, **options)
    print("ready", flush=True)
    for _ in sys.stdin:
        llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
        llm.eval([300 + i % 64 for i in range(args.prompt)])
        t0, token = time.perf_counter(), 0
        for _ in range(args.n):
            token = llm.sample(temp=0.0)
            llm.eval([token])
        print(time.perf_counter() - t0, token, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", type=Path)
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="MODEL", help="GGUF of a DeepSeek-V4 model")
    parser.add_argument("-p", "--prompt", type=int, default=64, metavar="PROMPT", help="its length (%(default)s)")
    parser.add_argument("-n", type=int, default=100, metavar="TOKENS", help="tokens a round (%(default)s)")
    parser.add_argument("-r", type=int, default=9, metavar="ROUNDS", help="after one to warm up (%(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count(), metavar="N", help="(%(default)s)")
    parser.add_argument("--flash", action="store_true", help="flash attention")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return 0
    if len(args.folders) != 2:
        parser.error("two folders of libraries are to be compared")
    processes = []
    for folder in args.folders:
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "bench.engines", *sys.argv[1:], "--work"],
                env={**os.environ, "LLAMA_CPP_LIB_PATH": str(folder.resolve())},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert processes[-1].stdout is not None and processes[-1].stdout.readline() == "ready\n"
    seconds: list[list[float]] = [[], []]
    last = set()
    for turn in range(1 + args.r):
        for i in (0, 1) if turn % 2 else (1, 0):
            stdin, stdout = processes[i].stdin, processes[i].stdout
            assert stdin is not None and stdout is not None
            print("go", file=stdin, flush=True)
            taken, token = stdout.readline().split()
            seconds[i].append(float(taken))
            last.add(token)
    for process in processes:
        process.communicate()
    ratios = sorted(b / a for a, b in zip(seconds[0][1:], seconds[1][1:]))
    for folder, each in zip(args.folders, seconds):
        print(f"{folder}: {args.n / statistics.median(each[1:]):.1f} tokens/s")
    print(
        f"time of the second to the first: {statistics.median(ratios):.3f} ({ratios[0]:.3f}, {ratios[-1]:.3f}), "
        f"{'the same' if len(last) == 1 else 'another'} last token"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
