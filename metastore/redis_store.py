"""Registrations in Redis: alone, behind sentinels, or a Redis Cluster.

    <prefix>:member:<role>:<address>    one JSON record each, with its own time to live
    <prefix>:events                     channel: each put and each delete, as it happens

Two scripts compare tokens before they write, so that check, write and notice are one step for everybody. Where the
server publishes expired keys (`notify-keyspace-events Ex`), the end of a lease is an event too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Self, TypeVar

import msgspec
from redis.exceptions import NoPermissionError, RedisError

from epd.errors import ConfigError
from metastore.base import Event, Metastore, MetastoreError, Record
from metastore.config import FLAG, MetastoreConfig
from metastore.redis_client import RedisClient, connect
from metastore.redis_sessions import RedisSessionStore
from metastore.sessions import SessionLimits, SessionStore

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCAN_COUNT = 1000
_DEADLINE_TIMEOUTS = 3
"""A call that has to find a new primary waits for several answers, each up to the socket timeout."""

_HOLDER = """
local holder = 0
local held = redis.call('GET', KEYS[1])
if held then
  local is_json, record = pcall(cjson.decode, held)
  if is_json and type(record) == 'table' then holder = tonumber(record['token']) or 0 end
end
if holder > tonumber(ARGV[1]) then return 0 end
"""
_PUT = _HOLDER + "redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])\nredis.call('PUBLISH', ARGV[2], ARGV[3])\nreturn 1"
_DELETE = _HOLDER + "redis.call('DEL', KEYS[1])\nredis.call('PUBLISH', ARGV[2], ARGV[3])\nreturn 1"
_TIME = "return redis.call('TIME')"


class _Notice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What goes over the channel."""

    name: str
    token: int
    record: Record | None = None


class RedisMetastoreClient(Metastore):
    """See the module.

    Args:
        client: of redis-py.
        config: for the prefix and the timeout.
    """

    def __init__(self, client: RedisClient, config: MetastoreConfig) -> None:
        self._client = client
        self._timeout_s = config.socket_timeout
        self._prefix = config.key_prefix
        self._key_start = f"{config.key_prefix}:member:"
        self._events = f"{config.key_prefix}:events"
        self._expired = client.expired_channel
        self._unreadable: set[str] = set()

    @classmethod
    def from_config(cls, config: MetastoreConfig) -> Self:
        """Implements `Metastore`."""
        try:
            return cls(connect(config), config)
        except (RedisError, ValueError, TypeError) as error:
            raise ConfigError(f"{FLAG}: metastore_address {config.safe_address}: {error}") from None

    async def new_token(self) -> int:
        """Implements `Metastore`: the server's clock in microseconds."""
        seconds, microseconds = await self._bounded(self._client.eval(_TIME, self._key_start))
        return int(seconds) * 1_000_000 + int(microseconds)

    async def put(self, record: Record, ttl_s: float) -> bool:
        """Implements `Metastore`."""
        notice = _Notice(name=record.name, token=record.token, record=record)
        return await self._write(_PUT, record, notice, record.encode(), round(ttl_s * 1000))

    async def delete(self, record: Record) -> bool:
        """Implements `Metastore`."""
        return await self._write(_DELETE, record, _Notice(name=record.name, token=record.token))

    async def _write(self, script: str, record: Record, notice: _Notice, *more: bytes | int) -> bool:
        arguments = (record.token, self._events, msgspec.json.encode(notice), *more)
        return bool(await self._bounded(self._client.eval(script, self._key_start + record.name, *arguments)))

    async def scan(self) -> list[Record]:
        """Implements `Metastore`."""
        values = await self._bounded(self._client.read_all(_escape(self._key_start) + "*", _SCAN_COUNT))
        return [record for key, value in values.items() if (record := self._decode(key, value)) is not None]

    def sessions(self, limits: SessionLimits) -> SessionStore:
        """Implements `Metastore`."""
        return RedisSessionStore(self._run, self._prefix, limits)

    async def _run(self, script: str, key: str, *arguments: str | bytes | int) -> Any:
        return await self._bounded(self._client.eval(script, key, *arguments))

    async def _bounded(self, call: Awaitable[T]) -> T:
        """What a call of redis-py gives, in bounded time, with its errors as ours."""
        with _telling():
            async with asyncio.timeout(_DEADLINE_TIMEOUTS * self._timeout_s):
                result = await call
        _heed_cancellation()
        return result

    def _decode(self, key: str, value: bytes) -> Record | None:
        try:
            record = Record.decode(value)
        except msgspec.MsgspecError as error:
            self._complain(key, error)
            return None
        if self._key_start + record.name != key:
            self._complain(key, ValueError(f"it holds the record of {record.name}"))
            return None
        return record

    def _complain(self, key: str, error: Exception) -> None:
        if key not in self._unreadable and len(self._unreadable) < _SCAN_COUNT:
            self._unreadable.add(key)
            log.warning("metastore: %s is ignored: %s", key, error)

    async def close(self) -> None:
        """Implements `Metastore`."""
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._client.close()

    # -- events ----------------------------------------------------------------------------------------------------

    async def watch(self, subscribed: Callable[[], None], changed: Callable[[Event], None]) -> None:
        """Implements `Metastore`."""
        with _telling():
            try:
                await self._follow(subscribed, changed)
            except NoPermissionError:
                if self._expired is None:
                    raise
                log.debug("metastore: this user may not listen to %s", self._expired)
                self._expired = None
                await self._follow(subscribed, changed)

    async def _follow(self, subscribed: Callable[[], None], changed: Callable[[Event], None]) -> None:
        channels = [self._events] if self._expired is None else [self._events, self._expired]
        async with await self._bounded(self._client.pubsub()) as pubsub:
            await self._bounded(pubsub.subscribe(*channels))
            is_asked = False
            while True:
                message = await pubsub.get_message(timeout=self._timeout_s)
                _heed_cancellation()
                if message is not None:
                    is_asked = False
                    self._take(message, subscribed, changed)
                elif is_asked:  # the connection may be cut without a sign
                    raise TimeoutError(f"no answer for {self._timeout_s:g} s")
                else:
                    is_asked = True
                    async with asyncio.timeout(self._timeout_s):
                        await pubsub.ping()

    def _take(self, message: dict[str, Any], subscribed: Callable[[], None], changed: Callable[[Event], None]) -> None:
        channel, data = _text(message.get("channel")), message.get("data")
        if message["type"] == "subscribe" and channel == self._events:  # or again, after redis-py connected again
            subscribed()
        elif message["type"] != "message" or not isinstance(data, bytes):
            return
        elif channel == self._expired:
            key = _text(data)
            if key.startswith(self._key_start):
                changed(Event(key.removeprefix(self._key_start)))
        else:
            try:
                notice = msgspec.json.decode(data, type=_Notice)
            except msgspec.MsgspecError as error:
                self._complain(channel, error)
            else:
                changed(Event(notice.name, notice.record, notice.token))


def _heed_cancellation() -> None:
    """redis-py swallows a cancellation that comes while it looks whether a connection of its pool is still usable
    (seen with 8.1): without this, a task that was cancelled then goes on for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise MetastoreError(str(error) or f"no answer ({type(error).__name__})") from error


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _escape(pattern: str) -> str:
    """For `MATCH`: a prefix may hold what is special there."""
    return re.sub(r"([*?\[\]\\])", r"\\\1", pattern)
