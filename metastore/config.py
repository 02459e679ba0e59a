"""What `--metastore-client-config` says: one JSON object, with the keys that lm-service knows.

| key | meaning |
|---|---|
| `metastore_client` | class that talks to the store; default `RedisMetastoreClient` |
| `metastore_client_module_path` | module of that class, when it is none of ours |
| `metastore_address` | `redis://[user:password@]host:port/db`, `rediss://…` for TLS, `unix:///path`; more below |
| `metastore_service_type` | what listens there: `standalone`, `sentinel` or `cluster`; default: by the address |
| `metastore_key_prefix` | heads every key and channel, so that clusters can share a store; default `epd` |
| `metastore_ssl` | true: TLS, as `rediss://` |
| `metastore_ssl_cafile` | who signed the server's certificate; default: the system's authorities |
| `metastore_ssl_certfile`, `metastore_ssl_keyfile` | our own certificate, for servers that ask for one |
| `metastore_socket_timeout` | seconds to wait for the store; default 2 |

Sentinels and clusters: `redis+sentinel://[user:password@]host:port,host:port/NAME[/db]` and
`redis+cluster://[user:password@]host:port,host:port`; with `rediss+…` for TLS.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import msgspec

from epd.errors import ConfigError

FLAG = "--metastore-client-config"
SERVICE_TYPES = ("standalone", "sentinel", "cluster")
_KEY_START = "metastore_"
_SECRET = re.compile(r"(?<=://)[^/]*@")
_FILES = ("ssl_certfile", "ssl_keyfile", "ssl_cafile")


@dataclass(frozen=True, kw_only=True)
class MetastoreConfig:
    """The fields are the JSON keys without `metastore_`; see the table above.

    Raises:
        ConfigError: a value can't work; names the key.
    """

    client: str = "RedisMetastoreClient"
    client_module_path: str | None = None
    address: str = field(default="", repr=False)
    """May hold a password: show `safe_address` instead."""
    service_type: str | None = None
    key_prefix: str = "epd"
    ssl: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_cafile: str | None = None
    socket_timeout: float = 2.0

    def __post_init__(self) -> None:
        if self.service_type not in (None, *SERVICE_TYPES):
            raise _wrong("service_type", f"{self.service_type!r} is none of {', '.join(SERVICE_TYPES)}")
        if not self.key_prefix:
            raise _wrong("key_prefix", "must not be empty")
        if not 0 < self.socket_timeout < math.inf:
            raise _wrong("socket_timeout", f"{self.socket_timeout} s: must be above 0")
        if not self.address and self.client_module_path is None:
            raise _wrong("address", "is missing, such as redis://127.0.0.1:6379/0")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise _wrong("ssl_keyfile", "needs metastore_ssl_certfile too")
        for name in _FILES:
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise _wrong(name, f"{path}: no such file")

    @property
    def safe_address(self) -> str:
        """The address for logs: without user and password."""
        return _SECRET.sub("***@", self.address)

    @property
    def first_server(self) -> str:
        """URL of the first host of the address, without user and password; empty when it is a path."""
        first = self.address.rpartition("@")[2].rpartition("://")[2].split(",")[0]
        return f"redis://{first}" if first[:1] not in ("", "/") else ""

    @classmethod
    def from_json(cls, text: str) -> MetastoreConfig:
        """Read the flag's value. No message repeats it: it may hold a password.

        Raises:
            ConfigError: no JSON object, an unknown key, or a value that can't work.
        """
        try:
            values = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{FLAG}: no valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f'{FLAG}: want a JSON object, such as {{"metastore_address":"redis://127.0.0.1:6379/0"}}')
        known = {_KEY_START + each.name: each.name for each in fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"{FLAG}: unknown key {key!r}; known are {', '.join(known)}")
        return _convert({known[key]: value for key, value in values.items() if value is not None})


def _convert(values: dict[str, object]) -> MetastoreConfig:
    try:
        return msgspec.convert(values, MetastoreConfig)
    except msgspec.ValidationError as error:
        # "Expected `str`, got `int` - at `$.address`"
        raise ConfigError(f"{FLAG}: {str(error).replace('$.', _KEY_START)}") from None


def _wrong(name: str, problem: str) -> ConfigError:
    return ConfigError(f"{FLAG}: {_KEY_START}{name} {problem}")
