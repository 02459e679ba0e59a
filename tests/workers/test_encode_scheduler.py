from __future__ import annotations

import random
from dataclasses import dataclass

from workers.encode_scheduler import EncodeJob, EncodeScheduler, JobState


@dataclass(frozen=True)
class Picture:
    num_patches: int
    nbytes: int = 1


Job = EncodeJob[str, Picture, str]
Scheduler = EncodeScheduler[str, Picture, str]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(max_batch_patches: int = 100, max_prepared_bytes: int = 10**9) -> Scheduler:
    return EncodeScheduler(max_batch_patches, max_prepared_bytes)


def prepare(scheduler: Scheduler, *patches: int) -> list[Job]:
    """Take so many pictures through preprocessing, in order."""
    jobs = []
    for num_patches in patches:
        job = scheduler.next_to_prepare()
        assert job is not None
        scheduler.prepared(job, Picture(num_patches))
        jobs.append(job)
    return jobs


def keys(jobs: list[Job]) -> str:
    return "".join(job.key for job in jobs)


def queue(scheduler: Scheduler, names: str, *patches: int) -> None:
    for name in names:
        assert scheduler.ask(name, f"file {name}", f"asker of {name}")
    prepare(scheduler, *patches)


def test_a_batch_is_filled_up_to_the_budget_in_order_of_arrival() -> None:
    s = scheduler(100)
    queue(s, "abcd", 40, 40, 20, 1)
    assert keys(s.next_batch()) == "abc"
    assert keys(s.next_batch()) == "d"
    assert s.next_batch() == []


def test_a_picture_larger_than_the_budget_goes_alone() -> None:
    s = scheduler(100)
    queue(s, "abc", 10, 500, 10)
    assert [keys(s.next_batch()) for _ in range(3)] == ["a", "b", "c"]


def test_small_pictures_never_overtake_a_large_one() -> None:
    s = scheduler(100)
    queue(s, "ab", 60, 90)
    for round_ in range(3):
        s.ask(f"small {round_}", "", "x")
        prepare(s, 10)
    assert keys(s.next_batch()) == "a"
    assert [job.key for job in s.next_batch()] == ["b", "small 0"]


def test_a_picture_still_in_preprocessing_holds_nobody_up_and_keeps_its_place() -> None:
    s = scheduler(100)
    for name in "abc":
        s.ask(name, "", "x")
    slow = s.next_to_prepare()
    assert slow is not None
    prepare(s, 60, 60)
    assert keys(s.next_batch()) == "b"
    s.prepared(slow, Picture(60))
    assert keys(s.next_batch()) == "a"
    assert keys(s.next_batch()) == "c"


def test_each_picture_is_prepared_once_from_its_source() -> None:
    s = scheduler()
    s.ask("a", "file a", "x")
    job = s.next_to_prepare()
    assert job is not None
    assert job.source == "file a"
    assert s.next_to_prepare() is None


def test_single_flight_in_every_state() -> None:
    s = scheduler()
    assert s.ask("a", "", "first")
    assert not s.ask("a", "", "while waiting")
    job = s.next_to_prepare()
    assert job is not None
    assert not s.ask("a", "", "while preparing")
    s.prepared(job, Picture(10))
    assert not s.ask("a", "", "while ready")
    assert s.next_batch() == [job]
    assert not s.ask("a", "", "while running")
    assert s.finish(job) == ["first", "while waiting", "while preparing", "while ready", "while running"]
    assert s.ask("a", "", "afterwards")


def test_a_picture_nobody_waits_for_is_dropped_while_it_waits_or_is_ready() -> None:
    s = scheduler()
    s.ask("a", "", "x")
    s.leave("a", "x")
    assert s.next_to_prepare() is None
    queue(s, "b", 10)
    s.leave("b", "asker of b")
    assert s.next_batch() == []
    assert (s.num_waiting, s.prepared_bytes) == (0, 0)
    s.check_integrity()


def test_it_goes_on_while_somebody_is_left() -> None:
    s = scheduler()
    s.ask("a", "", "x")
    s.ask("a", "", "y")
    s.leave("a", "x")
    (job,) = prepare(s, 10)
    assert s.next_batch() == [job]
    assert s.finish(job) == ["y"]


