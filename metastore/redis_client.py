"""The address of the configuration → a client of redis-py, with the few calls that the store needs.

Timeouts are short and retries few: what fails is tried again by those who call the store.
"""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from metastore.config import MetastoreConfig

_DEFAULT_PORTS = {"sentinel": 26379, "cluster": 6379}


class RedisClient(Protocol):
    """What the store asks of redis-py, whichever way the server is reached."""

    expired_channel: str | None
    """Where the server tells of expired keys, should that be switched on; None: in several places."""

    async def eval(self, script: str, key: str, *arguments: str | bytes | int) -> Any:
        """Run a script that touches one key, or several of one hash tag."""

    async def read_all(self, pattern: str, count: int) -> dict[str, bytes]:
        """Key → value of all keys that match; `count` keys are looked at in one step."""

    async def pubsub(self) -> Any:
        """A subscription of redis-py, on a connection of its own."""

    async def close(self) -> None:
        """Drop all connections."""


def connect(config: MetastoreConfig) -> RedisClient:
    """A client, not connected yet.

    Raises:
        ValueError: the address is none.
    """
    scheme, _, rest = config.address.partition("://")
    transport, _, kind = scheme.partition("+")
    if transport not in ("redis", "rediss", "unix") or not rest or kind not in ("", "sentinel", "cluster"):
        raise ValueError("want redis://host:port/db, rediss://…, unix:///path, redis+sentinel://… or redis+cluster://…")
    kind = kind or config.service_type or "standalone"
    if config.service_type not in (None, kind):
        raise ValueError(f"metastore_service_type is {config.service_type!r}, the address says {kind!r}")
    settings = _settings(config, is_tls=config.ssl or transport == "rediss")
    if kind == "standalone":
        return _Single(_standalone(transport, rest, settings))
    if transport == "unix":
        raise ValueError(f"a {kind} has no Unix socket")
    servers = _Servers(rest, _DEFAULT_PORTS[kind])
    return _behind_sentinels(servers, settings) if kind == "sentinel" else _cluster(servers, settings)


def _settings(config: MetastoreConfig, *, is_tls: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "socket_timeout": config.socket_timeout,
        "socket_connect_timeout": config.socket_timeout,
        # Once more, at once: the pool may hold a connection that the server has closed meanwhile.
        "retry": Retry(NoBackoff(), 1),
        "protocol": 2,
    }
    if is_tls:
        settings |= {
            "ssl": True,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_ca_certs": config.ssl_cafile,
            "ssl_certfile": config.ssl_certfile,
            "ssl_keyfile": config.ssl_keyfile,
        }
    return settings


def _standalone(transport: str, rest: str, settings: dict[str, Any]) -> Redis:
    is_tls = settings.pop("ssl", False)
    if transport == "unix" and is_tls:
        raise ValueError("a Unix socket has no TLS")
    if transport != "unix":
        transport = "rediss" if is_tls else "redis"
        _check_port_and_db(rest)
    return Redis.from_url(f"{transport}://{rest}", **settings)


def _check_port_and_db(rest: str) -> None:
    parts = urlsplit(f"//{rest}")
    if not parts.hostname or parts.port == 0:  # `port` raises ValueError on what is none
        raise ValueError("want a host and, behind a colon, a port")
    if not (parts.path.strip("/") or "0").isdecimal():
        raise ValueError("what follows the port must be the number of a database")


class _Servers:
    """`[user:password@]host[:port],…[/path]`."""

    def __init__(self, rest: str, default_port: int) -> None:
        login, _, rest = rest.rpartition("@")
        hosts, _, path = rest.partition("/")
        user, _, password = login.partition(":")
        self.login = {"username": unquote(user) or None, "password": unquote(password) or None}
        self.path = [part for part in path.split("/") if part]
        parts = [urlsplit(f"//{host}") for host in hosts.split(",")]
        if not all(part.hostname for part in parts):
            raise ValueError("want host:port,host:port")
        self.hosts = [(str(part.hostname), part.port or default_port) for part in parts]


def _behind_sentinels(servers: _Servers, settings: dict[str, Any]) -> RedisClient:
    if not 1 <= len(servers.path) <= 2 or not (servers.path[1:] or ["0"])[0].isdecimal():
        raise ValueError("behind the sentinels want the name they know the server by: …/NAME or …/NAME/DB")
    make_sentinel: Any = Sentinel  # redis-py has no types for it
    sentinel = make_sentinel(servers.hosts, sentinel_kwargs=settings, **settings)
    client: Redis = sentinel.master_for(servers.path[0], db=int((servers.path[1:] or ["0"])[0]), **servers.login)
    return _Single(client, sentinel)


def _cluster(servers: _Servers, settings: dict[str, Any]) -> RedisClient:
    if servers.path not in ([], ["0"]):
        raise ValueError("a Redis Cluster has database 0 only")
    return _Cluster([ClusterNode(*host) for host in servers.hosts], servers.login | settings)


class _Single:
    """One server at a time. `sentinels`: those who say which, with connections of their own."""

    def __init__(self, client: Redis, sentinels: Any = None) -> None:
        self._client: Any = client
        self._sentinels = sentinels
        database = client.connection_pool.connection_kwargs.get("db") or 0
        self.expired_channel: str | None = f"__keyevent@{database}__:expired"

    async def eval(self, script: str, key: str, *arguments: str | bytes | int) -> Any:
        return await self._client.eval(script, 1, key, *arguments)

    async def read_all(self, pattern: str, count: int) -> dict[str, bytes]:
        keys = [key async for key in self._client.scan_iter(match=pattern, count=count)]
        return _pair(keys, await self._client.mget(keys) if keys else [])

    async def pubsub(self) -> Any:
        return self._client.pubsub()

    async def close(self) -> None:
        await self._client.aclose()
        if self._sentinels is not None:
            await self._sentinels.aclose()


class _Cluster:
    """Keys are spread over several servers; a message on a channel reaches all of them."""

    def __init__(self, nodes: list[ClusterNode], settings: dict[str, Any]) -> None:
        self.expired_channel: str | None = None
        self._nodes, self._settings = nodes, settings
        self._client_: RedisCluster | None = None

    @property
    def _client(self) -> Any:
        if self._client_ is None:  # needs a running event loop
            self._client_ = RedisCluster(startup_nodes=self._nodes, **self._settings)
        return self._client_

    async def eval(self, script: str, key: str, *arguments: str | bytes | int) -> Any:
        return await self._client.eval(script, 1, key, *arguments)

    async def read_all(self, pattern: str, count: int) -> dict[str, bytes]:
        keys = [key async for key in self._client.scan_iter(match=pattern, count=count)]
        return _pair(keys, await self._client.mget_nonatomic(keys) if keys else [])

    async def pubsub(self) -> Any:
        await self._client.initialize()  # a subscription does not ask by itself which servers there are
        return self._client.pubsub()

    async def close(self) -> None:
        if self._client_ is not None:
            await self._client_.aclose()


def _pair(keys: list[Any], values: list[Any]) -> dict[str, bytes]:
    """Values that are still there; keys as text."""
    return {
        key.decode(errors="replace"): value for key, value in zip(keys, values, strict=True) if isinstance(value, bytes)
    }
