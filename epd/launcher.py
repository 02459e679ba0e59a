"""`epd up`: a whole cluster on one host, each part a process of its own, supervised.

The children talk over Unix sockets in a private folder. A child that dies is named and started again, with growing
pauses; one that refuses its flags ends the cluster, because it would refuse them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import httpx

from epd import cpu_runtime
from epd.access_options import API_KEY_VARIABLE, AccessOptions
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError
from epd.gateway_options import GatewayOptions
from epd.model_options import DeviceOptions, EngineOptions, MediaOptions
from epd.up_config import UpConfig

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_STABLE_AFTER_S = 60.0
_KILL_AFTER_S = 40.0
_EXIT_CONFIG_ERROR = 2
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")
_PR_SET_PDEATHSIG = 1
_ACCESS_FLAGS = tuple(
    option.name for option in fields(AccessOptions) if option.name not in ("api_key", "allowed_origins")
)
_GATEWAY_FLAGS, _MEDIA_FLAGS, _ENGINE_FLAGS, _DEVICE_FLAGS = (
    tuple(option.name for option in fields(options))
    for options in (GatewayOptions, MediaOptions, EngineOptions, DeviceOptions)
)
_COMMAND = (sys.executable, "-m", "epd")


@dataclass(frozen=True)
class ChildSpec:
    """One process of the cluster: its name in logs, and the flags behind `python -m epd`."""

    name: str
    arguments: tuple[str, ...]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables that it gets besides: lists of processes show flags."""


def plan_cluster(config: UpConfig, folder: Path) -> list[ChildSpec]:
    """The processes of a cluster, workers first; their sockets are in `folder`."""
    encoders = [str(folder / f"encoder_{i}") for i in range(config.encoders)]
    pds = [str(folder / f"prefill_decode_{i}") for i in range(config.pds)]
    everywhere = _flags(config, "log_level", "cluster_keys", "metastore_client_config")
    worker = _flags(config, "model", "profile_dir", *_DEVICE_FLAGS) + everywhere
    threads = config.threads or _threads_per_worker(config)
    worker += ("--threads", str(threads))
    if config.encoders and _get_in_each_others_way(threads):
        worker += ("--share-cores", str(folder / "turns"))
    generate = worker + _flags(config, "max_num_seqs", "kv_cache_memory_bytes", "tp", *_ENGINE_FLAGS)
    plan = [ChildSpec(Path(a).name, ("encoder", "--worker-addr", a, *worker)) for a in encoders]
    plan += [ChildSpec(Path(a).name, ("pd", "--worker-addr", a, *generate)) for a in pds]
    return plan + [_plan_proxy(config, folder, i, encoders, pds) for i in range(config.proxies)]


