"""Makes the archive that `bench.device.run` runs from; `bench.device` says how both are used.

The plugin with the CUDA backend for one architecture, llama.cpp's server on the same libraries, the packages that the
plugin and the tests depend on, tests, fixtures and benchmarks. Needs CMake, Ninja and scikit-build-core, as
``pip install --no-build-isolation`` does, and no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from vendor import cuda_toolkit
from vendor.fetch import fetch_sdist, read_pin

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 60

DEPENDENCIES = (
    "cffi",
    "numpy",
    "gguf",
    "pytest",
    "pytest-benchmark",
    "pytest-timeout",
    "pytest-xdist",
    "jinja2",
    "diskcache",
    "typing_extensions",
)
PLATFORMS = (
    "linux_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
TRAVELS = ("bench", "tests", "pyproject.toml")


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env=env, stdout=sys.stderr)


def build(cpu: bool, wheels: Path, server: Path) -> None:
    """The plugin's wheel, and the server with the libraries that are its own."""
    # The first lies as deep as pip's own build folder, so that the compiler cache knows its objects again.
    folder = ROOT / "build" / "device-cpu" if cpu else cuda_toolkit.BUILD
    options, env = ["-DDS4_MTP_SERVER=on"], dict(os.environ)
    if not cpu:
        options += [*cuda_toolkit.OPTIONS, cuda_toolkit.HOPPER]
        env |= cuda_toolkit.environment(cuda_toolkit.install(cuda_toolkit.DEST))
    env["CMAKE_ARGS"] = " ".join(options)
    env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    offline = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(wheels)]
    pip("wheel", *offline, f"--config-settings=build-dir={folder}", str(ROOT), env=env)
    command = ["cmake", "--build", str(folder), "--target", "llama-server"]
    subprocess.run(command, check=True, env=env, stdout=sys.stderr)
    for name in ("llama-server", "libllama-server-impl.so", "libllama-common.so"):
        [path] = folder.rglob(name)
        shutil.copy2(path, server)
        subprocess.run(["strip", str(server / name)], check=True)


def install(wheels: Path, site: Path, python: str) -> None:
    """All packages for that Python, which need not be the one that runs this; the host's without its engine."""
    host = str(fetch_sdist(read_pin()))
    pip("wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", str(wheels), "--config-settings=wheel.cmake=false", host)
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    made = [str(path) for path in wheels.glob("*.whl")]
    pip("install", "--quiet", "--no-compile", "--target", str(site), *target, *made, *DEPENDENCIES)
    shutil.copy2(ROOT / "ds4_mtp_plugin" / "models" / "card.json", site / "ds4_mtp_plugin" / "models")  # for a test


def pack(archive: Path, stage: Path, without: list[str]) -> None:
    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        left_out = any(member.name.startswith(f"site/{package}") for package in without)
        return None if left_out or "__pycache__" in member.name else member

    with tarfile.open(archive, "w:xz") as file:
        for path in [*(ROOT / name for name in TRAVELS), stage / "site", stage / "server"]:
            file.add(path, path.name, filter=wanted)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.device.prepare", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="without CUDA, for a try here")
    parser.add_argument("--python", help="version there (3.12; with --cpu this one)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "ds4-device.tar.xz", help="default: %(default)s")
    parser.add_argument("--without", metavar="PACKAGE", action="append", default=[], help="which the machine there has")
    args = parser.parse_args()
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    stage = cuda_toolkit.BUILD.parent / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    for name in ("wheels", "server", "site"):
        (stage / name).mkdir(parents=True)
    build(args.cpu, stage / "wheels", stage / "server")
    install(stage / "wheels", stage / "site", args.python or (here if args.cpu else "3.12"))
    pack(args.out, stage, args.without)
    size = args.out.stat().st_size / 1e6
    wheel = next(stage.glob("wheels/ds4_mtp_plugin*")).stat().st_size / 1e6
    print(f"the plugin's wheel {wheel:.1f} MB, {args.out} {size:.1f} MB")
    if size > LIMIT_MB:
        print(f"more than {LIMIT_MB} MB: leave out what is there, perhaps --without numpy", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
