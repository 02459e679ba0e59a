"""The OpenMP runtime and the allocator that a worker on a CPU starts with.

Both must be there before the first library that uses them, so a worker that lacks them replaces itself, once and
before it imports anything large, by the same command with `LD_PRELOAD`.

- Intel's OpenMP runtime (`pip install 'epd[cpu]'`) hands work to its threads faster than the one in torch, and its
  idle threads can be told to sleep soon: those that go on spinning take the cores from the other workers of a host.
- tcmalloc (Debian: libtcmalloc-minimal4) keeps the memory of a step's temporaries for the next step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_MARK = "EPD_CPU_RUNTIME"
"""Set in a process that was replaced, so that a library that the loader ignores does not make it a loop."""
_SPIN_MS = "1"
"""How long an idle thread of Intel's runtime looks for work before it sleeps; its own default is 200."""
_TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
_LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")


def libraries(prefix: Path = Path(sys.prefix), folders: tuple[str, ...] = _LIBRARY_FOLDERS) -> list[Path]:
    """What can be preloaded here: Intel's OpenMP runtime of the Python environment `prefix`, tcmalloc of `folders`."""
    found = [path for path in [prefix / "lib" / "libiomp5.so"] if path.is_file()]
    allocators = [Path(folder) / name for name in _TCMALLOC for folder in folders]
    return found + [path for path in allocators if path.is_file()][:1]


def environment(current: Mapping[str, str], found: list[Path]) -> dict[str, str] | None:
    """Variables for a process that starts with `found`; None when the `current` ones do.

    What the user set stays as it is.
    """
    loaded = current.get("LD_PRELOAD", "").replace(":", " ").split()
    names = {Path(path).name for path in loaded}
    missing = [str(path) for path in found if path.name not in names]
    if not missing or _MARK in current:
        return None
    return {"KMP_BLOCKTIME": _SPIN_MS, **current, "LD_PRELOAD": ":".join([*missing, *loaded]), _MARK: "1"}


def for_children() -> dict[str, str]:
    """Variables for workers on a CPU that this process starts: with them, none has to replace itself."""
    return _wanted() or dict(os.environ)


def _wanted() -> dict[str, str] | None:
    return environment(os.environ, libraries()) if sys.platform == "linux" else None


def ensure() -> None:
    """Replace this process by the same command with the libraries preloaded, if there are any that it lacks.

    Call it before anything is started or opened. Returns when there is nothing to do; only Linux has something.
    """
    wanted = _wanted()
    if wanted is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)  # noqa: S606  # ourselves
