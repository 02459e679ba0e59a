"""Sessions in Redis, where every proxy finds them.

    <prefix>:session:{<owner>}:<name>    hash: state, and of the turn that has it: holder, until (ms), stop
    <prefix>:sessions:{<owner>}          sorted set: names by the time of their last turn

Each call is one script, so that nothing comes between its reading and its writing. What is in braces puts all keys of
an owner on one server of a Redis Cluster. The server's own clock says when a lease is over.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from metastore.sessions import Hold, SessionIsBusy, SessionKey, SessionLimits, SessionStore

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held = redis.call('HMGET', KEYS[1], 'holder', 'until', 'state', 'stop', 'done')
local is_held = held[1] and tonumber(held[2]) > now
"""
# ARGV: holder, lease in ms, time to live in ms.
# What the first turn of a session has taken stays its own behind the end of the lease, until somebody else takes it.
_TOUCH = """
local keep = tonumber(held[3] and ARGV[2] or ARGV[3])
if redis.call('PTTL', KEYS[1]) < keep then redis.call('PEXPIRE', KEYS[1], keep) end
"""
_BEGIN = (
    _NOW
    + """
if is_held and held[1] ~= ARGV[1] then return 'busy' end
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', now + ARGV[2])
redis.call('HDEL', KEYS[1], 'stop', 'done')
"""
    + _TOUCH
    + "return {held[3]}"
)
_RENEW = (
    _NOW
    + """
if held[1] ~= ARGV[1] then return 'lost' end
redis.call('HSET', KEYS[1], 'until', now + ARGV[2])
"""
    + _TOUCH
    + "return held[4] and 'stop' or 'held'"
)
# ARGV: holder, state, time to live in ms, name, index, most sessions, what their keys begin with.
# `done` tells a commit that is sent twice, because its answer was lost, that it was done.
_COMMIT = (
    _NOW
    + """
if held[1] ~= ARGV[1] then return held[5] == ARGV[1] and 1 or 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[2], 'done', ARGV[1])
redis.call('HDEL', KEYS[1], 'holder', 'until', 'stop')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('ZADD', ARGV[5], now, ARGV[4])
redis.call('ZREMRANGEBYSCORE', ARGV[5], '-inf', now - ARGV[3])
redis.call('PEXPIRE', ARGV[5], ARGV[3])
local excess = redis.call('ZCARD', ARGV[5]) - ARGV[6]
local first = 0
while excess > 0 do
  local name = redis.call('ZRANGE', ARGV[5], first, first)[1]
  if not name then break end
  local until_ms = redis.call('HGET', ARGV[7] .. name, 'until')
  if until_ms and tonumber(until_ms) > now then
    first = first + 1
  else
    redis.call('DEL', ARGV[7] .. name)
    redis.call('ZREM', ARGV[5], name)
    excess = excess - 1
  end
end
return 1
"""
)
# ARGV: holder, name, index
_END = (
    _NOW
    + """
if held[1] and held[1] ~= ARGV[1] or not held[1] and held[3] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('ZREM', ARGV[3], ARGV[2])
return 1
"""
)
# ARGV: holder
_RELEASE = (
    _NOW
    + """
if held[1] ~= ARGV[1] then return end
if held[3] then redis.call('HDEL', KEYS[1], 'holder', 'until', 'stop') else redis.call('DEL', KEYS[1]) end
"""
)
_STOP = (
    _NOW
    + """
if not is_held then return 0 end
redis.call('HSET', KEYS[1], 'stop', '1')
return 1
"""
)
# ARGV: name, index
_FORGET = (
    _NOW
    + """
if is_held then return 'busy' end
redis.call('DEL', KEYS[1])
redis.call('ZREM', ARGV[2], ARGV[1])
return held[3] and 'gone' or 'none'
"""
)
_HOLDS = {b"held": Hold.HELD, b"stop": Hold.STOP, b"lost": Hold.LOST}


class RunScript(Protocol):
    """Runs a script on the server, in bounded time. Raises `MetastoreError`."""

    def __call__(self, script: str, key: str, *arguments: str | bytes | int) -> Awaitable[Any]:
        """What the script returns."""


class RedisSessionStore(SessionStore):
    """See the module.

    Args:
        run: on the server.
        prefix: of keys.
        limits: `max_bytes` does not count here: the server has limits of its own.
    """

    def __init__(self, run: RunScript, prefix: str, limits: SessionLimits) -> None:
        self._run = run
        self._prefix = prefix
        self._ttl_ms = round(limits.ttl_s * 1000)
        self._max_sessions = limits.max_sessions

    async def begin(self, key: SessionKey, holder: str, lease_s: float) -> bytes | None:
        """Implements `SessionStore`."""
        found = await self._run(_BEGIN, self._key(key), holder, *self._spans_ms(lease_s))
        if found == b"busy":
            raise SessionIsBusy
        state = found[0] if found else None
        return state if isinstance(state, bytes) else None

    async def renew(self, key: SessionKey, holder: str, lease_s: float) -> Hold:
        """Implements `SessionStore`."""
        return _HOLDS[await self._run(_RENEW, self._key(key), holder, *self._spans_ms(lease_s))]

    async def commit(self, key: SessionKey, holder: str, state: bytes | None) -> bool:
        """Implements `SessionStore`."""
        index = self._index(key)
        if state is None:
            return bool(await self._run(_END, self._key(key), holder, key.name, index))
        start = self._key(SessionKey(key.owner, ""))
        arguments = (holder, state, self._ttl_ms, key.name, index, self._max_sessions, start)
        return bool(await self._run(_COMMIT, self._key(key), *arguments))

    async def release(self, key: SessionKey, holder: str) -> None:
        """Implements `SessionStore`."""
        await self._run(_RELEASE, self._key(key), holder)

    async def stop(self, key: SessionKey) -> bool:
        """Implements `SessionStore`."""
        return bool(await self._run(_STOP, self._key(key)))

    async def forget(self, key: SessionKey) -> bool:
        """Implements `SessionStore`."""
        found = await self._run(_FORGET, self._key(key), key.name, self._index(key))
        if found == b"busy":
            raise SessionIsBusy
        return bool(found == b"gone")

    async def close(self) -> None:
        """Implements `SessionStore`: the connection belongs to the metastore."""

    def _spans_ms(self, lease_s: float) -> tuple[int, int]:
        """Of a lease, and of what a first turn has."""
        lease_ms = round(lease_s * 1000)
        return lease_ms, max(lease_ms, self._ttl_ms)

    def _key(self, key: SessionKey) -> str:
        return f"{self._prefix}:session:{{{key.owner}}}:{key.name}"

    def _index(self, key: SessionKey) -> str:
        return f"{self._prefix}:sessions:{{{key.owner}}}"
