from __future__ import annotations

import random
import zlib

import pytest

from epd.errors import InvalidRequest, Overloaded
from epd.types import SamplingParams
from workers.engine.chunks import ScheduledChunk
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.request import EngineRequest, ImagePlaceholder, RequestStatus
from workers.engine.scheduler import PRIORITY_STEP_S, Scheduler

BLOCK_SIZE = 4


def make_scheduler(
    num_blocks: int = 64,
    *,
    seqs: int = 4,
    tokens: int = 16,
    waiting: int = 100,
    caching: bool = True,
    target_s: float = 0,
) -> Scheduler:
    return Scheduler(
        KVCacheManager(num_blocks, BLOCK_SIZE, prefix_caching=caching),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_waiting=waiting,
        target_step_s=target_s,
    )


def make_request(
    name: str,
    prompt: int,
    images: int = 0,
    atomic: tuple[tuple[int, int], ...] = (),
    priority: int = 0,
    arrives_at: float = 0,
) -> EngineRequest:
    placeholders = [ImagePlaceholder(f"{name}-{index}", index) for index in range(images)]
    token = zlib.crc32(name.encode())  # requests of other names have no common prefix
    request = EngineRequest(
        name, [token] * prompt, SamplingParams(), images=placeholders, priority=priority, clock=lambda: arrives_at
    )
    request.atomic_spans = atomic
    return request


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """Run one step with a model that says 1; returns (request, start, end) of each chunk."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        samples = chunk.samples
        scheduler.advance(chunk)
        if samples:
            chunk.request.append(1)
    scheduler.check_integrity()
    return [_summary(chunk) for chunk in chunks]


def _summary(chunk: ScheduledChunk) -> tuple[str, int, int]:
    return chunk.request.request_id, chunk.start, chunk.end


def test_decodes_go_before_prompts_and_prompts_are_chunked() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3))
    scheduler.add(make_request("b", 30))
    assert step(scheduler) == [("a", 0, 3), ("b", 0, 13)]
    assert step(scheduler) == [("a", 3, 4), ("b", 13, 28)]
    assert step(scheduler) == [("a", 4, 5), ("b", 28, 30)]
    assert step(scheduler) == [("a", 5, 6), ("b", 30, 31)]


def test_first_come_first_served_and_max_num_seqs() -> None:
    scheduler = make_scheduler(seqs=2)
    requests = [make_request(name, 2) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    assert [name for name, _, _ in step(scheduler)] == ["a", "b"]
    scheduler.finish(requests[0], RequestStatus.FINISHED_LENGTH)
    assert [name for name, _, _ in step(scheduler)] == ["b", "c"]


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    scheduler = make_scheduler(num_blocks=6)
    for name, prompt in (("a", 12), ("large", 12), ("small", 1)):
        scheduler.add(make_request(name, prompt))
    assert [name for name, _, _ in step(scheduler)] == ["a"]
    assert scheduler.num_waiting == 2


def test_requests_with_missing_embeddings_wait_apart_and_keep_their_place() -> None:
    scheduler = make_scheduler(seqs=1)
    picture = make_request("picture", 2, images=1)
    first, second = make_request("first", 2), make_request("second", 2)
    for request in (first, picture, second):
        scheduler.add(request)
    assert [name for name, _, _ in step(scheduler)] == ["first"]
    scheduler.embeddings_complete(picture)
    scheduler.finish(first, RequestStatus.FINISHED_LENGTH)
    assert [name for name, _, _ in step(scheduler)] == ["picture"]


@pytest.mark.parametrize(("caching", "kept_blocks"), [(False, 0), (True, 1)])
def test_out_of_blocks_preempts_the_newest_and_computes_it_again(caching: bool, kept_blocks: int) -> None:
    scheduler = make_scheduler(num_blocks=4, caching=caching)
    old, new = make_request("old", 4), make_request("new", 3)
    scheduler.add(old)
    scheduler.add(new)
    while new.status is not RequestStatus.PREEMPTED:
        assert step(scheduler)
    kept = list(new.token_ids)
    assert new.num_computed_tokens == 0
    assert old.status is RequestStatus.RUNNING
    scheduler.finish(old, RequestStatus.FINISHED_LENGTH)
    assert step(scheduler) == [("new", kept_blocks * BLOCK_SIZE, len(kept))]
    assert new.token_ids == [*kept, 1]


def test_the_newest_preempts_itself_rather_than_an_older_one() -> None:
    scheduler = make_scheduler(num_blocks=4)
    old, new = make_request("old", 5), make_request("new", 4)
    scheduler.add(old)
    scheduler.add(new)
    step(scheduler)
    assert step(scheduler) == [("old", 5, 6), ("new", 4, 5)]
    for _ in range(8):
        step(scheduler)
    assert old.num_preemptions == 0
    assert new.num_preemptions == 1


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_finish_frees_at_once_wherever_the_request_is(steps: int) -> None:
    scheduler = make_scheduler()
    request = make_request("a", 20)
    scheduler.add(request)
    for _ in range(steps):
        step(scheduler)
    scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
    scheduler.check_integrity()
    assert not scheduler.can_step()
    assert scheduler.num_running == scheduler.num_waiting == 0


def test_the_queue_is_bounded_and_counts_those_that_wait_for_embeddings() -> None:
    scheduler = make_scheduler(waiting=2)
    scheduler.add(make_request("a", 2, images=1))
    scheduler.add(make_request("b", 2))
    with pytest.raises(Overloaded):
        scheduler.add(make_request("c", 2))
    scheduler.check_integrity()


@pytest.mark.parametrize(("target_s", "limited"), [(0.06, 60), (0, 99)])
def test_prompts_beside_decodes_keep_to_the_target_duration(target_s: float, limited: int) -> None:
    scheduler = make_scheduler(num_blocks=200, tokens=100, target_s=target_s)
    scheduler.add(make_request("first", 100))
    chunks = scheduler.schedule()
    scheduler.note_duration(100, 0, 0.1)
    scheduler.advance(chunks[0])
    chunks[0].request.append(1)
    scheduler.add(make_request("second", 200))
    assert step(scheduler) == [("first", 100, 101), ("second", 0, limited)]
    scheduler.finish(chunks[0].request, RequestStatus.FINISHED_LENGTH)
    assert step(scheduler) == [("second", limited, limited + 100)]  # nobody is kept waiting


def test_smaller_priorities_go_first_and_equal_ones_by_arrival() -> None:
    scheduler = make_scheduler(seqs=1)
    for name, priority in (("late", 1), ("a", 0), ("first", -1), ("b", 0)):
        scheduler.add(make_request(name, 2, priority=priority))
    served = []
    while scheduler.can_step():
        [(name, _, _)] = step(scheduler)
        served.append(name)
        scheduler.finish(next(scheduler.requests()), RequestStatus.FINISHED_LENGTH)
    assert served == ["first", "a", "b", "late"]


def test_a_low_priority_gets_its_turn_under_a_stream_of_high_ones() -> None:
    scheduler = make_scheduler(seqs=1)
    scheduler.add(make_request("patient", 2, priority=2, arrives_at=0))
    served: list[tuple[str, int]] = []
    for now in range(0, 100, 10):
        for name in ("x", "y"):  # two come while one is served
            scheduler.add(make_request(f"{name}{now}", 2, arrives_at=now))
        [(name, _, _)] = step(scheduler)
        served.append((name, now))
        scheduler.finish(next(scheduler.requests()), RequestStatus.FINISHED_LENGTH)
    assert PRIORITY_STEP_S == 30
    assert [name for name, _ in served if name == "patient"] == []
    while (name := step(scheduler)[0][0]) != "patient":
        assert int(name[1:]) <= 2 * PRIORITY_STEP_S
        scheduler.finish(next(scheduler.requests()), RequestStatus.FINISHED_LENGTH)


def test_a_long_prompt_makes_progress_under_a_stream_of_short_ones() -> None:
    scheduler = make_scheduler(tokens=8)
    long = make_request("long", 60)
    number, steps = 0, 0
    for number in range(3):
        scheduler.add(make_request(f"before{number}", 4))
    scheduler.add(long)
    while long.num_output_tokens == 0:
        scheduler.add(make_request(f"short{number}", 4))
        number, steps = number + 1, steps + 1
        step(scheduler)
        done = [request for request in scheduler.requests() if request is not long and request.num_output_tokens >= 2]
        for request in done:
            scheduler.finish(request, RequestStatus.FINISHED_LENGTH)
    assert steps <= 2 + 60 // 4  # two for those before it, then never less than half a step


def test_the_lowest_priority_is_preempted_even_if_it_is_the_oldest() -> None:
    scheduler = make_scheduler(num_blocks=4)
    low = make_request("low", 4, priority=1)
    scheduler.add(low)
    step(scheduler)
    high = make_request("high", 3)
    scheduler.add(high)
    while low.num_preemptions == high.num_preemptions == 0:
        step(scheduler)
    assert low.status is RequestStatus.PREEMPTED


def test_no_chunk_ends_inside_an_atomic_span() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 40, atomic=((10, 20), (20, 30), (35, 36))))
    assert [step(scheduler) for _ in range(4)] == [
        [("a", 0, 10)],
        [("a", 10, 20)],
        [("a", 20, 36)],
        [("a", 36, 40)],
    ]


def test_an_atomic_span_as_long_as_a_step_is_computed_beside_decodes() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("decoding", 3))
    step(scheduler)
    scheduler.add(make_request("a", 20, atomic=((2, 18),)))
    scheduler.add(make_request("b", 20, atomic=((0, 16),)))
    assert step(scheduler) == [("decoding", 3, 4), ("a", 0, 2)]
    assert step(scheduler) == [("decoding", 4, 5), ("a", 2, 18)]
    assert step(scheduler) == [("decoding", 5, 6), ("a", 18, 20)]  # what is left is too little for b
    assert step(scheduler) == [("decoding", 6, 7), ("a", 20, 21), ("b", 0, 16)]


def test_an_atomic_span_longer_than_a_step_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.check_atomic_spans(make_request("fits", 40, atomic=((2, 18),)))
    with pytest.raises(InvalidRequest, match="17 tokens"):
        scheduler.check_atomic_spans(make_request("a", 40, atomic=((2, 19),)))


def test_a_step_must_have_room_for_every_sequence() -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        make_scheduler(seqs=17, tokens=16)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_any_load_ends_with_every_token_computed_once_and_nothing_left(seed: int, caching: bool) -> None:
    draw = random.Random(seed)
    scheduler = make_scheduler(num_blocks=10, seqs=5, tokens=9, caching=caching)
    wanted = {f"r{index}": draw.randint(1, 20) for index in range(15)}
    arriving = [make_request(name, draw.randint(1, 19)) for name in wanted]
    prompts = {request.request_id: request.num_prompt_tokens for request in arriving}
    finished: dict[str, int] = {}
    while len(finished) < len(wanted):
        if arriving and draw.random() < 0.3:
            scheduler.add(arriving.pop())
        chunks = scheduler.schedule()
        scheduler.check_integrity()
        assert sum(chunk.length for chunk in chunks) <= 9
        assert len({chunk.request.request_id for chunk in chunks}) == len(chunks) <= 5
        for chunk in chunks:
            request, samples = chunk.request, chunk.samples
            assert chunk.start == request.num_computed_tokens
            assert len(chunk.block_table) * BLOCK_SIZE >= chunk.end
            scheduler.advance(chunk)
            if samples:
                request.append(request.num_output_tokens)
            if request.num_output_tokens == wanted[request.request_id]:
                assert request.token_ids[request.num_prompt_tokens :] == list(range(request.num_output_tokens))
                finished[request.request_id] = request.num_prompt_tokens
                scheduler.finish(request, RequestStatus.FINISHED_LENGTH)
    assert finished == prompts
    assert not scheduler.can_step()
    scheduler.check_integrity()
