"""Environment variables that stand for flags, for deployments written for LM-Service. A flag that is given wins.

Read by `epd.cli`, never deeper. `LM_SERVICE_{E,P,D,PD}_INSTANCE_ROUTER` take that system's names of policies or ours.
"""

from __future__ import annotations

from collections.abc import Mapping

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


def unused_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that are set and mean nothing yet, with the reason, for the log."""
    return [
        f"{variable} is ignored: prefill and decode run in one worker, see LM_SERVICE_PD_INSTANCE_ROUTER"
        for variable in _UNUSED_ROUTERS
        if environment.get(variable)
    ]
