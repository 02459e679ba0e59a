"""The machine that figures were measured on, without what would name it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from epd import __version__

_PACKAGES = ("torch", "transformers", "pyzmq", "fastapi", "uvicorn", "uvloop")
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


def describe_machine() -> list[tuple[str, str]]:
    """What → which: processor, cores, memory, versions. No host name, no path."""
    cpu = _cpu_info()
    known = set(cpu.get("flags", "").split())
    return [
        ("processor", cpu.get("model name") or platform.processor() or platform.machine()),
        ("of its instructions", ", ".join(name for name in _INSTRUCTION_SETS if name in known) or "unknown"),
        ("cores", f"{_cores()} used, of {os.cpu_count()}"),
        ("memory", _memory()),
        ("system", f"{platform.system()} {platform.release().split('-')[0]}"),
        ("Python", platform.python_version()),
        ("epd", __version__),
        *((name, _version(name)) for name in _PACKAGES),
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _cpu_info() -> dict[str, str]:
    """Of the first core; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> str:
    if sys.platform == "win32":
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
