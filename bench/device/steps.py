"""The steps that run models. Each is a function of its options, runs in a process of its own and prints its result.

``python -m bench.device.steps NAME [ARGUMENT] < OPTIONS``, by `bench.device.run`: an abort ends one step, not all.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ds4_mtp_plugin  # noqa: F401  first, so that the host runs on its library

# isort: split
import llama_cpp._internals as internals
import numpy as np
from llama_cpp import Llama, llama_cpp
from llama_cpp._logger import set_verbose

from bench.contest import Contender, Contest, contenders
from bench.device.server import ServerContender
from ds4_mtp_plugin import MtpDraft, __version__, engine, host
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from tests.fixtures.planted import (
    BENCH,
    BY_CONTEXT,
    FLASH,
    FLASH_QUANT,
    SMALL,
    TINY,
    Planted,
    first_layers,
    planted,
    replant,
)
from tests.fixtures.row_engine import RowEngine
from tests.text import generate

RATES = (0.9, 0.7, 0.5, 0.0)
DEPTHS = (1, 2, 3, 4)

#: Up to a layer of each kind: the engine divides by zero where none is compressed.
LEAST_LAYERS = 4

#: GPU memory that is not for weights: contexts of six contenders and of CUDA. Disk that stays free.
SPARE_GPU, SPARE_DISK = 14e9, 2e9


@dataclasses.dataclass
class Options:
    """``n_gpu_layers`` is 0 for the CPU; ``tiny`` models and texts for a try; ``models`` and ``out`` are folders."""

    n_gpu_layers: int
    tiny: bool
    models: Path
    out: Path

    @property
    def n_tokens(self) -> int:
        return 24 if self.tiny else 200

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 5

    @property
    def llama(self) -> dict[str, Any]:
        threads = {} if self.n_gpu_layers else {"n_threads": 1, "n_threads_batch": 1}
        return {"n_ctx": 1024, "n_batch": 256, "n_ubatch": 256, "n_gpu_layers": self.n_gpu_layers, **threads}


def gpu(field: str) -> float:
    """A figure of nvidia-smi in its own unit (MiB), 0 where there is no GPU."""
    if shutil.which("nvidia-smi") is None:
        return 0.0
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def load_files_once() -> None:
    """From now on this process loads no model file twice: six copies of fifty gigabytes would not fit."""

    def once(make: Callable[..., Any], path: Callable[..., str]) -> Callable[..., Any]:
        kept: dict[str, Any] = {}

        def load(*args: Any, **kwargs: Any) -> Any:
            name = path(*args, **kwargs)
            if name not in kept:
                kept[name] = make(*args, **kwargs)
                kept[name].close = lambda: None  # the others still have it
            return kept[name]

        return load

    loader: Any = internals
    loader.LlamaModel = once(internals.LlamaModel, lambda **kwargs: kwargs["path_model"])
    loader = engine
    loader.Model = once(engine.Model, lambda library, path, **kwargs: path)


def big(options: Options, acceptance: float) -> Planted:
    """DeepSeek-V4-Flash's dimensions, as many layers as fit; one head, which changes its acceptance in its place."""
    directory = options.models / "big"
    directory.mkdir(parents=True, exist_ok=True)
    for half in directory.glob("*.part"):
        half.unlink()
    layers, rate = directory / "layers", directory / "rate"
    if not layers.exists():
        layers.write_text(str(fitting_layers(directory)) if not options.tiny else str(LEAST_LAYERS))
    config = first_layers(SMALL if options.tiny else FLASH, int(layers.read_text()))
    now = float(rate.read_text()) if rate.exists() else acceptance
    rate.write_text(str(now))
    model = planted(directory, config=config, acceptance=now, among=RATES, quant=FLASH_QUANT, draw=True)
    model = replant(model, acceptance)
    rate.write_text(str(acceptance))
    return model


def fitting_layers(directory: Path) -> int:
    """As many as GPU and disk have room for, beside a head of one layer and the embeddings of both files."""
    layer, roots = 3.65e9, 1.15e9
    room = shutil.disk_usage(directory).free - SPARE_DISK
    if gpu("memory.free"):
        room = min(room, gpu("memory.free") * 2**20 - SPARE_GPU)
    n = int((room - layer - 2 * roots) / layer)
    if n < LEAST_LAYERS:
        raise RuntimeError(f"no room for {LEAST_LAYERS} layers: {room / 1e9:.1f} GB")
    return min(n, FLASH.n_layer)


