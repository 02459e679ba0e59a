"""Compile a C++ source of this folder for the processor at hand, once, and load it.

The sources are plain C++ with OpenMP and know nothing of torch, so that one takes the compiler a second or two. What
it makes is kept in the user's cache folder, under a name that holds everything the result depends on: a home folder
that several machines share is fine. Without a compiler, callers do with what torch has.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from workers.engine import cache_files

log = logging.getLogger(__name__)

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    # What keeps loops from becoming vector code. Not -ffast-math: NaN must spread, and linking with that flag would
    # change how the whole process rounds small numbers.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
_COMPILE_TIMEOUT_S = 120


def compiler() -> str | None:
    """Path of a C++ compiler; None when there is none."""
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The library made of `name`.cpp; None when it can't be made here, which is logged once."""
    source = Path(__file__).with_name(f"{name}.cpp")
    found = compiler()
    if found is None:
        log.info("no C++ compiler (g++ or clang++) is installed: doing without the %s kernel", name)
        return None
    try:
        library = cache_files.folder() / f"{name}-{_key(source, found)}.so"
        if not cache_files.was_made(library):
            _compile(found, source, library)
            cache_files.remove_old(library.parent)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", None) or error
        log.warning("doing without the %s kernel: %s", name, str(details).strip()[-500:])
        return None


def _key(source: Path, found: str) -> str:
    parts = [
        source.read_bytes(),
        " ".join((found, *_FLAGS)).encode(),
        processor(),
        str(os.stat(found).st_mtime_ns).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def processor() -> bytes:
    """What `-march=native` depends on, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"model", b"Features"))}))


def _compile(found: str, source: Path, library: Path) -> None:
    started = time.monotonic()
    # Under another name first: a worker that starts at the same moment must not load half a file.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [found, *_FLAGS, "-o", str(made), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)  # noqa: S603
        made.replace(library)
    log.info("compiled the %s kernel for this processor in %.1f s", source.stem, time.monotonic() - started)
