from __future__ import annotations

from epd.types import FinishReason, SamplingParams
from workers.engine.request import FINISH_REASONS, EngineRequest, ImagePlaceholder, RequestStatus


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_final_status_has_a_finish_reason() -> None:
    assert {status for status in RequestStatus if status.is_finished} == set(FINISH_REASONS)
    assert set(FINISH_REASONS.values()) == set(FinishReason)


def test_stages_are_timed_from_status_changes() -> None:
    clock = FakeClock()
    request = EngineRequest("a", [1, 2], SamplingParams(), images=[ImagePlaceholder("k", 0)], clock=clock)
    for seconds, status in ((1, RequestStatus.WAITING), (2, RequestStatus.RUNNING), (3, None)):
        clock.now += seconds
        if status is not None:
            request.status = status
    request.append(7)
    clock.now += 4
    request.status = RequestStatus.PREEMPTED
    clock.now += 5
    request.status = RequestStatus.RUNNING
    request.status = RequestStatus.FINISHED_LENGTH
    clock.now += 6
    expected = {"embeddings_wait": 1000.0, "queue": 2000.0, "prefill": 3000.0, "decode": 9000.0}
    assert request.timings_ms() == expected
    assert request.finish_reason is FinishReason.LENGTH


def test_a_request_that_never_ran_has_only_the_stages_it_reached() -> None:
    clock = FakeClock()
    request = EngineRequest("a", [1], SamplingParams(), images=[ImagePlaceholder("k", 0)], clock=clock)
    clock.now += 1
    request.status = RequestStatus.FINISHED_ABORTED
    assert request.timings_ms() == {"embeddings_wait": 1000.0}


def test_decoding_means_one_token_after_the_first_generated() -> None:
    request = EngineRequest("a", [1], SamplingParams())
    seen = [request.is_decoding]
    request.num_computed_tokens = 1
    request.append(5)
    seen.append(request.is_decoding)
    request.num_computed_tokens = 0
    seen.append(request.is_decoding)
    assert seen == [False, True, False]
    assert request.num_output_tokens == 1
