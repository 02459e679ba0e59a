"""What `--metastore-client-config` takes, and how a server is reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from epd.config import ProxyConfig
from epd.demo import CHECKPOINT_DIR
from epd.environment import metastore_client_config
from epd.errors import ConfigError
from metastore.base import Metastore
from metastore.config import MetastoreConfig
from metastore.connect import make_metastore

REDIS = "redis://user:secret@127.0.0.1:6379/2"

CUSTOM = """
from metastore.redis_store import RedisMetastoreClient

class Mine(RedisMetastoreClient):
    pass

class NoStore:
    pass
"""


def test_all_keys_are_read(tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("cert", "key", "ca")}
    for path in files.values():
        Path(path).touch()
    text = {
        "metastore_client": "RedisMetastoreClient",
        "metastore_client_module_path": "metastore.redis_store",
        "metastore_address": REDIS,
        "metastore_service_type": "standalone",
        "metastore_key_prefix": "mine",
        "metastore_ssl": True,
        "metastore_ssl_certfile": files["cert"],
        "metastore_ssl_keyfile": files["key"],
        "metastore_ssl_cafile": files["ca"],
        "metastore_socket_timeout": 60,
    }
    config = MetastoreConfig.from_json(json.dumps(text))
    assert {f"metastore_{name}": value for name, value in vars(config).items()} == text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"metastore_adress": REDIS}, "unknown key 'metastore_adress'; known are metastore_client, "),
        ({}, "metastore_address is missing"),
        ({"metastore_address": 5}, "metastore_address"),
        ({"metastore_address": REDIS, "metastore_ssl": "yes"}, "metastore_ssl"),
        ({"metastore_address": REDIS, "metastore_service_type": "etcd"}, "standalone, sentinel, cluster"),
        ({"metastore_address": REDIS, "metastore_socket_timeout": 0}, "metastore_socket_timeout 0"),
        ({"metastore_address": REDIS, "metastore_key_prefix": ""}, "metastore_key_prefix must"),
        ({"metastore_address": REDIS, "metastore_ssl_cafile": "/no/such"}, "metastore_ssl_cafile /no/such"),
        ([], "JSON object"),
        ("{", "valid JSON"),
    ],
)
def test_what_can_not_work_is_named_and_no_password_with_it(values: Any, told: str) -> None:
    text = values if isinstance(values, str) else json.dumps(values)
    with pytest.raises(ConfigError, match="--metastore-client-config") as caught:
        ProxyConfig(model=CHECKPOINT_DIR, metastore_client_config=text)
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "service_type"),
    [
        ("http://:secret@host:1", None),
        ("redis://", None),
        ("redis://:secret@host:port/0", None),
        ("redis://:secret@host:1/zero", None),
        ("redis+sentinel://:secret@host:26379", None),
        ("redis+cluster://:secret@host:1/3", None),
        ("redis+cluster://:secret@host:1", "sentinel"),
        ("unix:///tmp/secret", "cluster"),
    ],
)
def test_addresses_that_are_none(address: str, service_type: str | None) -> None:
    with pytest.raises(ConfigError, match="metastore_address") as caught:
        make_metastore(MetastoreConfig(address=address, service_type=service_type))
    assert ":secret" not in str(caught.value)


def test_passwords_are_not_shown() -> None:
    config = MetastoreConfig(address=REDIS)
    assert config.safe_address == "redis://***@127.0.0.1:6379/2"
    assert config.first_server == "redis://127.0.0.1:6379/2"
    shown = repr(ProxyConfig(model=CHECKPOINT_DIR, metastore_client_config=json.dumps({"metastore_address": REDIS})))
    assert "secret" not in repr(config) + shown


def test_a_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_store.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, module: str | None = "my_store") -> Metastore:
        return make_metastore(MetastoreConfig(client=name, client_module_path=module, address=REDIS))

    assert type(make("Mine")).__name__ == "Mine"
    for name, module, told in (
        ("NoStore", "my_store", "derived from metastore.base.Metastore"),
        ("Missing", "my_store", "no class 'Missing'"),
        ("Mine", "no_such_module", "no_such_module"),
        ("Mine", None, "'Mine' is none of RedisMetastoreClient"),
    ):
        with pytest.raises(ConfigError, match=told):
            make(name, module)
    sys.modules.pop("my_store", None)


def environment(flag: str | None = None, **variables: str) -> dict[str, Any] | None:
    text = metastore_client_config(flag, {f"LM_SERVICE_{name}": value for name, value in variables.items()})
    return None if text is None else dict(json.loads(text))


def test_variables_stand_for_what_the_flag_does_not_say() -> None:
    assert environment(REDIS_KEY_PREFIX="x") is None
    assert environment(REDIS_ADDRESS="host:6379", REDIS_DB="3", REDIS_PASSWORD="a/b") == {
        "metastore_address": "redis://:a%2Fb@host:6379/3"
    }
    assert environment(METASTORE_CLIENT_CONFIG='{"metastore_address":"redis://h:1/1"}', REDIS_DB="3") == {
        "metastore_address": "redis://h:1/1"
    }
    flag = '{"metastore_address":"redis://flag:1","metastore_socket_timeout":1}'
    assert environment(flag, REDIS_ADDRESS="host:2", SOCKET_TIMEOUT="9", REDIS_KEY_PREFIX="x") == {
        "metastore_address": "redis://flag:1",
        "metastore_socket_timeout": 1,
        "metastore_key_prefix": "x",
    }
    with pytest.raises(ConfigError, match="LM_SERVICE_SOCKET_TIMEOUT=soon"):
        environment(REDIS_ADDRESS="h:1", SOCKET_TIMEOUT="soon")
