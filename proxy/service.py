"""What all request handlers share: the model's text side, the workers, and the limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import msgspec

from epd.checkpoint import fingerprint, image_placeholder, read_json
from epd.config import ProxyConfig
from epd.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from epd.grammar_check import validate
from epd.tasks import check_task
from epd.transport import endpoints
from epd.types import Grammar, Pooling, WorkerRole, WorkerTask
from metastore.roster import Roster
from proxy.chat_template import ChatTemplate, Message, Prompt
from proxy.dispatcher import Dispatcher
from proxy.media import MediaLimits, MediaLoader
from proxy.media_http import HttpFetcher, parse_networks
from proxy.routing import make_policy
from proxy.token_text import TokenTexts
from proxy.tokenizer import Tokenizer
from proxy.worker_connection import Identity, WorkerConnection
from proxy.worker_pool import WorkerPool

T = TypeVar("T")

_LARGE_TEXT = 20_000
"""Characters from which encoding leaves the event loop: about 10 ms."""


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What the checkpoint's generation_config.json asks for when a request says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: dict[str, Any]) -> SamplingDefaults:
        """Read them; a checkpoint that says `do_sample: false` is greedy by default."""
        if config.get("do_sample") is False:
            config = config | {"temperature": 0.0, "top_p": None, "top_k": None}
        known = {name: config[name] for name in cls.__struct_fields__ if config.get(name) is not None}
        return msgspec.convert(known, cls, strict=False)


class Service:
    """Made once per process; holds connections from `start` to `close`.

    Args:
        config: of the proxy.
        roster: who the workers are; default: a new one, filled from the address lists.

    Raises:
        ConfigError: a file of the checkpoint or a flag is wrong.
    """

    def __init__(self, config: ProxyConfig, roster: Roster | None = None) -> None:
        self.config = config
        self.created = int(time.time())
        self.fingerprint = fingerprint(config.model)
        self.tokenizer = Tokenizer(config.model / "tokenizer.json")
        self.token_texts = TokenTexts(self.tokenizer.backend)
        self.template = ChatTemplate.from_checkpoint(config.model, self.tokenizer)
        self.model_config = read_json(config.model, "config.json")
        self.pooling_config = read_json(config.model, "1_Pooling/config.json")
        placeholder = image_placeholder(config.model)
        self.image_token_id = None if placeholder is None else placeholder.token_id
        self.sampling_defaults = SamplingDefaults.of(read_json(config.model, "generation_config.json"))
        self.media = MediaLoader(
            self.fingerprint,
            MediaLimits(
                max_image_bytes=config.max_image_bytes,
                max_image_pixels=config.max_image_pixels,
                max_images=config.max_images_per_request,
                max_total_bytes=max(config.max_body_bytes, config.max_image_bytes),
                max_total_pixels=4 * config.max_image_pixels,
            ),
            HttpFetcher(
                max_bytes=config.max_image_bytes,
                timeout_s=config.media_timeout,
                allowed=parse_networks(config.allowed_private_media),
            ),
            config.allowed_local_media_path,
        )
        self.pool = WorkerPool(
            _fill(roster or Roster(), config),
            Identity(f"proxy-{config.port}", self.fingerprint),
            {
                WorkerRole.ENCODER: make_policy(config.encoder_router),
                WorkerRole.PREFILL_DECODE: make_policy(config.pd_router),
            },
            config.proxy_addr,
        )
        self.dispatcher = Dispatcher(self.pool, config.max_concurrent_requests)
        self._started = False
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    async def start(self) -> None:
        """Connect to the workers. A second call does nothing.

        Raises:
            ConfigError: the announcement address can't be bound.
        """
        if not self._started:
            self._started = True
            await self.pool.start()

    async def close(self) -> None:
        """Drop connections and threads."""
        await self.pool.close()
        self.media.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- the model -------------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Context in tokens: configured, or the smallest that a worker has; 0 while nothing is known."""
        if self.config.max_model_len is not None:
            return self.config.max_model_len
        known = [one.info.max_model_len for one in self.pool.connections(WorkerRole.PREFILL_DECODE) if one.info]
        return min((length for length in known if length), default=0)

    def require_model(self, name: str | None) -> None:
        """Check the `model` of a request.

        Raises:
            ModelNotFound: another one is served.
        """
        if name is not None and name != self.config.model_name:
            raise ModelNotFound(
                f"The model {name[:200]!r} does not exist; this server serves {self.config.model_name!r}.",
                param="model",
            )

    @property
    def task(self) -> WorkerTask | None:
        """What the prefill-decode workers are for, which is the same for all; None while there is none."""
        return next((one.info.task for one in self._decoders() if one.info), None)

    def require_task(self, pooling: Pooling | None) -> None:
        """Check that the prefill-decode workers were started for such requests.

        Raises:
            InvalidRequest: one was not.
        """
        for worker in self._decoders():
            if worker.info is not None:
                check_task(worker.info.task, pooling)

    def _decoders(self) -> list[WorkerConnection]:
        return self.pool.ready(WorkerRole.PREFILL_DECODE)

    def check_context(self, prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse early what can't fit. Pictures count one token here; the worker checks the expanded prompt.

        Args:
            prompt_tokens: of the prompt.
            max_tokens: that must fit behind it; None: at least one.

        Raises:
            ContextLengthExceeded: it does not fit.
        """
        limit = self.max_model_len
        if limit and prompt_tokens + (1 if max_tokens is None else max_tokens) > limit:
            raise ContextLengthExceeded.of(limit=limit, prompt=prompt_tokens, completion=max_tokens)

    async def check_grammar(self, field: str, grammar: Grammar) -> None:
        """Check that workers can follow a grammar, which may take a while: not on the event loop.

        Raises:
            InvalidRequest: they can't; it names `field` and the reason.
        """
        check = partial(validate, grammar, param=field)
        await asyncio.get_running_loop().run_in_executor(self._threads, check)

    # -- text --------------------------------------------------------------------------------------------------------

    async def encode_chat(self, messages: Sequence[Message], variables: dict[str, Any]) -> Prompt:
        """The prompt of a conversation.

        Raises:
            InvalidRequest: see `ChatTemplate.encode`; or the model has no chat template.
        """
        template = self.template
        if template is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.")
        size = _size(messages)
        self._check_size(size)
        return await self.off_loop_if_large(size, lambda: template.encode(messages, **variables))

    async def encode_text(self, text: str, *, among: int = 0, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a raw prompt, with what the tokenizer puts around each text unless `add_special_tokens` is off.

        Args:
            text: of the prompt.
            among: characters of all texts of the request: many small ones take as long as a large one.
            add_special_tokens: see above.
        """
        self._check_size(len(text))
        return await self.off_loop_if_large(
            max(len(text), among), lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def encode_pair(self, first: str, second: str, *, among: int = 0) -> list[int]:
        """Tokens of two texts in one sequence, joined as the tokenizer joins pairs. `among`: as for `encode_text`."""
        size = len(first) + len(second)
        self._check_size(size)
        return await self.off_loop_if_large(max(size, among), lambda: self.tokenizer.encode_pair(first, second))

    def _check_size(self, characters: int) -> None:
        """Refuse what can't fit, however it is tokenised, before work is put into it."""
        self.check_context(characters // self.tokenizer.longest_token, None)

    async def off_loop_if_large(self, size: int, work: Callable[[], T]) -> T:
        """What `work` returns, computed on another thread when `size` characters of text would stop all streams."""
        if size < _LARGE_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _fill(roster: Roster, config: ProxyConfig) -> Roster:
    for address in endpoints(config.encode_addr_list):
        roster.add_permanent(WorkerRole.ENCODER, address)
    for address in endpoints(config.pd_addr_list):
        roster.add_permanent(WorkerRole.PREFILL_DECODE, address)
    return roster
