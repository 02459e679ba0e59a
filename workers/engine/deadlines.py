"""When requests run out of time."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from epd.errors import DeadlineExceeded
from workers.engine.request import Clock, EngineRequest, RequestStatus

_DOING = {
    RequestStatus.WAITING_FOR_EMBEDDINGS: "it waited for image embeddings",
    RequestStatus.WAITING: "it waited in the queue of the prefill-decode worker",
    RequestStatus.PREEMPTED: "it waited, preempted, in the queue of the prefill-decode worker",
    RequestStatus.RUNNING: "its tokens were computed",
}


class Deadlines:
    """The deadlines of unfinished requests, soonest first.

    Ended requests linger in the heap for a while, by id alone, to keep nothing of them alive.
    """

    def __init__(self, requests: Mapping[str, EngineRequest], clock: Clock) -> None:
        """Watch over `requests`, by id, which the caller keeps up to date."""
        self._requests = requests
        self._clock = clock
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: EngineRequest) -> None:
        """Note the deadline of a request, if it has one."""
        if request.deadline is None:
            return
        if len(self._heap) > 2 * len(self._requests) + 100:  # mostly of ended requests
            self._heap = [entry for entry in self._heap if self._is_current(*entry)]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (request.deadline, request.request_id))

    def seconds_to_next(self) -> float | None:
        """Until the soonest deadline; negative when it has passed, None without any."""
        while self._heap and not self._is_current(*self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] - self._clock() if self._heap else None

    def pop_expired(self) -> list[EngineRequest]:
        """The requests whose time is over, each told of once."""
        now = self._clock()
        expired: dict[str, EngineRequest] = {}  # an id that came twice at the same time has two entries
        while self._heap and self._heap[0][0] <= now:
            deadline, request_id = heapq.heappop(self._heap)
            if self._is_current(deadline, request_id):
                expired[request_id] = self._requests[request_id]
        return list(expired.values())

    def _is_current(self, deadline: float, request_id: str) -> bool:
        """Whether a heap entry is about an unfinished request, and not an earlier one of the same id."""
        request = self._requests.get(request_id)
        return request is not None and request.deadline == deadline


def out_of_time(request: EngineRequest) -> DeadlineExceeded:
    """Says in which stage the request's time ran out."""
    return DeadlineExceeded(f"The request's time ran out while {_DOING[request.status]}.")
