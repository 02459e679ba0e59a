"""A lock between real processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from epd.errors import ConfigError
from workers.core_turns import CoreTurns
from workers.shared_mutex import SharedMutex

_HOLD = """
import sys, time
from pathlib import Path
from workers.shared_mutex import SharedMutex
assert SharedMutex(Path(sys.argv[1])).acquire(time.monotonic() + 20)  # and nobody keeps it but itself
print("mine", flush=True)
sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that has the lock until its input ends or it is killed."""
    words = [sys.executable, "-c", _HOLD, str(path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def test_it_outlives_owners_that_are_killed_again_and_again(tmp_path: Path) -> None:
    mutex = SharedMutex(tmp_path / "lock")
    for _ in range(2):
        with hold(tmp_path / "lock") as owner:
            assert not mutex.acquire(time.monotonic())
            owner.kill()
            assert mutex.acquire(time.monotonic() + 20)
        mutex.release()
    mutex.close()


def test_who_waits_is_woken_when_it_is_released(tmp_path: Path) -> None:
    mine, other = SharedMutex(tmp_path / "lock"), SharedMutex(tmp_path / "lock")
    assert mine.acquire(0)
    results: list[bool] = []

    def take() -> None:
        results.append(other.acquire(time.monotonic() + 3600))
        other.release()

    thread = threading.Thread(target=take)
    thread.start()
    mine.release()
    thread.join(20)
    assert results == [True]


def test_a_file_of_an_earlier_run_of_the_machine_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path) as owner:
        path.write_bytes(path.read_bytes()[:64] + b"another run of the machine, with its lock held")
        owner.kill()
    before = path.read_bytes()
    mutex = SharedMutex(path)
    assert mutex.acquire(0)
    assert path.read_bytes()[64:] != before[64:]


def test_a_place_without_room_for_it_is_told_by_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--share-cores .*turns: .*No such file or directory"):
        CoreTurns(tmp_path / "missing" / "turns")
