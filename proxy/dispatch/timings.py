"""Where the time of one request went: by the proxy's clock and the workers' own measures."""

from __future__ import annotations

import time
from collections.abc import Mapping

from epd.messages import EncodeResult
from epd.observability import Stage


class Timings:
    """Durations in milliseconds, filled as answers arrive.

    Args:
        arrived: `time.perf_counter()` when the HTTP request came.
    """

    def __init__(self, arrived: float) -> None:
        self._arrived = arrived
        self._known: dict[str, float] = {}
        self.first_token_ms: float | None = None
        """From arrival; None until there is one."""

    def note(self, spent: Mapping[str, float]) -> None:
        """A worker tells its stages; the longest of all pictures and samples counts."""
        for stage, duration in spent.items():
            self._known[stage] = max(duration, self._known.get(stage, 0.0))

    def note_encoded(self, result: EncodeResult) -> None:
        """An encoder tells its stages."""
        spent = result.timings_ms
        tower = spent.get(Stage.PREPROCESS, 0.0) + spent.get(Stage.ENCODE, 0.0)
        self.note({"encode": tower, "transfer": spent.get(Stage.TRANSFER, 0.0)})

    def note_first_token(self) -> float:
        """The first token of all samples is here; returns how long it took."""
        self.first_token_ms = self._since_arrival()
        return self.first_token_ms

    def summary(self) -> dict[str, float]:
        """What an answer tells under `timings`."""
        known = self._known
        wait = known.get(Stage.EMBEDDINGS_WAIT, 0.0)
        return {
            "queue": round(max(known.get(Stage.QUEUE, 0.0) - wait, 0.0), 3),
            "encode": round(known.get("encode", 0.0), 3),
            "transfer": round(known.get("transfer", 0.0), 3),
            "embeddings_wait": round(wait, 3),
            "prefill": round(known.get(Stage.PREFILL, 0.0), 3),
            "first_token": round(self.first_token_ms or 0.0, 3),
            "decode": round(known.get(Stage.DECODE, 0.0), 3),
            "total": round(self._since_arrival(), 3),
        }

    def _since_arrival(self) -> float:
        return (time.perf_counter() - self._arrived) * 1000
