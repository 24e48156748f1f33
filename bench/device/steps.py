"""The steps that run models. Each is a function of its options, runs in a process of its own and prints its result.

``python -m bench.device.steps NAME [ARGUMENT] < OPTIONS``, by `bench.device.run`: an abort ends one step, not all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ds4_mtp_plugin  # noqa: F401  first, so that the host runs on its library

# isort: split
import llama_cpp._internals as internals
import numpy as np
import numpy.typing as npt
from llama_cpp import Llama, llama_cpp
from llama_cpp._logger import set_verbose

from bench.contest import Contender, Contest, contenders
from bench.device.operations import differing
from bench.server import ServerContender
from ds4_mtp_plugin import MtpDraft, __version__, engine, host
from ds4_mtp_plugin.cli.demo import BASE, HEAD
from ds4_mtp_plugin.host.opening import GPU_BLOCK
from ds4_mtp_plugin.speculation import CommonSpeculative, MtpDrafter
from tests.fixtures import GPU_LAYERS
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
#: Rows of a verify whose time is taken: up to those of the deepest draft of a head, and of one from the text.
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 17)

#: Up to a layer of each kind: the engine divides by zero where none is compressed.
LEAST_LAYERS = 4

#: DeepSeek-V4-Flash with 64 of the 256 experts of a layer, of which a token takes 6: what a decode reads is the same,
#: and layers that are written in a quarter of the time leave the rest for what is measured.
BIG = dataclasses.replace(FLASH, n_expert=64)

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
        sizes = {"n_ctx": 1024, "n_batch": 256, "n_ubatch": 256}
        return {**sizes, "n_gpu_layers": self.n_gpu_layers, "flash_attn": self.flash, **threads}

    @property
    def flash(self) -> bool:
        """Flash attention, as a user has it on a GPU and llama.cpp's server by itself."""
        return self.n_gpu_layers != 0


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
    """DeepSeek-V4-Flash's dimensions but for the number of experts, as many layers as fit; one head, which changes its
    acceptance in its place."""
    directory = options.models / "big"
    directory.mkdir(parents=True, exist_ok=True)
    for half in directory.glob("*.part"):
        half.unlink()
    layers, rate = directory / "layers", directory / "rate"
    if not layers.exists():
        layers.write_text(str(fitting_layers(directory)) if not options.tiny else str(LEAST_LAYERS))
    config = first_layers(SMALL if options.tiny else BIG, int(layers.read_text()))
    now = float(rate.read_text()) if rate.exists() else acceptance
    rate.write_text(str(now))
    model = planted(directory, config=config, acceptance=now, among=RATES, quant=FLASH_QUANT, draw=True)
    model = replant(model, acceptance)
    rate.write_text(str(acceptance))
    return model


def fitting_layers(directory: Path) -> int:
    """As many as GPU and disk have room for, beside a head of one layer and the embeddings of both files."""
    layer, roots = 1.02e9, 1.15e9
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


