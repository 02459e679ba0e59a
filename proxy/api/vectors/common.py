"""Requests with pooling: many texts to one vector each, by way of the workers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from epd.errors import WorkerFailed
from epd.types import FinishReason, Pooling, SamplingParams
from proxy.dispatch.work import Work
from proxy.models.served_model import ServedModel

T = TypeVar("T")
R = TypeVar("R")

MAX_INPUTS = 2048
AT_ONCE = 64
"""Texts of one request that workers have in hand; thousands would fill their queues for everybody else."""
_IN_ONE_GO = 16
"""Vectors of several thousand numbers each: milliseconds to write down."""


class VectorUsage(msgspec.Struct):
    """Token counts; nothing is generated."""

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int) -> VectorUsage:
        """Usage of an answer without completion."""
        return cls(prompt_tokens, prompt_tokens)


@dataclass(frozen=True)
class Vectors:
    """One for each text, in order."""

    values: list[tuple[float, ...]]
    prompt_tokens: int


async def one_by_one(items: Iterable[T], make: Callable[[T], R]) -> list[R]:
    """What `make` makes of each. Thousands of vectors take a good part of a second, so others have turns in between."""
    made = []
    for index, item in enumerate(items):
        if index % _IN_ONE_GO == _IN_ONE_GO - 1:
            await asyncio.sleep(0)
        made.append(make(item))
    return made


async def pooled(
    model: ServedModel,
    request_id: str,
    prompts: Sequence[tuple[int, ...]],
    pooling: Pooling,
    arrived: float,
    priority: int = 0,
) -> Vectors:
    """Ask the workers for a vector of each prompt.

    Args:
        model: that makes them.
        request_id: each group of prompts has its own, which begins like this.
        prompts: token ids.
        pooling: what kind of vectors.
        arrived: `time.perf_counter()` when the request came.
        priority: smaller goes first.

    Raises:
        EPDError: one of them failed; the others are aborted.
    """
    values: list[tuple[float, ...]] = []
    prompt_tokens = 0
    for first in range(0, len(prompts), AT_ONCE):
        work = Work(
            request_id=f"{request_id}-{first}",
            model=model.ref,
            prompts=tuple(prompts[first : first + AT_ONCE]),
            sampling=SamplingParams(),
            priority=priority,
            pooling=pooling,
            arrived=arrived,
            timeout_s=model.config.request_timeout,
        )
        part = await _one_group(model, work)
        values += part.values
        prompt_tokens += part.prompt_tokens
    return Vectors(values, prompt_tokens)


async def _one_group(model: ServedModel, work: Work) -> Vectors:
    generation = await model.dispatcher.start(work)
    found: dict[int, tuple[float, ...]] = {}
    try:
        while not generation.done:
            for update in await generation.next():
                if update.finish_reason is not FinishReason.STOP or not update.pooled:
                    raise WorkerFailed("The prefill-decode worker gave no vector.")
                if not all(map(math.isfinite, update.pooled)):
                    raise WorkerFailed("The prefill-decode worker gave a vector that holds no numbers.")
                found[update.index] = update.pooled
    finally:
        await model.dispatcher.close(generation)
    return Vectors([found[index] for index in range(len(work.prompts))], generation.prompt_tokens)