def _get_in_each_others_way(threads: int) -> bool:
    """Whether two workers of so many threads have more of them than there are cores; a lone thread waits for nobody."""
    return threads > 1 and _cores() < 2 * threads


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _threads_per_worker(config: UpConfig) -> int:
    """So many that the workers of one role share the cores. More threads than cores wait for each other in every
    matrix product: four workers of two threads each on two cores took eight times as long as with one each."""
    return max(1, _cores() // max(config.encoders, config.pds * config.tp))


def _plan_proxy(config: UpConfig, folder: Path, index: int, encoders: list[str], pds: list[str]) -> ChildSpec:
    port = config.port + index
    flags = _flags(
        config,
        "model",
        "host",
        "max_model_len",
        "request_timeout",
        "failover_wait",
        "encoder_router",
        "pd_router",
        "tool_call_parser",
        "log_level",
        "cluster_keys",
        "metastore_client_config",
        *_ACCESS_FLAGS,
        *_GATEWAY_FLAGS,
        *_MEDIA_FLAGS,
    )
    name = config.served_model_name or ("epd-demo" if config.model == CHECKPOINT_DIR else str(config.model))
    lists = ("--pd-addr-list", *pds) + (("--encode-addr-list", *encoders) if encoders else ())
    own = ("--port", str(port), "--proxy-addr", str(folder / f"proxy_{index}"), "--served-model-name", name)
    origins = (
        "--allowed-origins",
        json.dumps(config.allowed_origins),
    )  # none at all is something else than the default
    secrets = {API_KEY_VARIABLE: ",".join(config.api_key)} if config.api_key else {}
    return ChildSpec(f"proxy_{port}", ("proxy", *own, *lists, *origins, *flags), secrets)


def _flags(config: UpConfig, *names: str) -> tuple[str, ...]:
    words: list[str] = []
    for name in names:
        value, flag = getattr(config, name), name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value not in (None, (), ""):  # 0 is a value
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{flag}", *map(str, values)]
    return tuple(words)


class Cluster:
    """The children of one `epd up`. `async with Cluster(config)`: started on entry, stopped on exit."""

    def __init__(self, config: UpConfig) -> None:
        self.config = config
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        """Name of a child → its current process."""
        self.failure: asyncio.Future[str]
        """Done, with the reason, when the cluster can't go on."""
        self._folder = tempfile.TemporaryDirectory(prefix="epd-", ignore_cleanup_errors=True)
        self._supervisors: list[asyncio.Task[None]] = []
        self._stop_requested = asyncio.Event()

    @property
    def base_urls(self) -> list[str]:
        """What OpenAI clients take as `base_url`, one for each proxy."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        host = f"[{host}]" if ":" in host else host
        scheme = "http" if self.config.ssl_certfile is None else "https"
        return [f"{scheme}://{host}:{self.config.port + i}/v1" for i in range(self.config.proxies)]

    def worker_address(self, name: str) -> str:
        """Where the worker `encoder_0` or `prefill_decode_0`, and so on, listens."""
        return str(Path(self._folder.name) / name)

    async def __aenter__(self) -> Self:
        self.failure = asyncio.get_running_loop().create_future()
        for spec in plan_cluster(self.config, Path(self._folder.name)):
            self._supervisors.append(asyncio.create_task(self._supervise(spec), name=spec.name))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop_requested.set()
        # Proxies first: they finish their streams while the workers are still there.
        await self._stop_children(lambda name: name.startswith("proxy"))
        await self._stop_children(lambda name: True)
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        self._folder.cleanup()

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return when every proxy reports all its workers as there.

        Raises:
            ConfigError: the cluster failed or was not ready in time; says which part is missing.
        """
        wanted = self.config.encoders + self.config.pds
        deadline = time.monotonic() + timeout_s
        # Whatever name is in the certificate, these are our own children, and they are told nothing secret.
        async with httpx.AsyncClient(timeout=5.0, verify=False) as client:  # noqa: S501
            for url in self.base_urls:
                while (found := await _count_workers(client, url)) < wanted:
                    if self.failure.done():
                        raise ConfigError(self.failure.result())
                    if time.monotonic() > deadline:
                        raise ConfigError(f"after {timeout_s:g} s only {found} of {wanted} workers answer at {url}")
                    await asyncio.sleep(0.05)

    async def _supervise(self, spec: ChildSpec) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stop_requested.is_set():
            started = time.monotonic()
            code = await self._run_once(spec)
            if self._stop_requested.is_set():
                return
            if code == _EXIT_CONFIG_ERROR:
                if not self.failure.done():
                    self.failure.set_result(f"{spec.name} refused its configuration, see its message above")
                return
            if time.monotonic() - started > _STABLE_AFTER_S:
                pause_s = _FIRST_PAUSE_S
            log.warning("%s died (%s); starting it again in %g s", spec.name, _describe_exit(code), pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _run_once(self, spec: ChildSpec) -> int:
        process = await asyncio.create_subprocess_exec(
            *_COMMAND,
            *spec.arguments,
            env={**self._variables(spec), **spec.secrets},
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # Ctrl-C reaches the supervisor alone, which then stops the children in order.
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        self.processes[spec.name] = process
        assert process.stderr is not None
        await _copy_log(spec.name, process.stderr)
        return await process.wait()

    def _variables(self, spec: ChildSpec) -> dict[str, str]:
        is_proxy = spec.arguments[:1] == ("proxy",)
        return dict(os.environ) if is_proxy or self.config.device == "cuda" else cpu_runtime.for_children()

    async def _stop_children(self, chosen: Callable[[str], bool]) -> None:
        running = [p for name, p in self.processes.items() if chosen(name) and p.returncode is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_KILL_AFTER_S):
                await asyncio.gather(*(process.wait() for process in running))
        except TimeoutError:
            for process in running:
                if process.returncode is None:
                    log.warning("killing process %d, which did not stop in %g s", process.pid, _KILL_AFTER_S)
                    process.kill()


def _die_with_parent() -> None:
    """Runs in the child before exec: the kernel ends it should the supervisor be killed (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _count_workers(client: httpx.AsyncClient, base_url: str) -> int:
    try:
        response = await client.get(base_url.removesuffix("/v1") + "/check_health")
        return list(response.json().get("results", {}).values()).count("Healthy")
    except (httpx.HTTPError, ValueError):
        return 0


async def _copy_log(name: str, stream: asyncio.StreamReader) -> None:
    """Pass a child's lines on; those that are no log lines (a traceback) get its name in front."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than the reader's limit; the rest follows as another line
            continue
        if not line:
            return
        text = line.decode(errors="replace").rstrip()
        print(text if _LOG_LINE.match(text) else f"{name}: {text}", file=sys.stderr, flush=True)


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


async def run_cluster(config: UpConfig) -> int:
    """Run a cluster until Ctrl-C or SIGTERM. Returns the exit code."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    log.info(
        "starting %d encoder(s), %d prefill-decode worker(s), %d proxy(s)", config.encoders, config.pds, config.proxies
    )
    async with Cluster(config) as cluster:
        ready = asyncio.create_task(_tell_when_ready(cluster))
        stopped = asyncio.create_task(stop.wait())
        waited: set[asyncio.Future[Any]] = {stopped, cluster.failure}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        stopped.cancel()
        if cluster.failure.done():
            log.error("%s", cluster.failure.result())
            return _EXIT_CONFIG_ERROR
        log.info("stopping")
    log.info("stopped")
    return 0


async def _tell_when_ready(cluster: Cluster) -> None:
    started = time.monotonic()
    try:
        await cluster.wait_ready()
    except ConfigError as error:
        log.error("%s", error)
        return
    log.info("ready after %.1f s: %s", time.monotonic() - started, ", ".join(cluster.base_urls))
    log.info("try: epd chat --url %s 'Who are you?'   Ctrl-C stops everything", cluster.base_urls[0])
