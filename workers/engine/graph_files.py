"""The compiled graphs in the cache folder: one process makes each, and old ones go.

Deleting is safe at any time: who has a file open reads it to its end, and who comes later makes another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20
"""A graph of a small model has two megabytes. Each version of the code or of torch makes others."""
_POLL_S = 0.2
_LOCK_KEPT_S = 86400.0


@contextlib.contextmanager
def only_maker(file: Path, timeout_s: float) -> Iterator[None]:
    """Be the only process that makes this file, as soon as no other one does; look again then whether it is there.

    The lock ends with its process. Where the file system has no locks, several processes may make the file.

    Args:
        file: whose folder is there. The lock is a file beside it, which goes when this ends.
        timeout_s: to wait at most.

    Raises:
        TimeoutError: another process has been at it for that long.
    """
    lock = file.with_suffix(".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _acquire(descriptor, time.monotonic() + timeout_s, file)
        try:
            yield
        finally:
            # Who has it open already gets this lock next, and who comes now another one: at worst both make the file.
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, deadline: float, file: Path) -> None:
    is_told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has not finished {file}") from None
        except OSError as error:
            log.debug("%s can't be locked: %s", file, error)
            return
        else:
            return
        if not is_told:
            log.info("another process compiles the same steps: waiting for its result")
            is_told = True
        time.sleep(_POLL_S)


def was_made(file: Path) -> bool:
    """Whether the file is there; it counts as used now."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    except OSError:  # a folder that may only be read
        return file.exists()
    return True


def remove_old(file: Path, kept_bytes: int = KEPT_BYTES) -> None:
    """Delete the files beside `file`, and named as it, that were not used for longest and are beyond so many bytes.

    The one used last stays, whatever its size. Locks that a killed process left go after a day.
    """
    graphs = sorted(_looked_at(file, "graph-*.bin"), key=lambda one: one[1].st_mtime, reverse=True)
    total = 0
    for index, (path, found) in enumerate(graphs):
        total += found.st_size
        if index and total > kept_bytes:
            path.unlink(missing_ok=True)
            log.debug("deleted %s, which was not used for longest", path)
    for path, found in _looked_at(file, "graph-*.lock"):
        if time.time() - found.st_mtime > _LOCK_KEPT_S:
            path.unlink(missing_ok=True)


def _looked_at(file: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    for path in file.parent.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process tidies up too
            yield path, path.stat()