def machine(options: Options) -> dict[str, Any]:
    """What this is, and that the engine uses the GPU: else every figure would be the CPU's."""
    info = engine.Library(host.library_path()).system_info
    found: dict[str, Any] = {"plugin": __version__, "python": platform.python_version(), "engine": info.strip()}
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found["cpu"] = f"{len(names)} x {names[0].split(': ')[1]}" if names else platform.machine()
    if options.n_gpu_layers:
        if "CUDA" not in info or not llama_cpp.llama_supports_gpu_offload():
            raise RuntimeError(f"the engine has no GPU: {info}")
        fields = "name,memory.total,driver_version"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


def text(options: Options) -> dict[str, Any]:
    """Where drafted text first differs from plain text, None where nowhere; greedy and seeded, and the mini model."""
    n = options.n_tokens
    results: dict[str, int | None] = {}

    def compare(name: str, trunk: Path, mtp: Path, prompt: list[int] | None) -> None:
        for sampling in ({"temp": 0.0}, {"temp": 0.8}):
            texts = []
            for depth in (0, *DEPTHS):
                draft = MtpDraft(mtp, num_pred_tokens=depth) if depth else None
                llm = Llama(str(trunk), verbose=False, seed=7, draft_model=draft, **options.llama)
                texts.append(generate(llm, prompt or llm.tokenize(b"def read_lines(path):\n"), n, **sampling))
                llm.close()
            for depth, drafted in zip(DEPTHS, texts[1:]):
                first = next((i for i, (a, b) in enumerate(zip(texts[0], drafted)) if a != b), None)
                results[f"{name}, temp {sampling['temp']}, depth {depth}"] = first

    for quant in ("Q8_0",) if options.tiny else ("F16", "Q8_0", "MXFP4"):
        files = planted(options.models, config=TINY, acceptance=0.8, quant=quant)
        compare(f"planted {quant}", files.trunk, files.mtp, files.cycle[:64].tolist())
        files = planted(options.models, config=TINY, quant=quant, **BY_CONTEXT)
        compare(f"planted by context {quant}", files.trunk, files.mtp, files.cycle[:64].tolist())
    compare("ds4-mini", BASE, HEAD, None)
    return {"first_difference": results, "same": sum(v is None for v in results.values()), "of": len(results)}


def bits(options: Options) -> dict[str, Any]:
    """Differing bits between the logits of rows decoded k at a time and one at a time."""
    load_files_once()
    results = {}

    def compare(name: str, trunk: Path, n: int) -> None:
        tokens = np.random.default_rng(0).integers(260, 500, n).tolist()
        with RowEngine(trunk, n_batch=1) as single:
            alone, _ = single.decode(tokens)
        for k in (2, 5) if options.tiny else (2, 3, 5, 17):
            with RowEngine(trunk, n_batch=k) as together:
                rows, _ = together.decode(tokens)
            differing = np.bitwise_xor(rows.view(np.uint32), alone.view(np.uint32))
            results[f"{name}, {k} rows"] = {
                "rows": int((differing != 0).any(1).sum()),
                "of_rows": n,
                "bits": int(np.unpackbits(differing.view(np.uint8)).sum()),
                "of_bits": differing.size * 32,
                "greatest": float(np.abs(rows - alone).max()),
                "other_choice": int((rows.argmax(1) != alone.argmax(1)).sum()),
            }

    for quant in ("Q8_0",) if options.tiny else ("F32", "F16", "BF16", "Q8_0", "MXFP4"):
        trunk = planted(options.models, quant=quant, **BY_CONTEXT).trunk
        compare(f"planted {quant}", trunk, 24 if options.tiny else 300)
    compare("big", big(options, RATES[0]).trunk, 24 if options.tiny else 60)
    return results


def plant(options: Options) -> dict[str, Any]:
    """Write the big model."""
    t0 = time.perf_counter()
    model = big(options, RATES[0])
    sizes = {"trunk_gb": model.trunk.stat().st_size / 1e9, "mtp_gb": model.mtp.stat().st_size / 1e9}
    return {"layers": model.config.n_layer, **sizes, "seconds": time.perf_counter() - t0}