def bits(options: Options, only: str = "") -> dict[str, Any]:
    """Differing bits between the logits of rows decoded k at a time and one at a time, behind prompts of some lengths,
    of all models or of one, "big" or a type of weights.

    "first" is the first row that differs; "cut": no k rows lie on two sides of a multiple of `GPU_BLOCK`.
    """
    load_files_once()
    results = {}

    def compare(name: str, trunk: Path, prompts: Sequence[int], n: int, flashes: Sequence[bool]) -> None:
        tokens = np.random.default_rng(0).integers(260, 500, max(prompts) + n).tolist()
        size = (max(prompts) + n + 255) // 256 * 256

        def decode(prompt: int, k: int, cut: bool, flash: bool) -> npt.NDArray[np.float32]:
            with RowEngine(trunk, n_ctx=size, n_batch=512, n_ubatch=512, flash=flash) as engine:
                if prompt:
                    engine.decode(tokens[:prompt])
                return engine.decode_by(k, tokens[: prompt + n], prompt, within=GPU_BLOCK if cut else None)[0]

        for flash, prompt in itertools.product(flashes, prompts):
            alone = decode(prompt, 1, False, flash)
            for k, cut in [*((k, True) for k in ((2, 5) if options.tiny else (2, 3, 4, 5))), (5, False)]:
                rows = decode(prompt, k, cut, flash)
                differing = np.bitwise_xor(rows.view(np.uint32), alone.view(np.uint32))
                found = np.flatnonzero((differing != 0).any(1))
                results[f"{name}{', flash' if flash else ''}, from {prompt}, {k} rows{', cut' if cut else ''}"] = {
                    "rows": len(found),
                    "of_rows": n,
                    "first": prompt + int(found[0]) if len(found) else None,
                    "bits": int(np.unpackbits(differing.view(np.uint8)).sum()),
                    "of_bits": differing.size * 32,
                    "greatest": float(np.abs(rows - alone).max()),
                    "other_choice": int((rows.argmax(1) != alone.argmax(1)).sum()),
                }

    quants = ("Q8_0",) if options.tiny else ("Q8_0", "MXFP4", "F16", "Q4_K", "BF16", "F32")
    for quant in [quant for quant in quants if only in ("", quant)]:
        trunk = planted(options.models, config=SMALL, quant=quant, **BY_CONTEXT).trunk
        prompts = (0,) if options.tiny else (0, 990) if quant != "Q8_0" else (0, 990, 16000)
        compare(f"planted {quant}", trunk, prompts, 24 if options.tiny else 80, (False, True))
    if only in ("", "big") and (options.models / "big").exists():
        compare("big", big(options, RATES[0]).trunk, (100,) if options.tiny else (230, 1000), 40, (True,))
    return results


