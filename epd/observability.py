"""Logging and stage clocks, the same for every process."""

from __future__ import annotations

import logging
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from enum import StrEnum
from types import TracebackType
from typing import Self

from epd.messages import StageStats


class Stage(StrEnum):
    """Stages of a request, as named in messages, `timings` of an answer and `/metrics`. All in milliseconds."""

    E2E = "e2e"
    """From the arrival of a request at this process to its terminal answer."""
    QUEUE = "queue"
    """From arrival to the first time that work on it began."""
    EMBEDDINGS_WAIT = "embeddings_wait"
    """PD: waiting for pictures, part of `queue`."""
    PREFILL = "prefill"
    """PD: from the first scheduled prompt token to the first new token."""
    TTFT = "time_to_first_token"
    """PD: from arrival to the first new token."""
    TPOT = "time_per_output_token"
    """PD: mean time between the new tokens of a request."""
    DECODE = "decode"
    """PD: from the first to the last new token."""
    ENCODE_QUEUE = "encode_queue"
    """Encoder: waiting for a place in a batch."""
    PREPROCESS = "preprocess"
    """Encoder: decoding and resizing a picture."""
    ENCODE = "encode"
    """Encoder: the vision tower."""
    TRANSFER = "transfer"
    """Encoder: shipping the embeddings until the PD has acknowledged them."""


BOUNDS_MS = (1, 2.5, 5, 10, 15, 20, 30, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 120_000)
"""Upper bounds, included, of the ranges that durations are counted in: from a decode step to a request's whole time. Of
processes with different ones only sums are of use, so let another list have another length."""


class Histogram:
    """Durations in milliseconds, counted in ranges. Made for one writer."""

    __slots__ = ("buckets", "total_ms")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS_MS) + 1)
        """One for each of `BOUNDS_MS`, and one for all above."""
        self.total_ms = 0.0

    def observe(self, duration_ms: float) -> None:
        """Add one duration."""
        self.buckets[bisect_left(BOUNDS_MS, duration_ms)] += 1
        self.total_ms += duration_ms

    def snapshot(self) -> StageStats:
        """As of now."""
        buckets = tuple(self.buckets)  # once: the writer may be another thread, and the count must be theirs
        return StageStats(count=sum(buckets), total_ms=self.total_ms, buckets=buckets)


class StageRecorder:
    """Durations of stages since start. One writer thread."""

    def __init__(self) -> None:
        self._stages: defaultdict[str, Histogram] = defaultdict(Histogram)

    def observe(self, stage: str, duration_ms: float) -> None:
        """Add one duration."""
        self._stages[stage].observe(duration_ms)

    def snapshot(self) -> dict[str, StageStats]:
        """All stages seen so far."""
        return {stage: histogram.snapshot() for stage, histogram in list(self._stages.items())}


class Stopwatch:
    """Milliseconds since it was made, or inside a `with` block."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.ms = 0.0

    def elapsed_ms(self) -> float:
        """Milliseconds since the start."""
        return (time.perf_counter() - self._start) * 1000

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ms = self.elapsed_ms()


def setup_logging(process: str, level: str = "info") -> None:
    """Log to standard error, one line an event, headed by the process's name.

    Args:
        process: such as `proxy` or `encoder_0`.
        level: debug, info, warning or error.
    """
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)-7s {process:<16} %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # They tell each request or each file at info; ours say what matters.
    for noisy in ("httpx", "httpcore", "httpx2", "transformers", "urllib3", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # transformers imports torchao wherever it is installed, which then warns of parts that only some GPUs have.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
