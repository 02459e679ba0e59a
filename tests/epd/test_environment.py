"""Variables of the environment that stand for flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from epd import cli
from epd.config import ProxyConfig
from epd.demo import CHECKPOINT_DIR
from epd.environment import router_defaults, unused_variables
from epd.errors import ConfigError
from epd.flags import read_flags


@pytest.fixture
def proxy_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `epd proxy` would run with."""

    def parse(*flags: str) -> ProxyConfig:
        found: list[ProxyConfig] = []

        def note(arguments: argparse.Namespace) -> int:
            found.append(read_flags(ProxyConfig, arguments))
            return 0

        monkeypatch.setattr(cli, "_proxy", note)
        assert cli.main(["proxy", "--model", str(Path(CHECKPOINT_DIR)), *flags]) == 0
        return found[0]

    return parse


def test_routers_of_the_environment_are_defaults_that_flags_override(
    proxy_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_SERVICE_E_INSTANCE_ROUTER", "RoundRobinRouter")
    monkeypatch.setenv("LM_SERVICE_PD_INSTANCE_ROUTER", "power_of_two")
    config = proxy_config()
    assert (config.encoder_router, config.pd_router) == ("round_robin", "power_of_two")
    assert proxy_config("--encoder-router", "random").encoder_router == "random"


def test_an_unknown_router_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LM_SERVICE_PD_INSTANCE_ROUTER", "BestRouter")
    assert cli.main(["proxy", "--model", str(CHECKPOINT_DIR)]) == 2
    assert "LM_SERVICE_PD_INSTANCE_ROUTER=BestRouter" in capsys.readouterr().err


def test_routers_of_roles_that_do_not_exist_yet_are_checked_and_named() -> None:
    variables = {"LM_SERVICE_P_INSTANCE_ROUTER": "LeastInFlightRouter", "LM_SERVICE_D_INSTANCE_ROUTER": ""}
    assert router_defaults(variables) == {}
    assert ["LM_SERVICE_P_INSTANCE_ROUTER" in line for line in unused_variables(variables)] == [True]
    with pytest.raises(ConfigError, match="LM_SERVICE_D_INSTANCE_ROUTER=x"):
        router_defaults({"LM_SERVICE_D_INSTANCE_ROUTER": "x"})


def test_keys_of_the_environment(
    proxy_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("EPD_API_KEY", "EPD_ADMIN_KEY"):
        monkeypatch.setenv(variable, "")  # as a compose file passes on what is not set
    assert (proxy_config().api_key, proxy_config().admin_key) == ((), None)
    monkeypatch.setenv("EPD_API_KEY", " one, two,\n")
    monkeypatch.setenv("EPD_ADMIN_KEY", "three\n")
    assert (proxy_config().api_key, proxy_config().admin_key) == (("one", "two"), "three")
    for nothing in (" ", ",", "\n"):
        monkeypatch.setenv("EPD_API_KEY", nothing)
        assert cli.main(["proxy", "--model", str(CHECKPOINT_DIR)]) == 2
        assert "EPD_API_KEY: there is no key in it" in capsys.readouterr().err
