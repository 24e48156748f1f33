from __future__ import annotations

from ds4_mtp_plugin import engine, host
from ds4_mtp_plugin.engine.cpu import cpu


def pytest_report_header() -> list[str]:
    """What the results depend on: the CPU and the engine."""
    library = engine.Library(host.library_path())
    return [
        f"cpu: {cpu()}",
        f"engine: llama.cpp {library.version}, patch set {library.patchset}, built by {library.compiler}",
        f"system: {library.system_info.strip()}",
    ]
