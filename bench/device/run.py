"""Runs every step that is not done yet, as far as the time goes; how and where, `bench.device` says.

Only the standard library is used: what the steps need was packed in ``site``.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from bench.device.table import render

HERE = Path(__file__).resolve().parents[2]
RATES = ("0.9", "0.7", "0.5", "0.0")
RUNTIME = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")

#: Of a call, and the most that a step may take: one that could outlast the call is for the next.
BUDGET_S = 570
LIMIT_S = {"plant": 400, "servers": 400, "contest": 300, "middle": 300, "tests": 300}
OTHERS_S = 240
AGAIN = 75  # the exit status of a call that leaves something to do (EX_TEMPFAIL)


def cuda_libraries() -> list[str]:
    """The folders of CUDA 13's runtime libraries, from a toolkit or PyPI's packages; none where the linker has them.

    Raises FileNotFoundError for one that is nowhere.
    """
    known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    patterns = ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/x86_64-linux/lib"]
    patterns += [f"{place}/nvidia/*/lib" for place in sys.path if place]
    places = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), *(p for each in patterns for p in glob.glob(each))]
    found = []
    for name in RUNTIME:
        place = next((place for place in places if place and Path(place, name).exists()), None)
        if place is None and name not in known:
            raise FileNotFoundError(f"{name} is in none of {places}: install CUDA 13's runtime libraries")
        if place is not None and place not in found:
            found.append(place)
    return found


def interpreter() -> str:
    """A Python that finds the packed packages, and then this one's, whatever a test does with PYTHONPATH."""
    home = HERE / "python"
    if not home.exists():
        fresh = home.with_suffix(".part")
        venv.create(fresh, clear=True, symlinks=True)
        [packages] = fresh.glob("lib/python*/site-packages")
        others = [path for path in sys.path if path.endswith("-packages")]
        (packages / "packed.pth").write_text("\n".join([str(HERE / "site"), *others]) + "\n")
        fresh.rename(home)
    return str(home / "bin" / "python")


def environment(cpu: bool) -> dict[str, str]:
    env = dict(os.environ)
    for name in [name for name in env if name.startswith("DS4_MTP_")]:
        del env[name]
    env.pop("LLAMA_CPP_LIB_PATH", None)
    env.pop("PYTHONPATH", None)
    if not cpu:
        env["LD_LIBRARY_PATH"] = ":".join([*cuda_libraries(), *filter(None, [env.get("LD_LIBRARY_PATH")])])
    env["DS4_LLAMA_SERVER"] = str(HERE / "server" / "llama-server")
    env["DS4_TEST_GPU_LAYERS"] = "0" if cpu else "-1"
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    return env


def steps(tiny: bool) -> list[str]:
    """In order. One of tests is named by its file; of the others see `bench.device.steps`."""
    files = [path for room in ("engine", "host") for path in sorted(HERE.glob(f"tests/{room}/test_*.py"))]
    tests = [str(path.relative_to(HERE)) for path in files]
    if tiny:  # they all run in CI anyway: one of each room, for this script's sake
        tests = ["tests/engine/test_binding.py", "tests/host/test_cli.py"]
    races = [f"{step} {rate}" for rate in RATES for step in ("contest", "servers")]
    costs = ["costs", "cycle", *([] if tiny else ["kernels"])]
    return ["machine", "text", *tests, "middle", "plant", "bits", "operations", *costs, *races]


def limit(step: str) -> int:
    return LIMIT_S.get(step.split()[0].split("/")[0], OTHERS_S)


def do(step: str, options: dict[str, Any], env: dict[str, str], out: Path) -> dict[str, Any]:
    """A step in a process of its own. Its result: what it wrote, or what went wrong, and its seconds."""
    result = out / "step.json"
    result.unlink(missing_ok=True)
    if step.startswith("tests/"):
        command = [interpreter(), "-m", "pytest", "-q", "-p", "no:cacheprovider", step]
    else:
        command = [interpreter(), "-m", "bench.device.steps", *step.split()]
    given = json.dumps({**options, "result": str(result)})
    t0 = time.monotonic()
    log = out / f"{step.replace('/', '-').replace(' ', '-')}.log"
    with log.open("w") as file:
        try:
            where: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "env": env, "cwd": HERE}
            status = subprocess.run(
                command, input=given, text=True, timeout=limit(step), check=False, **where
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    said = log.read_text(errors="replace").strip().splitlines()[-12:]
    done: dict[str, Any] = {"seconds_taken": round(time.monotonic() - t0, 1)}
    if status != 0:
        done["failed"] = f"no end within {limit(step)} s" if status == -1 else f"status {status}"
        done["said"] = said
    elif step.startswith("tests/"):
        done["tests"] = said[-1].strip("= ")
    else:
        done |= json.loads(result.read_text())
    return done


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.device.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="results.json, table.txt, logs")
    parser.add_argument("--models", type=Path, default=Path("models"), help="a folder with room, 60 GB (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="where there is no GPU")
    parser.add_argument("--tiny", action="store_true", help="small models, short texts, few tests")
    parser.add_argument("--again", metavar="STEP", action="append", default=[], help="forget this step's result first")
    parser.add_argument("--only", metavar="STEP", action="append", help="no others than this (and others given so)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="begin none that could end later"
    )
    args = parser.parse_args()
    t0 = time.monotonic()
    out, models = args.out.resolve(), args.models.resolve()
    out.mkdir(parents=True, exist_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    env = environment(args.cpu)
    options = {"n_gpu_layers": 0 if args.cpu else -1, "tiny": args.tiny, "models": str(models), "out": str(out)}

    kept = out / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for step in args.again:
        results.pop(step, None)
    if not any(models.glob("big/*-trunk.gguf")):
        results.pop("plant", None)  # another machine than last time
    if "failed" in results.get("machine", {}):
        del results["machine"]
    left = [step for step in args.only or steps(args.tiny) if step not in results]
    while left and time.monotonic() - t0 + (0 if args.tiny else limit(left[0])) <= args.budget:
        step = left.pop(0)
        print(f"{step} ...", end=" ", flush=True)
        results[step] = do(step, options, env, out)
        fresh = kept.with_suffix(".part")
        fresh.write_text(json.dumps(results, indent=1))
        fresh.replace(kept)
        print(results[step].get("failed", "done"), f"{results[step]['seconds_taken']} s", flush=True)
        if step == "machine" and "failed" in results[step]:
            left = []  # without the engine and a GPU nothing else means anything
    (out / "table.txt").write_text(render(results))
    print(render(results))
    failed = [step for step, result in results.items() if "failed" in result]
    print(f"{len(results)} steps done, {len(left)} left, failed: {', '.join(failed) or 'none'}")
    return AGAIN if left else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
