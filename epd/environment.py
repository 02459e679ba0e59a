"""Environment variables that stand for flags, for deployments written for LM-Service. A flag that is given wins.

Read by `epd.cli`, never deeper. `LM_SERVICE_{E,P,D,PD}_INSTANCE_ROUTER` take that system's names of policies or ours.

The metastore:

| variable | stands for |
|---|---|
| `LM_SERVICE_METASTORE_CLIENT_CONFIG` | `--metastore-client-config` |
| `LM_SERVICE_METASTORE_CLIENT` | its key `metastore_client` |
| `LM_SERVICE_REDIS_ADDRESS` | its key `metastore_address`, as a URL or as host:port |
| `LM_SERVICE_REDIS_DB`, `LM_SERVICE_REDIS_PASSWORD` | database and password, where the address has none |
| `LM_SERVICE_REDIS_KEY_PREFIX` | its key `metastore_key_prefix` |
| `LM_SERVICE_SOCKET_TIMEOUT` | its key `metastore_socket_timeout` |

Ours: `EPD_API_KEY` for `--api-key`, keys separated by commas, and `EPD_ADMIN_KEY` for `--admin-key`. They keep keys out
of the lists of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from epd.access_options import API_KEY_VARIABLE, check_keys
from epd.config import ROUTERS
from epd.errors import ConfigError

_ROUTER_FIELDS = {
    "LM_SERVICE_E_INSTANCE_ROUTER": "encoder_router",
    "LM_SERVICE_PD_INSTANCE_ROUTER": "pd_router",
}
_UNUSED_ROUTERS = ("LM_SERVICE_P_INSTANCE_ROUTER", "LM_SERVICE_D_INSTANCE_ROUTER")
"""There are no separate prefill and decode workers yet."""
_ROUTER_ALIASES = {
    "RandomRouter": "random",
    "RoundRobinRouter": "round_robin",
    "LeastInFlightRouter": "least_loaded",
}


def router_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Fields of `ProxyConfig` that variables set.

    Raises:
        ConfigError: a variable names no policy.
    """
    found = {}
    for variable in (*_ROUTER_FIELDS, *_UNUSED_ROUTERS):
        if value := environment.get(variable):
            policy = _ROUTER_ALIASES.get(value, value)
            if policy not in ROUTERS:
                raise ConfigError(f"{variable}={value}: want one of {', '.join([*_ROUTER_ALIASES, *ROUTERS])}")
            if variable in _ROUTER_FIELDS:
                found[_ROUTER_FIELDS[variable]] = policy
    return found


def api_key_default(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of `EPD_API_KEY`; none if it is empty, as where a compose file passes on what is not set.

    Raises:
        ConfigError: one is malformed, or there is something in it but no key.
    """
    text = environment.get(API_KEY_VARIABLE, "")
    keys = tuple(key for part in text.split(",") if (key := part.strip()))
    if text and not keys:  # none, where some were meant, would let everybody in
        raise ConfigError(f"{API_KEY_VARIABLE}: there is no key in it; unset it to let everybody ask")
    check_keys(keys, API_KEY_VARIABLE)
    return keys


def unused_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that are set and mean nothing yet, with the reason, for the log."""
    return [
        f"{variable} is ignored: prefill and decode run in one worker, see LM_SERVICE_PD_INSTANCE_ROUTER"
        for variable in _UNUSED_ROUTERS
        if environment.get(variable)
    ]


_KEYS = {
    "LM_SERVICE_METASTORE_CLIENT": "metastore_client",
    "LM_SERVICE_REDIS_ADDRESS": "metastore_address",
    "LM_SERVICE_REDIS_KEY_PREFIX": "metastore_key_prefix",
    "LM_SERVICE_SOCKET_TIMEOUT": "metastore_socket_timeout",
}


def metastore_client_config(flag: str | None, environment: Mapping[str, str]) -> str | None:
    """The JSON of `--metastore-client-config`, completed from the environment; None: there is to be no metastore.

    Args:
        flag: its value, None when it was not given.
        environment: of the process.

    Raises:
        ConfigError: a variable makes no sense. What the JSON says is for `MetastoreConfig` to check.
    """
    given = {name: value for name, value in environment.items() if value}
    text = flag if flag is not None else given.get("LM_SERVICE_METASTORE_CLIENT_CONFIG")
    if text is None and "LM_SERVICE_REDIS_ADDRESS" not in given:
        return None  # the other variables describe a store that nobody asked for
    try:
        values = json.loads(text or "{}")
    except ValueError:
        return text
    if not isinstance(values, dict):
        return text
    for variable, key in _KEYS.items():
        if variable in given and values.get(key) is None:
            values[key] = _value(variable, given[variable])
    if isinstance(values.get("metastore_address"), str):
        values["metastore_address"] = _complete(values["metastore_address"], given)
    return json.dumps(values)


def _value(variable: str, text: str) -> Any:
    if variable != "LM_SERVICE_SOCKET_TIMEOUT":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{variable}={text}: want a number of seconds") from None


def _complete(address: str, given: Mapping[str, str]) -> str:
    if "://" not in address:
        address = f"redis://{address}"
    parts = urlsplit(address)
    location, path = parts.netloc, parts.path
    if "LM_SERVICE_REDIS_PASSWORD" in given and "@" not in location:
        location = f":{quote(given['LM_SERVICE_REDIS_PASSWORD'], safe='')}@{location}"
    if "LM_SERVICE_REDIS_DB" in given and parts.scheme in ("redis", "rediss") and path in ("", "/"):
        path = f"/{given['LM_SERVICE_REDIS_DB']}"
    return urlunsplit(parts._replace(netloc=location, path=path))
