from __future__ import annotations

import pytest

from epd import addresses
from epd.addresses import advertised, host_of, listening_endpoint, with_port
from epd.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("*:7001", "tcp://*:7001"),
        ("0.0.0.0:7001", "tcp://0.0.0.0:7001"),
        ("[::]:7001", "tcp://[::]:7001"),
        ("10.0.0.2:0", "tcp://10.0.0.2:0"),
        ("/tmp/x", "ipc:///tmp/x"),
    ],
)
def test_addresses_to_listen_on(address: str, expected: str) -> None:
    assert listening_endpoint(address, any_port=True) == expected


def test_a_free_port_only_where_others_are_told_of_it() -> None:
    with pytest.raises(ConfigError, match="host:port"):
        listening_endpoint("10.0.0.2:0")


@pytest.mark.parametrize(
    ("bound", "advertise", "expected"),
    [
        ("ipc:///tmp/x", None, "ipc:///tmp/x"),
        ("tcp://10.0.0.2:7001", None, "tcp://10.0.0.2:7001"),
        ("tcp://*:7001", "worker-3:9000", "tcp://worker-3:9000"),
        ("tcp://*:7001", "worker-3", "tcp://worker-3:7001"),
        ("tcp://[::]:7001", "[fd00::3]", "tcp://[fd00::3]:7001"),
    ],
)
def test_what_others_are_told(bound: str, advertise: str | None, expected: str) -> None:
    assert advertised(bound, advertise, ()) == expected


def test_all_interfaces_become_the_one_towards_those_who_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_ELSEWHERE", ())
    monkeypatch.setattr(addresses, "_addresses_of_own_name", list)
    for wildcard in ("*", "0.0.0.0", "[::]"):
        assert advertised(f"tcp://{wildcard}:7001", None, ["127.0.0.1"]) == "tcp://127.0.0.1:7001"


def test_a_way_that_others_can_use_comes_before_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_source_address", {"127.0.0.1": "127.0.0.1", "redis": "10.0.0.3"}.get)
    assert advertised("tcp://*:7001", None, ["127.0.0.1", "redis"]) == "tcp://10.0.0.3:7001"


def test_a_host_without_an_address_must_be_told_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_source_address", lambda host: None)
    monkeypatch.setattr(addresses, "_addresses_of_own_name", lambda: ["127.0.0.1"])
    with pytest.raises(ConfigError, match="--advertise-addr HOST:PORT"):
        advertised("tcp://*:7001", None, ["redis"])


@pytest.mark.parametrize(
    ("bound", "advertise"),
    [
        ("tcp://*:1", "*:1"),
        ("tcp://*:1", "0.0.0.0"),
        ("tcp://*:1", "/tmp/x"),
        ("ipc:///tmp/x", "h:1"),
        ("tcp://*:1", ""),
    ],
)
def test_what_nobody_could_dial_is_not_advertised(bound: str, advertise: str) -> None:
    with pytest.raises(ConfigError, match="--advertise-addr"):
        advertised(bound, advertise, ())


def test_parts_of_urls() -> None:
    assert host_of("tcp://[::1]:7001") == "::1"
    assert host_of("redis://user:word@store:6379/0") == "store"
    assert host_of("ipc:///tmp/x") is None
    assert with_port("tcp://[::1]:0", 7001) == "tcp://[::1]:7001"