def test_a_picture_abandoned_during_preprocessing_is_dropped_after_it_unless_somebody_joins() -> None:
    s = scheduler()
    for joins in (False, True):
        s.ask("a", "", "x")
        job = s.next_to_prepare()
        assert job is not None
        s.leave("a", "x")
        if joins:
            assert not s.ask("a", "", "y")
        s.prepared(job, Picture(10))
        assert s.next_batch() == ([job] if joins else [])


def test_a_picture_abandoned_in_the_tower_ends_with_nobody_to_tell() -> None:
    s = scheduler()
    queue(s, "a", 10)
    (job,) = s.next_batch()
    s.leave("a", "asker of a")
    assert s.finish(job) == []
    assert job.prepared is None


def test_failed_preprocessing_ends_the_job() -> None:
    s = scheduler()
    s.ask("a", "", "x")
    job = s.next_to_prepare()
    assert job is not None
    assert s.finish(job) == ["x"]
    assert s.num_waiting == 0


def test_leaving_what_is_unknown_or_belongs_to_a_later_job_changes_nothing() -> None:
    s = scheduler()
    s.leave("a", "x")
    s.ask("a", "", "new")
    s.leave("a", "old")
    assert s.num_waiting == 1


def test_preprocessing_pauses_while_too_much_is_prepared() -> None:
    s = scheduler(max_batch_patches=10, max_prepared_bytes=100)
    for name in "abc":
        s.ask(name, "", "x")
    first = s.next_to_prepare()
    assert first is not None
    s.prepared(first, Picture(10, nbytes=150))  # one picture may exceed the bound, or it could never run
    assert s.next_to_prepare() is None
    assert s.next_batch() == [first]
    assert s.prepared_bytes == 0
    assert s.next_to_prepare() is not None


def test_waiting_time_is_time_spent_waiting_and_ready() -> None:
    clock = Clock()
    s: Scheduler = EncodeScheduler(100, 100, clock)
    s.ask("a", "", "x")
    clock.now = 1
    job = s.next_to_prepare()
    assert job is not None
    clock.now = 10  # preprocessing
    s.prepared(job, Picture(1))
    clock.now = 14
    s.next_batch()
    clock.now = 100  # in the tower
    s.finish(job)
    assert job.waited_s == 5
    assert job.state is JobState.DONE


def test_load() -> None:
    s = scheduler(10)
    queue(s, "abc", 10, 10)
    batch = s.next_batch()
    assert (s.num_running, s.num_waiting) == (1, 2)
    s.finish(batch[0])
    assert (s.num_running, s.num_waiting) == (0, 2)


def test_random_history_serves_every_asker_exactly_once_and_balances() -> None:
    rng = random.Random(1)
    s = scheduler(100, 200)
    preparing: list[Job] = []
    running: list[Job] = []
    waiting: dict[str, str] = {}
    served: list[str] = []

    def serve(job: Job) -> None:
        served.extend(s.finish(job))

    def step(number: int, ask: bool) -> None:
        if ask:
            key, asker = str(rng.randrange(8)), f"asker {number}"
            s.ask(key, "", asker)
            waiting[asker] = key
        if waiting and rng.random() < 0.2:
            asker = rng.choice(list(waiting))
            if asker not in served:
                s.leave(waiting.pop(asker), asker)
        if (job := s.next_to_prepare()) is not None:
            preparing.append(job)
        if preparing and rng.random() < 0.7:
            s.prepared(preparing.pop(rng.randrange(len(preparing))), Picture(rng.randrange(1, 150), 50))
        if not running:
            running.extend(s.next_batch())
        elif rng.random() < 0.7:
            serve(running.pop())
        s.check_integrity()

    for number in range(3000):
        step(number, ask=rng.random() < 0.5)
    for number in range(300):
        step(number, ask=False)
    assert (s.num_waiting, s.num_running, s.prepared_bytes) == (0, 0, 0)
    assert len(served) == len(set(served))
    assert set(served) == set(waiting)
