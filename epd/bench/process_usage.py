"""What another process has used so far, as Linux tells it; elsewhere nothing is known."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def cpu_s(pid: int) -> float | None:
    """Seconds on processors, of all threads."""
    if sys.platform != "linux":
        return None
    try:
        # The clock of a process by its id, as clock_getcpuclockid(3) makes it.
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return None


def resident_bytes(pid: int) -> int | None:
    """Memory in use (RSS)."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
