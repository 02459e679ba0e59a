"""The cache folder of compiled code: where it is, and that it does not grow for ever.

Each version of the code, of torch or of a compiler makes other kernels, graphs and files of torch's compiler.

Deleting is safe at any time: who has a file open reads it to its end, what is loaded stays loaded, and who comes later
makes another one. What somebody may be making just now is left alone nevertheless.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20
"""A graph of a small model has two megabytes, and torch's compiler leaves half a megabyte for it."""
_IN_USE_S = 3600.0
"""What was used so recently stays, whatever its size: twice the time that compiling may take."""
_EMPTY_KEPT_S = 86400.0
"""Locks that killed processes left, and folders."""


def folder() -> Path:
    """Where compiled code is kept between runs: `~/.cache/epd`, for this user alone."""
    found = Path.home() / ".cache" / "epd"
    found.mkdir(parents=True, exist_ok=True, mode=0o700)
    return found


def was_made(file: Path) -> bool:
    """Whether the file is there; it counts as used now."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    except OSError:  # a folder that may only be read
        return file.exists()
    return True


def remove_old(parent: Path, kept_bytes: int = KEPT_BYTES) -> None:
    """Delete the files below `parent` that were not used for longest and are beyond so many bytes.

    Files without content go after a day, and so do folders.
    """
    total = 0
    for path, status in sorted(_files(parent), key=lambda one: _used_at(one[1]), reverse=True):
        total += status.st_size
        if total > kept_bytes or not status.st_size:
            _remove_unused(path, _IN_USE_S if status.st_size else _EMPTY_KEPT_S)
    for name, _, _ in os.walk(parent, topdown=False):
        # Most have something in them.
        with contextlib.suppress(OSError):
            if time.time() - os.stat(name).st_mtime > _EMPTY_KEPT_S:
                os.rmdir(name)


def _remove_unused(path: Path, unused_s: float) -> None:
    # Another process may delete it as well, or only others may. It is looked at again: perhaps it was used meanwhile.
    with contextlib.suppress(OSError):
        if time.time() - _used_at(path.lstat()) > unused_s:
            path.unlink()
            log.debug("deleted %s, which was not used for longest", path)


def _files(parent: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for name, _, files in os.walk(parent):
        for file in files:
            path = Path(name, file)
            with contextlib.suppress(OSError):
                yield path, path.lstat()


def _used_at(status: os.stat_result) -> float:
    """Reading counts too, where the file system notes it."""
    return max(status.st_atime, status.st_mtime)
