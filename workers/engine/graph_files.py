"""The compiled graphs in the cache folder: one process makes each."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_POLL_S = 0.2


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
