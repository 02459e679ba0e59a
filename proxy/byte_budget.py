"""How many bytes of request bodies and pictures this proxy holds at once: more are refused, whoever sends them.

Each HTTP request has a lease from the edge of the application to the end of its answer; whatever reads bytes on its
behalf takes them from it. Tasks inherit the lease of the request that they were made for.
"""

from __future__ import annotations

from contextvars import ContextVar

from epd.errors import Overloaded


class ByteBudget:
    """Bytes that all requests may hold together. `limit`: in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def lease(self) -> _Lease:
        """`with` this, what is taken inside is given back at the end."""
        return _Lease(self)


class _Lease:
    def __init__(self, budget: ByteBudget) -> None:
        self.budget = budget
        self.taken = 0

    def __enter__(self) -> None:
        self._token = _current.set(self)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        self.budget.held -= self.taken


_current: ContextVar[_Lease | None] = ContextVar("lease", default=None)


def hold(num_bytes: int) -> None:
    """Take so many bytes for the request at hand. Outside of any nothing is counted.

    Raises:
        Overloaded: others hold too much. Nothing was taken.
    """
    lease = _current.get()
    if lease is None:
        return
    budget = lease.budget
    if budget.held + num_bytes > budget.limit:
        raise Overloaded(
            f"The proxy holds {budget.held} bytes of requests and pictures; its limit is {budget.limit} bytes "
            "(--max-media-bytes). Try again in a moment."
        )
    budget.held += num_bytes
    lease.taken += num_bytes
