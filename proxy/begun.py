"""Coroutines whose first step is taken on the spot: most of those that may have to wait do not.

Timers and tasks are for those that do. Both cost more than the rest of what a token or a short request needs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class Begun(Generic[T]):
    """A coroutine that has taken its first step. Awaited once unless it `is_done`, by a task.

    Args:
        coroutine: to begin. What it raises in its first step is raised here.
    """

    __slots__ = ("_steps", "_value", "_wanted", "is_done")

    def __init__(self, coroutine: Awaitable[T]) -> None:
        self._steps: Generator[object, object, T] = coroutine.__await__()
        self._value: T  # there is none before it has returned
        self.is_done = False
        """It has returned."""
        try:
            self._wanted: object = next(self._steps)
        except StopIteration as end:
            self._value, self.is_done = end.value, True

    def __await__(self) -> Generator[object, object, T]:
        """Go on to the end. Returns what the coroutine does."""
        while not self.is_done:
            try:
                try:
                    news = yield self._wanted
                except BaseException as error:  # cancellation among others; nothing else here may hold it: a cycle
                    self._wanted = self._steps.throw(error)
                else:
                    self._wanted = self._steps.send(news)
            except StopIteration as end:
                self._value, self.is_done = end.value, True
        return self._value

    @property
    def result(self) -> T:
        """What it returned, where it `is_done`."""
        return self._value

    def close(self) -> None:
        """It will not be awaited."""
        self._steps.close()
