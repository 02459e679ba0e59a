"""What all request handlers of a process share: the models, the workers, and the limits."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from epd.config import ProxyConfig
from epd.errors import InvalidRequest, ModelNotFound, NoWorker
from epd.messages import WorkerInfo
from epd.transport import endpoints
from epd.types import WorkerRole
from metastore.roster import Roster
from metastore.sessions import MemorySessionStore, SessionLimits, SessionStore
from proxy.byte_budget import ByteBudget
from proxy.cluster.discovery import Discovery
from proxy.cluster.worker_pool import WorkerPool
from proxy.dispatch.dispatcher import Dispatcher
from proxy.dispatch.retries import RetryLimits
from proxy.figures.metrics import Metrics
from proxy.gateway_config import GatewayConfig
from proxy.media.http import Domains, HttpFetcher, parse_networks
from proxy.media.loader import MediaLimits, MediaLoader
from proxy.models.catalog import ModelCatalog, ModelRef
from proxy.models.probe import ModelProbe
from proxy.models.served_model import ServedModel, Shared
from proxy.routing.policies import make_policy
from proxy.sessions import Sessions

_NAMES_SHOWN = 20
_MODELS_KEPT_S = 1.0


class _Known(NamedTuple):
    """The models as of a moment, which hold while all that they follow from is as it was."""

    infos: list[WorkerInfo | None]
    version: tuple[int, int]
    until: float
    """By the monotonic clock: names that nobody serves any more are forgotten by time."""
    models: list[ServedModel]


class Service:
    """Made once per process; holds connections from `start` to `close`.

    Args:
        config: of the proxy.
        roster: who the workers are; default: a new one, filled from the address lists.

    Raises:
        ConfigError: a file of the checkpoint or a flag is wrong.
    """

    def __init__(self, config: ProxyConfig, roster: Roster | None = None) -> None:
        self.config = config
        self.gateway = GatewayConfig.read(config)
        self.created = int(time.time())
        self.bytes = ByteBudget(config.max_media_bytes)
        """Of all requests."""
        self.metrics = Metrics()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self.catalog = ModelCatalog(config.model, config.model_name, config.models, self._threads)
        self.media = MediaLoader(
            MediaLimits(
                max_image_bytes=config.max_image_bytes,
                max_image_pixels=config.max_image_pixels,
                max_images=config.max_images_per_request,
                max_total_bytes=max(config.max_body_bytes, config.max_image_bytes),
                max_total_pixels=4 * config.max_image_pixels,
            ),
            HttpFetcher(
                max_bytes=config.max_image_bytes,
                timeout_s=config.media_timeout,
                allowed=parse_networks(config.allowed_private_media),
                domains=Domains(config.allowed_media_domains),
            ),
            config.allowed_local_media_path,
        )
        self.roster = _fill(roster or Roster(), config)
        self.pool = WorkerPool(
            self.roster,
            f"proxy-{config.port}",
            self.catalog,
            {
                WorkerRole.ENCODER: make_policy(config.encoder_router),
                WorkerRole.PREFILL_DECODE: make_policy(config.pd_router),
            },
            config.proxy_addr,
        )
        store = config.metastore
        self.discovery = None if store is None else Discovery(store, self.roster, self.pool.is_up)
        self.dispatcher = Dispatcher(
            self.pool,
            config.max_concurrent_requests,
            RetryLimits(
                failover_wait_s=config.failover_wait,
                encode_timeout_s=config.encode_timeout,
                queue_timeout_s=config.queue_timeout,
            ),
            self.metrics,
        )
        self.sessions = Sessions(self._session_store(), self.dispatcher)
        self._shared = Shared(config, self.pool, self.dispatcher, self.media, self._threads)
        self.probe = ModelProbe(self.models)
        self._known_models: _Known | None = None
        self._started = False

    def _session_store(self) -> SessionStore:
        config = self.config
        limits = SessionLimits(
            ttl_s=config.session_ttl, max_sessions=config.max_sessions, max_bytes=config.max_session_bytes
        )
        shared = None if self.discovery is None else self.discovery.sessions(limits)
        return MemorySessionStore(limits) if shared is None else shared

    async def start(self) -> None:
        """Connect to the workers. A second call does nothing.

        Raises:
            ConfigError: the announcement address can't be bound.
        """
        if not self._started:
            self._started = True
            await self.pool.start()
            if self.discovery is not None:
                self.discovery.start()

    async def drain(self) -> None:
        """Take nothing new, be off the metastore's list at once, and return when all is answered or out of time."""
        draining = asyncio.create_task(self.dispatcher.drain(self.config.drain_timeout), name="drain requests")
        if self.discovery is not None:
            await self.discovery.leave()
        await draining

    async def until_workers_are_tried(self, timeout_s: float) -> None:
        """Wait until the workers of address lists and of the metastore have been asked once, `timeout_s` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                if self.discovery is not None:
                    await self.discovery.feed.was_read.wait()
                await self.pool.tried()

    async def close(self) -> None:
        """Drop connections and threads."""
        await self.probe.close()
        await self.sessions.close()
        if self.discovery is not None:
            await self.discovery.close()
        await self.pool.close()
        await self.catalog.close()
        self.media.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- models ------------------------------------------------------------------------------------------------------

    def models(self) -> list[ServedModel]:
        """All models that requests may name, whether or not all their workers are there."""
        infos, version = self.pool.infos(), self.catalog.version
        known = self._known_models
        if known is None or known.infos != infos or known.version != version or time.monotonic() > known.until:
            known = self._known_models = _Known(infos, version, time.monotonic() + _MODELS_KEPT_S, self._find_models())
        return known.models

    def _find_models(self) -> list[ServedModel]:
        found = []
        for ref in self._refs():
            checkpoint = self.catalog.checkpoint(ref.fingerprint)
            if checkpoint is not None:
                found.append(ServedModel(ref, checkpoint, self._shared))
        return found

    def model(self, name: str | None) -> ServedModel:
        """The model that a request means. Of two checkpoints under one name, as in an update, the more complete one.

        Args:
            name: as requests give it, perhaps an alias; None: the only one. What is called like an alias comes first.

        Raises:
            ModelNotFound: there is none of that name.
            InvalidRequest: there are several to choose from.
            NoWorker: it is being loaded, or no worker has appeared that says what there is.
        """
        models = self.models()
        if name is None:
            return self._only(models)
        for real in (name, self.gateway.aliases.get(name, name)):
            named = [model for model in models if model.name == real]
            if named:
                return min(named, key=lambda model: len(model.missing_roles)) if len(named) > 1 else named[0]
        if any(ref.name in (name, real) for ref in self._refs()):
            raise NoWorker(f"The model {name!r} is being loaded. Try again in a moment.")
        behind = f", which stands for {real[:200]!r}," if real != name else ""
        raise ModelNotFound(
            f"The model {name[:200]!r}{behind} does not exist; this server serves {self._listed()}.", param="model"
        )

    def default_model(self) -> ServedModel:
        """The model of endpoints whose requests can't name one: `--model`, else the only one.

        Raises:
            InvalidRequest, NoWorker: there is no telling, or none to be had; see `model`.
        """
        models = self.models()
        ours = [model for model in models if model.ref.fingerprint == self.catalog.expected]
        if ours:  # workers may call it by several names
            return min(ours, key=lambda model: (len(model.missing_roles), model.name != self.config.model_name))
        if len({model.name for model in models}) > 1:
            raise InvalidRequest(
                f"Requests of this kind can't name a model, and there are {self._listed()}; "
                "start the proxy with --model to say which one answers them."
            )
        return self._only(models)

    def named_models(self) -> dict[str, ServedModel]:
        """All names that requests may give, aliases last, and the models that they mean."""
        found: dict[str, ServedModel] = {}
        for model in self.models():
            known = found.get(model.name)
            if known is None or len(model.missing_roles) < len(known.missing_roles):
                found[model.name] = model
        aliases = {name: found[real] for name, real in self.gateway.aliases.items() if real in found}
        return found | {name: model for name, model in aliases.items() if name not in found}

    def _only(self, models: list[ServedModel]) -> ServedModel:
        if len({model.name for model in models}) == 1:
            return self.model(models[0].name) if len(models) > 1 else models[0]
        if not models:
            raise NoWorker("No worker has appeared yet, so that no model is served. Try again in a moment.")
        raise InvalidRequest(f"model is needed: this server serves {self._listed()}.", param="model")

    def _listed(self) -> str:
        """All names that requests may give, for people."""
        names = list(self.named_models())
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        return (", ".join(repr(name) for name in names[:_NAMES_SHOWN]) or "none yet") + more

    def _refs(self) -> list[ModelRef]:
        up = [one.info for one in self.pool.connections() if one.info is not None]
        return self.catalog.refs(
            [info for info in up if info.role is not WorkerRole.ENCODER],
            [info for info in up if info.role is WorkerRole.ENCODER],
        )


def _fill(roster: Roster, config: ProxyConfig) -> Roster:
    for address in endpoints(config.encode_addr_list):
        roster.add_permanent(WorkerRole.ENCODER, address)
    for address in endpoints(config.pd_addr_list):
        roster.add_permanent(WorkerRole.PREFILL_DECODE, address)
    return roster
