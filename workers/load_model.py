"""What work at hand will still take, learned from what work took so far. Pure arithmetic, in milliseconds.

Averages forget: each observation weighs a little more than all that came before, so that a worker that shares its cores
with others for a while says so.
"""

from __future__ import annotations

_MEMORY = 0.95
"""Weight of what was known before each observation: about the last twenty count."""
_LEAST_SHARE = 0.2
"""Of a mixed step's duration that is put down to its prompts, whatever the decodes are thought to take."""
_UNKNOWN_ANSWER = 256.0
"""Tokens of an answer without a limit, before any was seen to its end."""


class _Line:
    """Duration as a line over a size, by least squares over decaying observations; neither part is negative."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, x: float, y: float) -> None:
        self._n = _MEMORY * self._n + 1
        self._x = _MEMORY * self._x + x
        self._y = _MEMORY * self._y + y
        self._xx = _MEMORY * self._xx + x * x
        self._xy = _MEMORY * self._xy + x * y

    def at(self, x: float) -> float:
        """0 before the first observation."""
        if not self._n:
            return 0.0
        spread = self._xx - self._x**2 / self._n
        slope = (self._xy - self._x * self._y / self._n) / spread if spread > 1e-6 * self._xx else 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        # A steeper line than through the origin would have small sizes take less than nothing.
        slope = min(max(slope, 0.0), mean_y / mean_x) if mean_x else 0.0
        return max(0.0, mean_y + slope * (x - mean_x))


class PrefillDecodeModel:
    """Learns from the steps of an engine: a prompt token costs so much, a step of n answers so much."""

    def __init__(self) -> None:
        self._decode = _Line()
        self._prefill_ms = 0.0
        self._prefill_tokens = 0.0
        self._answers = 0.0
        self._answer_tokens = 0.0

    def observe_step(self, prefill_tokens: int, decode_tokens: int, duration_ms: float) -> None:
        """A step of so many tokens of each kind has ended."""
        if prefill_tokens == 0:
            self._decode.observe(decode_tokens, duration_ms)
            return
        if decode_tokens:
            duration_ms = max(duration_ms - self.step_ms(decode_tokens), _LEAST_SHARE * duration_ms)
        # Sums, not an average of quotients: steps with few prompt tokens tell little of what one costs.
        self._prefill_ms = _MEMORY * self._prefill_ms + duration_ms
        self._prefill_tokens = _MEMORY * self._prefill_tokens + prefill_tokens

    def observe_answer(self, num_tokens: int) -> None:
        """An answer is whole."""
        self._answers = _MEMORY * self._answers + 1
        self._answer_tokens = _MEMORY * self._answer_tokens + num_tokens

    @property
    def ms_per_token(self) -> float:
        """Of one more prompt token; 0: nothing learned yet."""
        return self._prefill_ms / self._prefill_tokens if self._prefill_tokens else 0.0

    def step_ms(self, batch: int) -> float:
        """Of a step of `batch` answers without prompts; 0: nothing learned yet."""
        return self._decode.at(batch)

    def remaining_tokens(self, so_far: int, most: int) -> float:
        """Tokens that an answer will still get.

        Args:
            so_far: those that it has.
            most: those that it may have in all.
        """
        mean = self._answer_tokens / self._answers if self._answers else _UNKNOWN_ANSWER
        # Those that are longer than most have as much before them as they had at their start: who knows?
        return max(0.0, min(most - so_far, mean - so_far if so_far < mean else mean))

    def work_ms(self, prefill_tokens: float, decode_tokens: float, batch: int) -> float:
        """Of all work at hand, done as fast as it can be.

        Args:
            prefill_tokens: of all prompts that are not computed.
            decode_tokens: that all answers will still get.
            batch: answers that run beside each other.
        """
        steps = decode_tokens / batch if batch else 0.0
        return prefill_tokens * self.ms_per_token + steps * self.step_ms(batch)


class EncodeModel:
    """Learns from the batches of a vision tower, and from preprocessing, what a picture takes."""

    def __init__(self) -> None:
        self._tower_ms = 0.0
        self._patches = 0.0
        self._pictures = 0.0
        self._preprocess_ms = 0.0
        self._preprocessed = 0.0

    def observe_batch(self, pictures: int, patches: int, duration_ms: float) -> None:
        """The tower has encoded so many pictures together."""
        self._tower_ms = _MEMORY * self._tower_ms + duration_ms
        self._patches = _MEMORY * self._patches + patches
        self._pictures = _MEMORY * self._pictures + pictures

    def observe_preprocessing(self, duration_ms: float) -> None:
        """A picture was decoded and resized."""
        self._preprocess_ms = _MEMORY * self._preprocess_ms + duration_ms
        self._preprocessed = _MEMORY * self._preprocessed + 1

    def patches_ms(self, patches: int) -> float:
        """Of so many patches in the tower; 0: nothing learned yet."""
        return patches * self._tower_ms / self._patches if self._patches else 0.0

    def picture_ms(self, preprocess_threads: int) -> float:
        """Of a picture of which nothing is known, where so many are preprocessed beside each other."""
        tower = self._tower_ms / self._pictures if self._pictures else 0.0
        preprocess = self._preprocess_ms / self._preprocessed if self._preprocessed else 0.0
        return tower + preprocess / preprocess_threads