def operations(options: Options) -> dict[str, Any]:
    """Where rows that are decoded together begin to differ from single ones, by model, flash attention and rows."""
    models = {"ds4-mini": BASE}
    for quant in ("Q8_0",) if options.tiny else ("F16", "Q8_0", "MXFP4", "Q4_K"):
        models[f"planted {quant}"] = planted(options.models, config=SMALL, quant=quant, **BY_CONTEXT).trunk
    if (options.models / "big").exists():
        models["big"] = big(options, RATES[0]).trunk
    results = {}
    for name, path in models.items():
        for flash in (False, True):
            rows = (2, 5) if options.tiny else (2, 3, 4, 5)
            for k, found in differing(path, flash=flash, n_gpu_layers=options.n_gpu_layers, rows=rows).items():
                results[f"{name}{', flash' if flash else ''}, {k} rows"] = dataclasses.asdict(found)
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
    tokens = model.follow(int(model.cycle[0]), 1500)
    before, found = gpu("memory.used"), dict[str, Any]()
    times = 3 if options.tiny else 25
    with opened(options, model.trunk, n_rs_seq=max(ROWS) - 1) as trunk, opened(options, model.mtp, mtp=True) as mtp:
        found["memory_mib"] = gpu("memory.used") - before
        at = 64
        batch = engine.Batch(at)
        trunk.decode(batch.set(tokens[:at], 0, 0))
        hidden = trunk.hidden_rows(at - 1, 1)

        def verify(n: int) -> float:
            nonlocal at
            t0 = time.perf_counter()
            trunk.decode(batch.set(tokens[at : at + n], at, 0, outputs="all"))
            trunk.hidden_rows(0, n)
            at += n
            return time.perf_counter() - t0

        pairs = engine.Batch(8, n_embd_out=mtp.n_embd_out)
        pairs.embd[:] = hidden
        step_at = 1

        def step(n: int) -> float:
            nonlocal step_at
            t0 = time.perf_counter()
            mtp.decode(pairs.set(tokens[step_at : step_at + n], step_at, 0))
            mtp.best()
            mtp.hidden(-1, pairs.embd[0])
            step_at += n
            return time.perf_counter() - t0

        # One size in a row, then two in turn, as a cycle has them.
        ms = {n: median_ms([verify(n) for _ in range(times if n < 6 else times // 3)]) for n in ROWS}
        turns = [(verify(1), verify(3)) for _ in range(times)]
        steps = {n: median_ms([step(n) for _ in range(times)]) for n in (1, 2, 4)}
        step_turns = [(step(1), step(2)) for _ in range(times)]
        found["step_logits_ms"] = steps[1]
        found["picked_in_graph"] = mtp.pick_in_graph()
        steps = {n: median_ms([step(n) for _ in range(times)]) for n in (1, 2, 4)}
    found["verify_in_turn_ms"] = {n: median_ms(each) for n, each in zip((1, 3), zip(*turns))}
    found["steps_ms"] = steps
    found["step_in_turn_ms"] = {n: median_ms(each) for n, each in zip((1, 2), zip(*step_turns))}
    v = {n: t / ms[1] for n, t in ms.items()}
    return {**found, "verify_ms": ms, "step_ms": steps[1], "v": v, "c": steps[1] / ms[1]}


@contextlib.contextmanager
def opened(options: Options, path: Path, *, mtp: bool = False, **params: Any) -> Iterator[engine.Context]:
    """A context as a Llama with a draft has it, of a model of its own."""
    model = engine.Model(engine.Library(host.library_path()), str(path), load_mtp=mtp, n_gpu_layers=GPU_LAYERS)
    sizes = {"n_ctx": 512 if mtp else 2048, "n_batch": 256, "n_ubatch": 256, "flash_attn_type": int(options.flash)}
    context = model.new_context(mtp=mtp, **sizes, **params)
    context.set_hidden(engine.HIDDEN_OUTPUTS if mtp else engine.HIDDEN_ALL)
    try:
        yield context
    finally:
        context.close()
        model.close()


def cycle(options: Options, depth: str = "3") -> dict[str, Any]:
    """Where the time of a cycle goes, as the process sees it: milliseconds per token, and calls, by function. What
    waits for a GPU is what asks for a decode's result."""
    model = big(options, RATES[0])
    found: dict[str, Any] = {}
    for k in (0, int(depth)):
        draft = MtpDraft(model.mtp, num_pred_tokens=k) if k else None
        llm = Llama(str(model.trunk), verbose=False, draft_model=draft, **options.llama)
        prompt = model.cycle[:64].tolist()
        generate(llm, prompt, options.n_tokens, temp=0.0)
        llm.reset()  # type: ignore[no-untyped-call, unused-ignore]
        with ExitStack() as stack:
            spent = {
                name: stack.enter_context(timed(owner, method))
                for name, owner, method in (
                    ("decode", engine.Context, "decode"),
                    ("hidden rows (waits)", engine.Context, "hidden_rows"),
                    ("best (waits)", engine.Context, "best"),
                    ("hidden row of a step", engine.Context, "hidden"),
                    ("host decode", internals.LlamaContext, "decode"),
                    ("host sample", internals.LlamaSampler, "sample"),
                    ("draft", MtpDrafter, "draft"),
                    ("verify", CommonSpeculative, "verify"),
                    ("accept", CommonSpeculative, "accept"),
                    ("eval", Llama, "eval"),
                )
            }
            t0 = time.perf_counter()
            text = generate(llm, prompt, options.n_tokens, temp=0.0)
            whole = time.perf_counter() - t0
        n = len(text)
        found[f"depth {k}"] = {
            "whole": {"ms": 1000 * whole / n, "calls": 1.0},
            **{name: {"ms": 1000 * sum(each) / n, "calls": len(each) / n} for name, each in spent.items() if each},
        }
        llm.close()
    return found


@contextlib.contextmanager
def timed(owner: type, name: str) -> Iterator[list[float]]:
    """Seconds of every call of a method, while it lasts."""
    inner, seconds = getattr(owner, name), list[float]()

    def outer(*args: Any, **kwargs: Any) -> Any:
        t0 = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - t0)

    setattr(owner, name, outer)
    try:
        yield seconds
    finally:
        setattr(owner, name, inner)


def kernels(options: Options) -> dict[str, Any]:
    """The GPU's kernels by their time, microseconds per decode: of 1, 2 and 4 rows, and of a step of the head. Needs
    PyTorch, for its profiler alone."""
    from torch.profiler import ProfilerActivity, profile

    model = big(options, RATES[0])
    tokens = model.follow(int(model.cycle[0]), 1500)
    found: dict[str, Any] = {}

    def look(name: str, decode: Callable[[], None]) -> None:
        for _ in range(4):
            decode()
        times = 10
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            t0 = time.perf_counter()
            for _ in range(times):
                decode()
            wall = time.perf_counter() - t0
        rows = [(each.key, each.count / times, each.self_device_time_total / times) for each in seen.key_averages()]
        rows.sort(key=lambda row: -row[2])
        found[name] = {
            "wall_us": 1e6 * wall / times,
            "gpu_us": sum(row[2] for row in rows),
            "launched": sum(row[1] for row in rows),
            "kernels": [[key[:90], round(n, 1), round(us, 1)] for key, n, us in rows[:30]],
        }

    with opened(options, model.trunk, n_rs_seq=max(DEPTHS)) as trunk, opened(options, model.mtp, mtp=True) as mtp:
        at, batch = 64, engine.Batch(64)
        trunk.decode(batch.set(tokens[:at], 0, 0))
        pairs = engine.Batch(1, n_embd_out=mtp.n_embd_out)
        pairs.embd[:] = trunk.hidden_rows(at - 1, 1)

        def verify(n: int) -> None:
            nonlocal at
            trunk.decode(batch.set(tokens[at : at + n], at, 0, outputs="all"))
            trunk.hidden_rows(0, n)
            at += n

        def step() -> None:
            nonlocal step_at
            mtp.decode(pairs.set(tokens[step_at : step_at + 1], step_at, 0))
            mtp.best()
            step_at += 1

        step_at = 1
        for n in (1, 2, 4):
            look(f"{n} rows", lambda n=n: verify(n))  # type: ignore[misc]
        look("step, logits copied", step)
        mtp.pick_in_graph()
        look("step", step)
    return found


def median_ms(seconds: Sequence[float]) -> float:
    """Without the first two: they build graphs and kernels."""
    return 1000 * statistics.median(seconds[2:] or seconds)


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
    ours: list[Contender] = [
        Weighed(each.name, each.options) for each in contenders(mtp, DEPTHS) if each.name != "prompt lookup"
    ]
    servers: list[Contender] = []
    for k in (0, *DEPTHS):
        name = f"server k={k}" if k else "server plain"
        servers.append(WeighedServer(name, mtp, k, options.n_gpu_layers, options.out / f"{name.replace(' ', '-')}.log"))
    return ours, servers


def race(contest: Contest, options: Options) -> None:
    contest.round()  # warm-up
    for each in contest.field:
        each.seconds.clear()
        each.first.clear()
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
    ours = [each for each in ours if each.name != "n-grams alone"]  # the text repeats itself late
    together = Contest(files.trunk, ours, files.cycle[:64].tolist(), options.n_tokens, **options.llama)
    race(together, options)
    plain = together.field[0]
    return {**together.results(), "plain run": {"seconds": plain.seconds, "first": plain.first, "text": plain.text}}


def servers(options: Options, acceptance: str) -> dict[str, Any]:
    files = big(options, float(acceptance))
    before = json.loads((options.out / "results.json").read_text())[f"contest {acceptance}"]["plain run"]
    plain = Contender("plain", dict, **before)
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
    each.__name__: each
    for each in (machine, text, bits, operations, middle, plant, costs, cycle, kernels, contest, servers)
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
