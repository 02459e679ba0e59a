"""How many prompt tokens a step can take beside running answers without making them stutter. Pure arithmetic."""

from __future__ import annotations

_DECAY = 0.8
"""Weight of what was known before each observation: about the last five steps count."""
_STALE_DECAY = 0.5
"""The same for what decoding takes, when that was measured some steps ago."""
_LEAST_SHARE = 0.2
"""Of a mixed step's duration that is put down to its prompts, whatever the decodes are thought to take."""
_LEAST_TOKENS = 16
"""Prompts go on, if slowly."""
_MOST_PATIENCE = 4.0
"""Times the target that a step may take while so many more prompts wait than answers run."""
_MOST_MIXED_STEPS = 32
"""After so many in a row, one without prompts."""


class PrefillPace:
    """Learns from the durations of steps what a prompt token costs, and what decoding takes alone.

    A step of running answers and n prompt tokens takes `decode + n * token` seconds. Both are exponential averages.
    Under load no step may be without prompts, so that nothing would be learned of decoding alone. Hence prompts sit one
    step out now and then.
    """

    def __init__(self, target_s: float) -> None:
        """Aim at mixed steps of `target_s` seconds; 0: never limit anything."""
        self._target_s = target_s
        self._decode_s = 0.0
        self._prefill_s = 0.0
        self._prefill_tokens = 0.0
        self._mixed_steps = 0
        """Since decoding alone was measured."""

    def observe(self, prefill_tokens: int, decode_tokens: int, duration_s: float) -> None:
        """Learn from a step of so many tokens."""
        if prefill_tokens == 0:
            before = self._decode_s or duration_s
            decay = _DECAY if self._mixed_steps == 0 else _STALE_DECAY
            self._decode_s = decay * before + (1 - decay) * duration_s
            self._mixed_steps = 0
            return
        if decode_tokens > 0:
            self._mixed_steps += 1
            self._decode_s = min(self._decode_s, duration_s)
            duration_s = max(duration_s - self._decode_s, _LEAST_SHARE * duration_s)
        # Sums, not an average of quotients: steps with few prompt tokens tell little of what one costs.
        self._prefill_s = _DECAY * self._prefill_s + duration_s
        self._prefill_tokens = _DECAY * self._prefill_tokens + prefill_tokens

    def limit(self, prompts: int = 0, answers: int = 1) -> int | None:
        """How many prompt tokens the next step should have at most; None: any number.

        Where more prompts wait than answers run, the few are kept waiting for longer, so that the many begin sooner:
        small steps for one answer's sake would cost all of them more than they give to it.

        Args:
            prompts: that wait or are under way.
            answers: that run, one at least.
        """
        if self._target_s == 0 or self._prefill_s == 0:
            return None
        if self._mixed_steps >= _MOST_MIXED_STEPS:
            return 0
        # Where decoding alone takes longer than the target, prompts may add half as much: they have to go on too.
        target_s = self._target_s * min(_MOST_PATIENCE, max(1.0, prompts / answers))
        left_s = max(target_s - self._decode_s, self._decode_s / 2)
        return max(_LEAST_TOKENS, int(left_s * self._prefill_tokens / self._prefill_s))
