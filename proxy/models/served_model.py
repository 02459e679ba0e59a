"""One model as request handlers see it: its text side, its workers, its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

from epd.config import ProxyConfig
from epd.errors import ContextLengthExceeded, InvalidRequest
from epd.grammar_check import validate
from epd.tasks import check_task
from epd.types import Grammar, Pooling, WorkerRole, WorkerTask
from proxy.cluster.worker_connection import WorkerConnection
from proxy.cluster.worker_pool import WorkerPool
from proxy.dispatch.dispatcher import Dispatcher
from proxy.media.loader import ImageSource, LoadedImage, MediaLoader
from proxy.models.catalog import ModelRef
from proxy.models.checkpoint import Checkpoint
from proxy.text.chat_template import Ending, Prompt, Tool
from proxy.text.cutting import Cut
from proxy.text.user_text import Message
from proxy.tools.families import Family, family_of

T = TypeVar("T")

_LARGE_TEXT = 20_000
"""Characters from which encoding leaves the event loop: about 10 ms."""


@dataclass(frozen=True)
class Shared:
    """What all models of a process share."""

    config: ProxyConfig
    pool: WorkerPool
    dispatcher: Dispatcher
    media: MediaLoader
    threads: Executor


class ServedModel:
    """A checkpoint under one of its names. Made for each request, at no cost.

    Args:
        ref: fingerprint and name.
        checkpoint: its text side.
        shared: of the process.
    """

    def __init__(self, ref: ModelRef, checkpoint: Checkpoint, shared: Shared) -> None:
        self.ref = ref
        self.name = ref.name
        self.config = shared.config
        self.dispatcher = shared.dispatcher
        self.tokenizer = checkpoint.tokenizer
        self.token_texts = checkpoint.token_texts
        self.template = checkpoint.template
        self.next_turn = checkpoint.next_turn
        self.bos_token_id = checkpoint.bos_token_id
        self.model_config = checkpoint.model_config
        self.pooling_config = checkpoint.pooling_config
        self.image = checkpoint.image
        self.image_token_id = checkpoint.image_token_id
        self.image_tokens = checkpoint.image_tokens
        self.sampling_defaults = checkpoint.sampling_defaults
        self._pool = shared.pool
        self._media = shared.media
        self._threads = shared.threads
        self._max_model_len = shared.config.max_model_len or 0
        """Once it is known: when workers come or go, others of this class are made."""

    # -- workers -----------------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Context in tokens: configured, or the smallest that a worker has; 0 while nothing is known."""
        if not self._max_model_len:
            known = [one.info.max_model_len for one in self._pool.up(WorkerRole.PREFILL_DECODE, self.ref) if one.info]
            self._max_model_len = min((length for length in known if length), default=0)
        return self._max_model_len

    @property
    def missing_roles(self) -> list[WorkerRole]:
        """Roles that the model needs and nobody plays."""
        return self.missing_roles_without(())

    def missing_roles_without(self, absent: Collection[WorkerConnection]) -> list[WorkerRole]:
        """Roles that the model needs and nobody but `absent` plays."""
        needed = [WorkerRole.PREFILL_DECODE]
        if self.image_token_id is not None:
            needed.insert(0, WorkerRole.ENCODER)
        return [role for role in needed if all(one in absent for one in self._pool.ready(role, self.ref))]

    @property
    def task(self) -> WorkerTask | None:
        """What the prefill-decode workers are for, which is the same for all; None while there is none."""
        return next((one.info.task for one in self._decoders() if one.info), None)

    def require(self, *, images: bool = False, pooling: Pooling | None = None) -> None:
        """Check early that somebody could do the work.

        Args:
            images: there are some.
            pooling: what is asked for in place of tokens.

        Raises:
            NoWorker: a role that the request needs has no live worker.
            InvalidRequest: the prefill-decode workers were not started for such requests.
        """
        for worker in self.dispatcher.require(self.ref, images=images):
            if worker.info is not None:
                check_task(worker.info.task, pooling)

    def _decoders(self) -> list[WorkerConnection]:
        return self._pool.ready(WorkerRole.PREFILL_DECODE, self.ref)

    # -- limits ------------------------------------------------------------------------------------------------------

    def check_context(self, prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse early what can't fit. Pictures count one token here; the worker checks the expanded prompt.

        Args:
            prompt_tokens: of the prompt.
            max_tokens: that must fit behind it; None: at least one.

        Raises:
            ContextLengthExceeded: it does not fit.
        """
        limit = self._max_model_len or self.max_model_len
        if limit and prompt_tokens + (1 if max_tokens is None else max_tokens) > limit:
            raise ContextLengthExceeded.of(limit=limit, prompt=prompt_tokens, completion=max_tokens)

    async def check_grammar(self, field: str, grammar: Grammar) -> None:
        """Check that workers can follow a grammar, which may take a while: not on the event loop.

        Raises:
            InvalidRequest: they can't; it names `field` and the reason.
        """
        check = partial(validate, grammar, param=field)
        await asyncio.get_running_loop().run_in_executor(self._threads, check)

    @cached_property
    def tool_family(self) -> Family | None:
        """What the model writes to call a tool; None: nobody knows."""
        if self.template is None:
            return None
        return family_of(self.config.tool_call_parser, self.template.tool_source, has_tools=self.template.takes_tools)

    @cached_property
    def has_short_call_ids(self) -> bool:
        """Whether the chat template takes ids of tool calls of nine letters and digits alone."""
        family = self.tool_family
        return family is not None and family.has_short_ids

    # -- media and text ----------------------------------------------------------------------------------------------

    async def load_images(self, sources: Sequence[ImageSource]) -> list[LoadedImage]:
        """All pictures of a request; see `MediaLoader.load` for what it raises."""
        return await self._media.load(sources, self.ref.fingerprint)

    async def encode_next(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """What follows an answer, up to the beginning of the next one; see `NextTurn.encode`.

        Raises:
            InvalidRequest: see there; or the model has no chat template.
        """
        next_turn = self.next_turn
        if next_turn is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.")
        size = _size(messages)
        self._check_size(size)
        return await self.off_loop_if_large(size, lambda: next_turn.encode(messages))

    async def encode_chat(
        self,
        messages: Sequence[Message],
        variables: dict[str, Any],
        ending: Ending = Ending.HEADER,
        tools: Sequence[Tool] = (),
    ) -> Prompt:
        """The prompt of a conversation. Arguments are those of `ChatTemplate.render`.

        Raises:
            InvalidRequest: see `ChatTemplate.encode`; or the model has no chat template.
        """
        template = self.template
        if template is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.")
        size = _size(messages) + (_size(tools) if tools else 0)
        self._check_size(size)
        return await self.off_loop_if_large(
            size, lambda: template.encode(messages, tools=tools, ending=ending, **variables)
        )

    async def encode_text(
        self, text: str, *, among: int = 0, add_special_tokens: bool = True, cut: Cut | None = None
    ) -> list[int]:
        """Tokens of a raw prompt, with what the tokenizer puts around each text unless `add_special_tokens` is off.

        Args:
            text: of the prompt.
            among: characters of all texts of the request: many small ones take as long as a large one.
            add_special_tokens: see above.
            cut: what to do with a prompt that is too long; None: nothing, it may be refused.
        """
        if cut is not None:
            text = cut.of_text(text, self.tokenizer.longest_token)
        self._check_size(len(text))
        token_ids = await self.off_loop_if_large(
            max(len(text), among), lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )
        before, behind = map(len, self.tokenizer.around) if add_special_tokens else (0, 0)
        return token_ids if cut is None else cut.of_tokens(token_ids, before, behind)

    async def encode_pair(self, first: str, second: str, *, among: int = 0) -> list[int]:
        """Tokens of two texts in one sequence, joined as the tokenizer joins pairs. `among`: as for `encode_text`."""
        size = len(first) + len(second)
        self._check_size(size)
        return await self.off_loop_if_large(max(size, among), lambda: self.tokenizer.encode_pair(first, second))

    def check_size(self, value: Any) -> None:
        """Refuse JSON that can't fit into a prompt, before work is put into it.

        Raises:
            ContextLengthExceeded: it can't, however it is tokenised.
        """
        self._check_size(_size(value))

    def _check_size(self, characters: int) -> None:
        """Refuse what can't fit, however it is tokenised, before work is put into it."""
        self.check_context(characters // self.tokenizer.longest_token, None)

    async def off_loop_if_large(self, size: int, work: Callable[[], T]) -> T:
        """What `work` returns, computed on another thread when `size` characters of text would stop all streams."""
        if size < _LARGE_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _size(value: Any) -> int:
    """Characters that JSON has in a prompt, at least: of what is no text, a digit and what follows it."""
    size, items = 0, value
    if isinstance(value, dict):
        size, items = sum(map(len, value)), value.values()
    elif not isinstance(value, list | tuple):
        return len(value) if isinstance(value, str) else 2
    for item in items:  # most are texts: a call for each would take longer than the rest
        size += len(item) if isinstance(item, str) else _size(item)
    return size
