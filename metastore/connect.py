"""From the flag to the store."""

from __future__ import annotations

import importlib

from epd.errors import ConfigError
from metastore.base import Metastore
from metastore.config import FLAG, MetastoreConfig

_OURS = {"RedisMetastoreClient": "metastore.redis_store"}


def make_metastore(config: MetastoreConfig) -> Metastore:
    """The store that the configuration names; not connected yet.

    Raises:
        ConfigError: there is no such class, or it is no `Metastore`, or its address is none.
    """
    module_path = config.client_module_path or _OURS.get(config.client)
    if module_path is None:
        raise ConfigError(
            f"{FLAG}: metastore_client {config.client!r} is none of {', '.join(_OURS)}; "
            "for a class of your own, metastore_client_module_path names its module"
        )
    try:
        module = importlib.import_module(module_path)
    except ImportError as error:
        raise ConfigError(f"{FLAG}: metastore_client_module_path {module_path!r}: {error}") from error
    store_class = getattr(module, config.client, None)
    if not (isinstance(store_class, type) and issubclass(store_class, Metastore)):
        raise ConfigError(f"{FLAG}: {module_path} has no class {config.client!r} derived from metastore.base.Metastore")
    return store_class.from_config(config)
