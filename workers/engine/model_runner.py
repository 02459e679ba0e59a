"""Runs the model on what the scheduler decided: the only place where its integers become tensors, and come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from epd.types import TokenLogprobs
from workers.engine import step_inputs
from workers.engine.adapter import PlacedImage, PlainPositions
from workers.engine.chunks import ScheduledChunk
from workers.engine.compiled_forward import CompiledForward
from workers.engine.forward import Forward
from workers.engine.grammar import GrammarCompiler
from workers.engine.logprobs import PromptLogprobs
from workers.engine.pooling import Pooler
from workers.engine.sampler import Draw, Sampled, SamplingRow, sample
from workers.engine.step_inputs import PlacedPrompt
from workers.engine.transfer import to_device


class Runner(Protocol):
    """What the engine needs of a model; tests put a fake here."""

    @property
    def compiled_steps(self) -> int:
        """Steps that ran by a compiled graph, since the start."""

    def add(self, request_id: str, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> None:
        """Learn an expanded prompt before its first step. Raises EPDError when it cannot be positioned."""

    def remove(self, request_id: str) -> None:
        """Forget a request, if known."""

    def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[Sampled]:
        """Compute a step: one token for each chunk that `samples`, in order; `rows` belongs to those.

        The chunks are `in_batch_order`.

        May raise anything. The same chunks, or some of them, may then be run again.
        """

    def prompt_logprobs(self, request_id: str) -> tuple[TokenLogprobs, ...] | None:
        """Those of tokens 1, 2, … of a request's prompt, as far as it is computed; None: not asked for, or taken."""

    def pooled(self, request_id: str) -> tuple[float, ...]:
        """The vector of a request with pooling, after the step that computed the last token of its prompt."""


class LaunchedStep(Protocol):
    """A step that is being computed."""

    @property
    def was_revised(self) -> bool:
        """Whether `read` gave other tokens than a step launched behind this one was computed from."""

    def read(self) -> list[Sampled]:
        """Wait for the tokens; what they are is what `Runner.run` returns. Once. May raise anything."""


class LaunchingRunner(Runner, Protocol):
    """A runner for which launching a step and reading its tokens are two things."""

    def launch(
        self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow], before: LaunchedStep | None = None
    ) -> LaunchedStep:
        """Begin what `run` does, behind whatever was launched before, and wait for nothing.

        Args:
            chunks: as for `run`. With `before`, each is one token that `before` samples for its request.
            rows: as for `run`.
            before: a step whose tokens were not read yet.
        """


class _Launched:
    """Implements `LaunchedStep`."""

    def __init__(self, draw: Draw | None, request_ids: Sequence[str], keep: Callable[[], None]) -> None:
        """`draw` is of these requests; `keep` is called when all is well, for a step that fails is run again."""
        self._draw = draw
        self._request_ids = request_ids
        self._keep = keep

    @property
    def unread(self) -> step_inputs.UnreadTokens:
        """What is sampled, for the step behind this one. Some request samples."""
        assert self._draw is not None
        rows = {request_id: row for row, request_id in enumerate(self._request_ids)}
        return step_inputs.UnreadTokens(self._draw.tokens, rows)

    @property
    def was_revised(self) -> bool:
        """See `LaunchedStep`."""
        return self._draw is not None and self._draw.was_revised

    @torch.inference_mode()
    def read(self) -> list[Sampled]:
        """See `LaunchedStep`."""
        tokens = [] if self._draw is None else self._draw.read()
        self._keep()
        return tokens


class ModelRunner:
    """Turns what the scheduler decided into steps of a model, and their logits into tokens."""

    def __init__(
        self,
        forward: Forward,
        adapter: PlainPositions,
        device: torch.device,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """Run steps by `forward`, on `device`; `adapter` and `grammars` are those of the model."""
        self._forward = forward
        self._adapter = adapter
        self.device = device
        self._prompts: dict[str, PlacedPrompt] = {}
        self.grammars = grammars
        self._prompt_logprobs = PromptLogprobs(forward.logits)
        self._pooler = Pooler(forward.logits)

    @property
    def compiled_steps(self) -> int:
        """See `Runner`."""
        return self._forward.compiled_steps if isinstance(self._forward, CompiledForward) else 0

    def add(self, request_id: str, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> None:
        """See `Runner`."""
        self._prompts[request_id] = PlacedPrompt.of(self._adapter, token_ids, images)

    def remove(self, request_id: str) -> None:
        """See `Runner`."""
        self._prompts.pop(request_id, None)
        self._pooler.remove(request_id)
        self._prompt_logprobs.remove(request_id)

    def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[Sampled]:
        """See `Runner`."""
        with torch.inference_mode():
            logits, keep = self._compute(chunks, None)
            sampled = [] if logits is None else sample(logits, rows, self.grammars)
        keep()
        return sampled

    @torch.inference_mode()
    def launch(
        self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow], before: LaunchedStep | None = None
    ) -> LaunchedStep:
        """See `LaunchingRunner`."""
        logits, keep = self._compute(chunks, before.unread if isinstance(before, _Launched) else None)
        draw = None if logits is None else Draw(logits, rows, self.grammars, waits=False)
        return _Launched(draw, [chunk.request.request_id for chunk in chunks if chunk.samples], keep)

    def _compute(
        self, chunks: Sequence[ScheduledChunk], unread: step_inputs.UnreadTokens | None
    ) -> tuple[torch.Tensor | None, Callable[[], None]]:
        """Logits of the chunks that sample, None without any, and what to call when all is well."""
        inputs = step_inputs.build(chunks, self._prompts, self._adapter.num_axes, unread)
        hidden = self._forward.hidden(inputs)
        if inputs.wanted is None:
            return self._forward.logits(hidden), _keep_nothing
        pools = self._pooler.compute(chunks, hidden)
        prompts = self._prompt_logprobs.compute(chunks, hidden)

        def keep() -> None:
            self._prompt_logprobs.keep(prompts)
            self._pooler.keep(pools)

        if len(inputs.wanted) == 0:
            return None, keep
        (wanted,) = to_device([inputs.wanted], self.device)
        return self._forward.logits(hidden.index_select(0, wanted)), keep

    def prompt_logprobs(self, request_id: str) -> tuple[TokenLogprobs, ...] | None:
        """See `Runner`."""
        return self._prompt_logprobs.take(request_id)

    def pooled(self, request_id: str) -> tuple[float, ...]:
        """See `Runner`."""
        return self._pooler.result(request_id)


def _keep_nothing() -> None:
    """Of steps of answers alone, which end nothing that takes several steps."""
