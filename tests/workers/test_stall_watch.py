"""When a worker counts as stuck; the clock is a number."""

from __future__ import annotations

import pytest

from workers.stall_watch import LOOK_INTERVAL_S, Progress, StallWatch


class Worker:
    """Does steps, looked at as the runtime does."""

    def __init__(self, timeout_s: float | None = None, largest_step_s: float = 0.1) -> None:
        self.watch = StallWatch(timeout_s)
        self.now = 0.0
        self.steps = 0
        self.largest_step_s = largest_step_s
        self.is_disturbed = False

    def is_stuck(self) -> bool:
        return self.watch.is_stuck

    def work(self, steps: int, seconds: float) -> None:
        """So many steps of so many seconds."""
        for _ in range(steps):
            self.wait(seconds)
            self.steps += 1
        self.look()

    def wait(self, seconds: float, *, is_busy: bool = True) -> None:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += min(LOOK_INTERVAL_S, end - self.now)
            self.look(is_busy=is_busy)

    def look(self, *, is_busy: bool = True) -> None:
        self.watch.look(self.now, Progress(is_busy, self.steps, self.largest_step_s, self.is_disturbed))


def test_a_worker_that_hangs_is_stuck_within_seconds() -> None:
    worker = Worker()
    worker.work(30, 0.05)
    worker.wait(1.5)
    assert not worker.is_stuck()
    assert worker.watch.stalled_s == pytest.approx(1.5, abs=0.2)
    worker.wait(1.0)
    assert worker.is_stuck()
    worker.work(1, 0.0)
    assert (worker.watch.stalled_s, worker.is_stuck()) == (0, False)


def test_an_idle_worker_is_not_stuck() -> None:
    worker = Worker()
    worker.work(30, 0.05)
    worker.wait(1000, is_busy=False)
    assert (worker.watch.stalled_s, worker.is_stuck()) == (0, False)


def test_first_steps_may_take_long() -> None:
    worker = Worker(largest_step_s=0)
    worker.wait(25)
    assert not worker.is_stuck()
    worker.wait(10)
    assert worker.is_stuck()


def test_slow_steps_are_learned() -> None:
    worker = Worker()
    worker.work(30, 5.0)
    worker.wait(40)
    assert not worker.is_stuck()
    worker.wait(15)
    assert worker.is_stuck()


def test_a_large_step_that_never_came_yet_is_foreseen() -> None:
    worker = Worker(largest_step_s=2.0)
    worker.work(30, 0.05)
    worker.wait(15)
    assert not worker.is_stuck()


def test_compiling_is_given_time() -> None:
    worker = Worker()
    worker.work(30, 0.05)
    worker.is_disturbed = True
    worker.wait(15)
    assert not worker.is_stuck()


def test_a_process_that_was_stopped_did_not_watch() -> None:
    """SIGSTOP for a minute in the middle of a step: nothing is known of that minute."""
    worker = Worker()
    worker.work(30, 0.05)
    worker.now += 60
    worker.look()
    assert not worker.is_stuck()
    assert worker.watch.stalled_s < 0.5


def test_the_flag_has_the_last_word() -> None:
    worker = Worker(timeout_s=1.0)
    worker.wait(0.8)
    assert not worker.is_stuck()
    worker.wait(0.5)
    assert worker.is_stuck()


def test_one_long_step_is_forgotten_over_minutes_of_work() -> None:
    worker = Worker()
    worker.work(30, 0.05)
    worker.work(1, 20.0)
    worker.wait(20 * 60, is_busy=False)
    assert worker.watch.limit_s == pytest.approx(200, rel=0.05), "idling says nothing of how long steps take"
    limits = []
    for _ in range(15):
        worker.work(60, 1.0)
        limits.append(worker.watch.limit_s)
    assert limits == sorted(limits, reverse=True)
    assert limits[0] > 100, "not at once"
    assert limits[-1] == pytest.approx(10, rel=0.2), "ten times what steps take now"


def test_a_limit_does_not_sink_while_it_is_waited_for() -> None:
    worker = Worker()
    worker.work(30, 20.0)
    limit_s = worker.watch.limit_s
    worker.wait(150)
    assert worker.watch.limit_s == limit_s
    assert not worker.is_stuck()
