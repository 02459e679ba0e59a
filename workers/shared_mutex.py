"""A lock between processes that is waited for without looking again and again, and that a dying process lets go.

A robust mutex of the C library (`pthread_mutexattr_setrobust(3)`) in a file that all of them map: when its owner ends,
however it ends, the kernel wakes the next one. Linux with glibc 2.30 or newer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
from pathlib import Path
from typing import Any

_MUTEX_BYTES = 64
"""`pthread_mutex_t` takes 40 on x86-64 and 48 on AArch64."""
_SHARED, _ROBUST, _CLOCK_MONOTONIC = 1, 1, 1
_held: set[SharedMutex] = set()
"""Their memory must stay where it is: the kernel could not release a lock that it does not find when the owner ends."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class SharedMutex:
    """The lock of one path. A thread that acquired it releases it.

    Raises:
        OSError: the file can't be opened, or the C library has no such locks.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, making it if it is not there."""
        functions = _library()
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # one makes the mutex, the others find it
            label = _label()
            is_new = os.pread(file, len(label), _MUTEX_BYTES) != label
            if is_new:
                os.ftruncate(file, _MUTEX_BYTES + len(label))
            self._memory = mmap.mmap(file, _MUTEX_BYTES)
            self._mutex = (ctypes.c_char * _MUTEX_BYTES).from_buffer(self._memory)
            if is_new:
                _initialise(functions, self._mutex)
                os.pwrite(file, label, _MUTEX_BYTES)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # `mmap` keeps the file open
            os.close(file)
        self._lock: Any = functions.pthread_mutex_clocklock
        self._unlock: Any = functions.pthread_mutex_unlock
        self._repair: Any = functions.pthread_mutex_consistent

    def acquire(self, give_up: float) -> bool:
        """Wait for the lock until `give_up`, a time of `time.monotonic`; False: it was not to be had."""
        seconds, rest = divmod(max(0.0, give_up), 1)
        until = _Timespec(int(seconds), int(rest * 1e9))
        result = self._lock(self._mutex, _CLOCK_MONOTONIC, ctypes.byref(until))
        if result == errno.EOWNERDEAD:  # its owner has ended; there is nothing that it could have left half done
            result = self._repair(self._mutex)
        if result not in (0, errno.ETIMEDOUT):
            raise OSError(result, os.strerror(result))
        if result == 0:
            _held.add(self)
        return bool(result == 0)

    def release(self) -> None:
        """Let the next one have it."""
        _held.discard(self)
        self._unlock(self._mutex)

    def close(self) -> None:
        """Let go of the memory, but not of a lock that is held. The object may not be used any more."""
        if self in _held:
            return
        del self._mutex
        with contextlib.suppress(BufferError):  # a call of another thread is still in it; it goes with that
            self._memory.close()


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    if not hasattr(library, "pthread_mutex_clocklock"):
        raise OSError(errno.ENOSYS, "sharing cores needs Linux with glibc 2.30 or newer")
    return library


def _label() -> bytes:
    """Marks a file whose mutex is of this run of the machine: one of an earlier run may look locked for ever."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes()


def _initialise(functions: ctypes.CDLL, mutex: Any) -> None:
    attributes = (ctypes.c_char * _MUTEX_BYTES)()
    for result in (
        functions.pthread_mutexattr_init(attributes),
        functions.pthread_mutexattr_setpshared(attributes, _SHARED),
        functions.pthread_mutexattr_setrobust(attributes, _ROBUST),
        functions.pthread_mutex_init(mutex, attributes),
        functions.pthread_mutexattr_destroy(attributes),
    ):
        if result != 0:
            raise OSError(result, os.strerror(result))
