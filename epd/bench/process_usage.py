"""What another process has used so far, as Linux tells it; elsewhere nothing is known."""

from __future__ import annotations

import os
from pathlib import Path

_USER_TIME, _SYSTEM_TIME = 11, 12
"""Fields of /proc/PID/stat behind the name, which may hold blanks (https://man7.org/linux/man-pages/man5/proc.5.html)."""


def cpu_s(pid: int) -> float | None:
    """Seconds on processors, of all threads, in steps of a hundredth."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return (int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int | None:
    """Memory in use (RSS)."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