def costs(options: Options) -> dict[str, Any]:
    """v(n), the time of a decode of n rows of the big trunk, over that of one; c, an MTP step, over the same; ms."""
    model = big(options, RATES[0])
    tokens = model.follow(int(model.cycle[0]), 1000)
    before, found = gpu("memory.used"), dict[str, Any]()
    with RowEngine(model.trunk, n_rs_seq=max(DEPTHS)) as trunk, RowEngine(model.mtp, mtp=True, n_ctx=512) as mtp:
        found["memory_mib"] = gpu("memory.used") - before
        _, hidden = trunk.decode(tokens[:64])
        at = 64
        times: dict[int, list[float]] = {n: [] for n in range(1, max(DEPTHS) + 2)}
        for n in list(times) * (3 if options.tiny else 30):
            t0 = time.perf_counter()
            _, hidden = trunk.decode(tokens[at : at + n], at)
            times[n].append(time.perf_counter() - t0)
            at += n
        steps = []
        for i in range(3 if options.tiny else 60):
            t0 = time.perf_counter()
            mtp.decode(tokens[i + 1 : i + 2], i + 1, hidden[:1])
            steps.append(time.perf_counter() - t0)
    # The first of each shape builds graphs and kernels.
    ms = {n: 1000 * statistics.median(each[1:]) for n, each in times.items()}
    step = 1000 * statistics.median(steps[1:])
    return {**found, "verify_ms": ms, "step_ms": step, "v": {n: t / ms[1] for n, t in ms.items()}, "c": step / ms[1]}


class Weighed(Contender):
    """A contender that knows the GPU memory its loading took, in MiB; a file's weights count for the first only."""

    def load(self, trunk: Path, **options: Any) -> None:
        before = gpu("memory.used")
        super().load(trunk, **options)
        self.memory = gpu("memory.used") - before

    def stats(self) -> dict[str, Any]:
        return {**super().stats(), "memory_mib": self.memory}


class WeighedServer(Weighed, ServerContender):
    pass


def field(options: Options, mtp: Path) -> tuple[list[Contender], list[Contender]]:
    """Plain and ours; the server plain and with its own drafting."""
    ours: list[Contender] = [Weighed(each.name, each.options) for each in contenders(mtp, DEPTHS)[:-1]]
    servers: list[Contender] = []
    for k in (0, *DEPTHS):
        name = f"server k={k}" if k else "server plain"
        servers.append(WeighedServer(name, mtp, k, options.n_gpu_layers, options.out / f"{name.replace(' ', '-')}.log"))
    return ours, servers


def race(contest: Contest, options: Options) -> None:
    contest.round()  # warm-up
    for each in contest.field:
        each.seconds.clear()
    for _ in range(options.rounds):
        contest.round()


def middle(options: Options) -> dict[str, Any]:
    """A model of half a gigabyte: everybody at once, in turn."""
    load_files_once()
    config = TINY if options.tiny else BENCH
    files = planted(options.models, config=config, acceptance=0.8, quant="Q8_0")
    ours, servers = field(options, files.mtp)
    contest = Contest(files.trunk, [*ours, *servers], files.cycle[:64].tolist(), options.n_tokens, **options.llama)
    try:
        race(contest, options)
        return contest.results()
    finally:
        contest.close()


def contest(options: Options, acceptance: str) -> dict[str, Any]:
    """The big model: plain and ours in turn, then the servers one after the other, for only one copy of it fits."""
    load_files_once()
    files = big(options, float(acceptance))
    ours, _ = field(options, files.mtp)
    together = Contest(files.trunk, ours, files.cycle[:64].tolist(), options.n_tokens, **options.llama)
    race(together, options)
    plain = together.field[0]
    return {**together.results(), "plain run": {"seconds": plain.seconds, "text": plain.text}}


def servers(options: Options, acceptance: str) -> dict[str, Any]:
    files = big(options, float(acceptance))
    before = json.loads((options.out / "results.json").read_text())[f"contest {acceptance}"]["plain run"]
    plain = Contender("plain", dict, seconds=before["seconds"], text=before["text"])
    plain.stats = dict  # type: ignore[method-assign]
    results = {}
    for each in field(options, files.mtp)[1]:
        try:
            alone = Contest(files.trunk, [each], files.cycle[:64].tolist(), options.n_tokens, **options.llama)
            race(alone, options)
            alone.field.insert(0, plain)
            results[each.name] = alone.results()[each.name]
        except RuntimeError as error:
            results[each.name] = {"did not survive": str(error)}
        finally:
            each.close()
    return results


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (machine, text, bits, middle, plant, costs, contest, servers)
}


def main() -> int:
    name, *arguments = sys.argv[1:]
    given = json.load(sys.stdin)
    options = Options(given["n_gpu_layers"], given["tiny"], Path(given["models"]), Path(given["out"]))
    set_verbose(False)
    Path(given["result"]).write_text(json.dumps(STEPS[name](options, *arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
