"""Live probes: each model really computes something, because that it could is not that it does.

A probe is one short request to the workers, in front of what waits there, outside of the limit on requests in work.
Everybody who asks within `FRESH_S` gets the same verdict, so that asking costs no more than one probe a second.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass

from epd.errors import EPDError, Overloaded
from epd.types import Pooling, PoolingKind, SamplingParams, WorkerRole, WorkerTask
from proxy.dispatch.work import Work
from proxy.models.served_model import ServedModel

FRESH_S = 1.0
TIMEOUT_S = 10.0
_FIRST = -1000
"""Priority: in front of all that people ask, which is small in comparison."""
_TEXT = "Hello"


@dataclass(frozen=True)
class Verdict:
    """What came of the probe of a model."""

    status: str
    """`healthy`; `degraded`: it answers text, and has no encoder for pictures; `busy`: its workers are full;
    `unhealthy`: it gave no answer."""
    problem: str = ""
    """What is wrong, in words; empty: nothing."""
    latency_ms: float = 0.0
    """From the probe to its end."""

    @property
    def can_serve(self) -> bool:
        """Whether the model works, if perhaps not at once or not for everything."""
        return self.status != "unhealthy"


class ModelProbe:
    """Probes all models of a process.

    Args:
        models: that there are at the moment.
    """

    def __init__(self, models: Callable[[], Sequence[ServedModel]]) -> None:
        self._models = models
        self._running: asyncio.Task[dict[str, Verdict]] | None = None
        self._found_at = float("-inf")

    async def verdicts(self) -> dict[str, Verdict]:
        """Name of each model → what came of its probe, which is at most `FRESH_S` old, or running, when this is asked.

        Returns within `TIMEOUT_S`.
        """
        task = self._running
        if task is None or (task.done() and time.monotonic() - self._found_at > FRESH_S):
            # In a context of its own: it is not the work of the one who happens to ask first.
            task = asyncio.create_task(self._probe_all(), name="probe models", context=Context())
            self._running = task
        return await asyncio.shield(task)  # whoever leaves does not take it along

    async def close(self) -> None:
        """Stop probing."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _probe_all(self) -> dict[str, Verdict]:
        models = list(self._models())
        found = await asyncio.gather(*(_probe(model) for model in models))
        self._found_at = time.monotonic()
        best: dict[str, Verdict] = {}
        for model, verdict in zip(models, found, strict=True):
            if model.name not in best or not best[model.name].can_serve:
                best[model.name] = verdict  # of two checkpoints under one name the better counts
        return best


async def _probe(model: ServedModel) -> Verdict:
    began = time.perf_counter()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await _compute(model, began)
    except Overloaded as error:
        return Verdict("busy", error.message)
    except EPDError as error:
        return Verdict("unhealthy", error.message)
    except TimeoutError:
        return Verdict("unhealthy", f"No answer within {TIMEOUT_S:g} s.")
    latency_ms = round((time.perf_counter() - began) * 1000, 3)
    if WorkerRole.ENCODER in model.missing_roles:
        return Verdict("degraded", "There is no encoder, so that pictures are refused.", latency_ms)
    return Verdict("healthy", latency_ms=latency_ms)


async def _compute(model: ServedModel, began: float) -> None:
    """One token, or one vector, of a short text.

    Raises:
        EPDError: the workers could not.
    """
    pooling = {
        WorkerTask.SCORE: Pooling(PoolingKind.SCORE),
        WorkerTask.EMBED: Pooling(PoolingKind.LAST),
    }.get(model.task or WorkerTask.GENERATE)
    model.require(pooling=pooling)
    work = Work(
        request_id=f"probe-{secrets.token_hex(16)}",
        model=model.ref,
        prompts=(tuple(await model.encode_text(_TEXT)),),
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        priority=_FIRST,
        pooling=pooling,
        arrived=began,
        timeout_s=TIMEOUT_S,
    )
    generation = await model.dispatcher.start(work)
    try:
        while not generation.done:
            await generation.next()
    finally:
        await model.dispatcher.close(generation)
