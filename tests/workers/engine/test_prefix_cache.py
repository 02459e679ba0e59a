"""Blocks that are found by what they hold, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from epd.types import SamplingParams
from workers.engine.block_pool import BlockPool
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.prefix_cache import BlockHasher
from workers.engine.request import EngineRequest, ImageSpan, RequestStatus
from workers.engine.scheduler import Scheduler

BLOCK_SIZE = 4


def make_request(
    name: str, token_ids: Sequence[int], spans: Sequence[ImageSpan] = (), sampling: SamplingParams | None = None
) -> EngineRequest:
    request = EngineRequest(name, token_ids, sampling or SamplingParams())
    request.set_expanded_prompt(token_ids, spans)
    return request


def names(hasher: BlockHasher, *args: Any) -> list[bytes]:
    return hasher.names(make_request("r", *args))


# -- names -----------------------------------------------------------------------------------------------------------


def test_a_name_covers_everything_before_the_end_of_its_block_and_nothing_behind_it() -> None:
    hasher = BlockHasher(BLOCK_SIZE)
    base = names(hasher, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert len(set(base)) == 2
    assert names(hasher, [1, 2, 3, 4, 5, 6, 7, 8]) == base
    assert names(hasher, [1, 2, 3, 4, 5, 6, 7, 0])[0] == base[0]
    assert names(hasher, [1, 2, 3, 4, 5, 6, 7, 0])[1] != base[1]
    assert not set(names(hasher, [0, 2, 3, 4, 5, 6, 7, 8])) & set(base)
    assert names(hasher, [1, 2, 3]) == []


def test_names_follow_the_request_as_it_grows() -> None:
    hasher = BlockHasher(BLOCK_SIZE)
    request = make_request("r", [1, 2, 3])
    for token in (4, 5, 6, 7, 8):
        hasher.names(request)
        request.append(token)
    assert hasher.names(request) == names(hasher, [1, 2, 3, 4, 5, 6, 7, 8])


def test_requests_share_names_only_with_those_of_their_salt() -> None:
    hasher = BlockHasher(BLOCK_SIZE)

    def salted(salt: str) -> tuple[bytes, ...]:
        return tuple(hasher.names(EngineRequest("r", [1, 2, 3, 4, 5, 6, 7, 8], SamplingParams(), cache_salt=salt)))

    assert salted("a") == salted("a")
    assert not set(salted("a")) & {*salted("b"), *salted("")}


def test_another_process_has_other_names() -> None:
    assert names(BlockHasher(BLOCK_SIZE), [1, 2, 3, 4]) != names(BlockHasher(BLOCK_SIZE), [1, 2, 3, 4])


@pytest.mark.parametrize(
    "other",
    [
        [ImageSpan("other", 2, 9)],
        [ImageSpan("k", 1, 10)],
        [ImageSpan("k", 2, 4), ImageSpan("k", 6, 5)],
        [],
    ],
    ids=["content", "offset", "two", "text"],
)
def test_equal_tokens_of_other_pictures_have_other_names(other: list[ImageSpan]) -> None:
    hasher, tokens = BlockHasher(BLOCK_SIZE), [9] * 16
    base = names(hasher, tokens, [ImageSpan("k", 2, 9)])
    assert base == names(hasher, tokens, [ImageSpan("k", 2, 9)])
    assert not set(names(hasher, tokens, other)) & set(base)


def test_a_picture_counts_from_the_first_block_that_it_reaches_into() -> None:
    hasher, tokens = BlockHasher(BLOCK_SIZE), [9] * 16
    one, other = (names(hasher, tokens, [ImageSpan(key, 4, 4)]) for key in ("one", "other"))
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, False, False]


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_a_named_block_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.remember(block, b"a")
    pool.free([block])
    assert pool.num_free == 2
    assert pool.find(b"a") == block
    pool.share([block])
    pool.check_integrity([[block]])
    pool.free([block])
    pool.allocate(2)
    assert pool.find(b"a") is None


def test_blocks_without_a_name_go_first_then_those_not_used_for_longest() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.remember(block, name)
    pool.free([blocks[0], blocks[1]])
    pool.free([blocks[2]])
    pool.share([blocks[1]])
    pool.free([blocks[1]])
    gone = []
    for _ in range(4):
        pool.allocate(1)
        gone.append([name for name in (b"a", b"b", b"c") if pool.find(name) is None])
    assert gone == [[], [b"a"], [b"a", b"c"], [b"a", b"b", b"c"]]


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.remember(blocks[0], b"beginning")
    pool.remember(blocks[1], b"end")
    pool.free(blocks)
    pool.allocate(1)
    assert pool.find(b"beginning") is not None


def test_of_two_blocks_with_one_content_the_first_keeps_the_name() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.remember(first, b"a")
    pool.remember(second, b"a")
    assert pool.find(b"a") == first
    pool.check_integrity([[first], [second]])


def test_a_forgotten_block_is_not_found() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.remember(block, b"a")
    pool.forget(block)
    assert pool.find(b"a") is None
    pool.free([block])
    pool.check_integrity([])


# -- requests --------------------------------------------------------------------------------------------------------


class Setup:
    """A scheduler, and a model that says 1."""

    def __init__(self, num_blocks: int = 16, tokens: int = 64, caching: bool = True) -> None:
        self.kv_cache = KVCacheManager(num_blocks, BLOCK_SIZE, prefix_caching=caching)
        self.scheduler = Scheduler(self.kv_cache, max_num_seqs=8, max_num_batched_tokens=tokens, max_waiting=100)

    def add(self, name: str, token_ids: Sequence[int], **options: Any) -> EngineRequest:
        request = make_request(name, token_ids, **options)
        self.scheduler.add(request)
        return request

    def step(self) -> list[tuple[str, int, int]]:
        chunks = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for chunk in chunks:
            samples = chunk.samples
            self.scheduler.advance(chunk)
            if samples:
                chunk.request.append(1)
        self.scheduler.check_integrity()
        return [(chunk.request.request_id, chunk.start, chunk.end) for chunk in chunks]

    def run(self, request: EngineRequest, tokens: int = 1) -> None:
        while request.num_output_tokens < tokens:
            self.step()
        self.finish(request)

    def finish(self, request: EngineRequest, status: RequestStatus = RequestStatus.FINISHED_LENGTH) -> None:
        self.scheduler.finish(request, status)
        self.scheduler.check_integrity()


def test_a_second_request_computes_only_what_is_new() -> None:
    setup = Setup()
    setup.run(setup.add("a", range(10)))
    second = setup.add("b", [*range(8), 50, 51, 52])
    assert setup.step() == [("b", 8, 11)]
    assert second.num_cached_tokens == 8
    assert (setup.scheduler.num_queried_tokens, setup.scheduler.num_cached_tokens) == (21, 8)


def test_the_next_turn_finds_the_answer_too() -> None:
    setup = Setup()
    first = setup.add("a", range(6))
    setup.run(first, tokens=7)
    setup.add("b", [*first.token_ids, 60, 61])
    assert setup.step() == [("b", 12, 15)]


@pytest.mark.parametrize("length", [8, 9])
def test_at_least_one_token_is_computed(length: int) -> None:
    setup = Setup()
    setup.run(setup.add("a", range(length)))
    setup.add("b", range(length))
    assert setup.step() == [("b", 4 * ((length - 1) // 4), length)]


def test_running_requests_share_blocks_and_give_them_back_one_by_one() -> None:
    setup = Setup()
    first, _ = setup.add("a", range(9)), setup.step()
    second, _ = setup.add("b", range(9)), setup.step()
    assert setup.kv_cache.block_table("a")[:2] == setup.kv_cache.block_table("b")[:2]
    assert setup.kv_cache.num_used_blocks == 4
    setup.finish(first)
    assert setup.kv_cache.num_used_blocks == 3
    setup.finish(second)
    assert setup.kv_cache.num_used_blocks == 0


def test_requests_with_the_same_prompt_wait_for_the_one_that_computes_it() -> None:
    setup = Setup(tokens=9)
    for name in "abc":
        setup.add(name, range(18))
    setup.add("other", [70, 71])
    assert setup.step() == [("a", 0, 9)]
    assert setup.step() == [("a", 9, 18)]
    assert setup.step() == [("a", 18, 19), ("b", 16, 18), ("c", 16, 18), ("other", 0, 2)]


def test_others_go_past_one_that_waits_for_a_common_prefix() -> None:
    setup = Setup()
    for name, token_ids in (("a", [*range(8), 1]), ("b", [*range(8), 2]), ("other", [70, 71])):
        setup.add(name, token_ids)
    assert setup.step() == [("a", 0, 9), ("other", 0, 2)]
    assert setup.step() == [("a", 9, 10), ("other", 2, 3), ("b", 8, 9)]


@pytest.mark.parametrize("computed", [0, 9])
def test_one_that_waits_goes_on_alone_when_the_other_is_aborted(computed: int) -> None:
    setup = Setup(tokens=9)
    first = setup.add("a", range(18))
    setup.add("b", range(18))
    for _ in range(computed // 9):
        setup.step()
    setup.finish(first, RequestStatus.FINISHED_ABORTED)
    start = 4 * (computed // 4)
    assert setup.step() == [("b", start, min(start + 9, 18))]


def test_full_memory_forgets_the_oldest_and_still_serves() -> None:
    setup = Setup(num_blocks=4)
    for first_token in range(0, 100, 10):
        setup.run(setup.add(str(first_token), range(first_token, first_token + 9)))
    assert setup.kv_cache.num_used_blocks == 0
    setup.add("newest", range(90, 99))
    assert setup.step() == [("newest", 8, 9)]


def test_a_cached_prefix_that_is_free_counts_as_free_only_once() -> None:
    setup = Setup(num_blocks=3)
    setup.run(setup.add("a", range(8)))
    running = setup.add("running", [70])
    setup.step()
    setup.add("b", range(9))  # two cached blocks and a new one, but two are free beside the running one's
    assert setup.step() == [("running", 1, 2)]
    setup.finish(running)
    assert setup.step() == [("b", 8, 9)]


def test_a_prefix_does_not_end_inside_an_atomic_span() -> None:
    setup = Setup()
    spans = [ImageSpan("k", 2, 8)]
    setup.run(setup.add("a", [9] * 14, spans=spans))
    second = make_request("b", [9] * 10 + [1] * 4, spans)
    second.atomic_spans = ((2, 10),)
    setup.scheduler.add(second)
    assert setup.step() == [("b", 0, 14)]
    third = make_request("c", [9] * 14, spans)
    third.atomic_spans = ((2, 10),)
    setup.scheduler.add(third)
    assert ("c", 12, 14) in setup.step()


def test_prompt_logprobs_are_of_a_prompt_that_is_computed() -> None:
    setup = Setup()
    setup.run(setup.add("a", range(9)))
    setup.add("b", range(9), sampling=SamplingParams(prompt_logprobs=0))
    setup.add("c", range(9), sampling=SamplingParams(prompt_logprobs=0))
    assert setup.step() == [("b", 0, 9), ("c", 0, 9)]
    assert setup.scheduler.num_queried_tokens == 9


def test_without_caching_everybody_computes_everything() -> None:
    setup = Setup(caching=False)
    setup.run(setup.add("a", range(9)))
    setup.add("b", range(9))
    setup.add("c", range(9))
    assert setup.step() == [("b", 0, 9), ("c", 0, 9)]


def test_blocks_of_a_request_that_the_model_failed_on_are_not_reused() -> None:
    setup = Setup()
    request = setup.add("a", range(9))
    setup.step()
    setup.kv_cache.distrust("a")
    setup.finish(request, RequestStatus.FINISHED_ERROR)
    setup.add("b", range(9))
    assert setup.step() == [("b", 0, 9)]
    assert setup.kv_cache.num_cached_blocks == 2


def test_a_resumed_request_counts_once_as_cached() -> None:
    setup = Setup(num_blocks=4)
    setup.add("old", [*range(4)])
    new = setup.add("new", [60, 61, 62])
    while new.num_preemptions == 0:
        setup.step()
    while new.status is not RequestStatus.RUNNING:
        setup.step()
        if setup.scheduler.num_running == 1 and new.status is RequestStatus.PREEMPTED:
            old = next(iter(setup.scheduler.requests()))
            setup.finish(old)
    assert new.num_cached_tokens == 0
    assert setup.scheduler.num_cached_tokens == 0
