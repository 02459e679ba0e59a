"""What every worker does beside its work: listen, shake hands, answer pings, announce itself, drain, leave.

The work itself is a `Service` (`workers.service`). The runtime calls it on the event loop only, and a malformed or
unexpected message costs that message, never the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import time
from collections import defaultdict

import msgspec

from epd import __version__
from epd.addresses import advertised, host_of
from epd.codec import Buffer
from epd.config import WorkerConfig
from epd.errors import ProtocolError
from epd.messages import (
    PROTOCOL_VERSION,
    Announcement,
    AnyMessage,
    Hello,
    Pause,
    Ping,
    Pong,
    Profile,
    Refusal,
    Welcome,
    WorkerInfo,
)
from epd.transport import SEND_TIMEOUT_S, Dealer, HandshakeFailed, PeerGone, Router, endpoints
from epd.types import WorkerRole, WorkerState, WorkerTask
from metastore.base import Record
from metastore.connect import make_metastore
from metastore.registry import Registration
from workers.profiling import Profiler
from workers.service import Service
from workers.stall_watch import LOOK_INTERVAL_S, StallWatch

log = logging.getLogger(__name__)

_STARTED = time.monotonic()
"""Of the process, nearly: this is imported before a model is loaded."""
ANNOUNCE_INTERVAL_S = 1.0
ANNOUNCE_RETRY_S = 0.2
MAX_PEERS = 4096
"""Proxies and encoders that have said `Hello`, and were heard within `PEER_TIMEOUT_S`; more are refused."""
MAX_WAITING_SENDS = 1024
"""Answers to one peer that wait for room on its connection: it does not read, and is treated as gone."""
MAX_PROFILE_REQUESTS = 16
MAX_WARNED = 1000
"""Senders of malformed messages that were warned of; of more than these only the count tells."""
PEER_TIMEOUT_S = 10.0
"""Proxies ping twice a second; one that is silent for so long has gone, and its requests with it."""


class WorkerRuntime:
    """Runs one service behind one `Router`.

    Args:
        config: address and proxies.
        role: what the service does.
        model: fingerprint of the checkpoint; peers with another one are refused.
        dtype: of embeddings made or taken.

    Raises:
        ConfigError: an address is none, or the metastore's client is.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        role: WorkerRole,
        model: str,
        dtype: str,
        max_model_len: int = 0,
        max_num_seqs: int = 0,
        max_requests: int = 0,
        task: WorkerTask = WorkerTask.GENERATE,
    ) -> None:
        self._config = config
        self._proxies = endpoints(config.proxy_addr)
        self._router = Router(config.worker_addr, any_port=bool(self._proxies or config.metastore))
        self._info = WorkerInfo(
            role=role,
            address=self._router.address,
            incarnation=secrets.token_hex(8),
            model=model,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_requests=max_requests,
            task=task,
            version=__version__,
            served_model_name=config.served_model_name or "",
        )
        self._store = None if config.metastore is None else make_metastore(config.metastore)
        self._registration = None
        if config.metastore is not None and self._store is not None:
            self._registration = Registration(self._store, self._record, config.metastore.safe_address)
        self._state = WorkerState.READY
        self._last_seen: dict[bytes, float] = {}
        """Of those who have a name."""
        self._names: dict[bytes, str] = {}
        self._waiting_sends: dict[bytes, int] = defaultdict(int)
        self._malformed = 0
        self._warned: set[str] = set()
        self._stop = asyncio.Event()
        self._is_hurried = asyncio.Event()
        """A second signal came: the time for draining is over."""
        self._exit_code = 0
        self._watch = StallWatch(config.stall_timeout)
        self._profiler = Profiler(config.profile_dir, config.name, lambda: self._service.progress().steps, self._pause)
        self._profiling: set[asyncio.Task[bool]] = set()

    async def send(self, peer: bytes, message: AnyMessage, *buffers: Buffer) -> bool:
        """Implements `Send`."""
        if self._waiting_sends[peer] >= MAX_WAITING_SENDS:
            log.warning("%s leaves %d answers unread", self._names.get(peer, "a stranger"), MAX_WAITING_SENDS)
            self._forget(peer)
            return False
        self._waiting_sends[peer] += 1
        try:
            return await self._send(peer, message, *buffers, timeout_s=SEND_TIMEOUT_S)
        finally:
            self._waiting_sends[peer] -= 1
            if not self._waiting_sends[peer]:
                del self._waiting_sends[peer]

    async def _reply(self, peer: bytes, message: AnyMessage) -> None:
        """Answer from the receive loop, which one peer that does not read must not hold up for the others."""
        await self._send(peer, message, timeout_s=0)

    async def _send(self, peer: bytes, message: AnyMessage, *buffers: Buffer, timeout_s: float) -> bool:
        try:
            await self._router.send(peer, message, *buffers, timeout_s=timeout_s)
        except PeerGone:
            self._forget(peer)
            return False
        return True

    def shut_down(self, exit_code: int) -> None:
        """Leave as on SIGTERM, with this exit code: the service can't go on."""
        self._exit_code = exit_code
        self._stop.set()

    async def run(self, service: Service) -> int:
        """Serve until SIGTERM or SIGINT, then drain and leave; at the second one at once. Returns the exit code."""
        self._service = service
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._listen()
        tasks = [asyncio.create_task(self._receive_loop()), asyncio.create_task(self._watch_peers())]
        tasks += [asyncio.create_task(self._watch_progress())]
        tasks += [asyncio.create_task(self._announce_to(proxy)) for proxy in self._proxies]
        if self._registration is not None:
            tasks.append(asyncio.create_task(self._registration.run(), name="metastore registration"))
        stop = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                log.error("a task of the runtime ended", exc_info=task.exception())
                self._exit_code = 1
            await self._leave()
        finally:
            for task in (*tasks, stop):
                task.cancel()
            await asyncio.gather(*tasks, stop, return_exceptions=True)
            await self._profiler.close()
            await service.stop()
            self._router.close()
            await self._deregister()
        return self._exit_code

    def _listen(self) -> None:
        """Bind, and find out where others reach this worker.

        Raises:
            ConfigError: the address is in use, or names all interfaces of a host whose own address can't be found.
        """
        self._router.bind()
        address = self._router.address
        store = self._config.metastore
        if self._proxies or store or self._config.advertise_addr is not None:  # else nobody is told
            told = (*self._proxies, store.first_server if store else "")
            towards = [host for one in told if (host := host_of(one))]
            address = advertised(address, self._config.advertise_addr, towards)
        self._info = msgspec.structs.replace(self._info, address=address)
        log.info("%s ready on %s (%s)", self._info.role, self._info.address, self._info.dtype)

    def _on_signal(self) -> None:
        (self._is_hurried if self._stop.is_set() else self._stop).set()

    async def _deregister(self) -> None:
        if self._registration is not None and self._store is not None:
            await self._registration.leave()
            await self._store.close()

    async def _leave(self) -> None:
        """Refuse what comes, finish what runs, and hand over what is not finished in time."""
        self._state = WorkerState.DRAINING
        if self._registration is not None:
            self._registration.tell()
        load = self._service.load()
        log.info("draining: %d running, %d waiting", load.running, load.waiting)
        # Refusing comes first: what a peer sends before it knows is refused, and retried elsewhere.
        draining = asyncio.create_task(self._service.drain())
        hurried = asyncio.create_task(self._is_hurried.wait())
        try:
            await asyncio.sleep(0)
            await self._tell_state()
            await asyncio.wait(
                {draining, hurried}, timeout=self._config.drain_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if draining.done():
                draining.result()
                log.info("drained")
            else:
                why = "a second signal" if hurried.done() else f"not drained after {self._config.drain_timeout:g} s"
                load = self._service.load()
                log.warning("%s: %d running and %d waiting are handed over", why, load.running, load.waiting)
                await self._service.hand_over()
        finally:
            draining.cancel()
            hurried.cancel()
            await asyncio.gather(draining, hurried, return_exceptions=True)

    async def _tell_state(self) -> None:
        """Have all peers know the new state now, and not at their next ping."""
        pong = self._pong(0)  # the number of no ping
        for peer in list(self._names):
            await self._reply(peer, pong)

    # -- messages --------------------------------------------------------------------------------------------------

    async def _receive_loop(self) -> None:
        while True:
            try:
                peer, message, buffers = await self._router.receive()
            except ProtocolError as error:
                self._count_malformed("a stranger", error)
                continue
            if peer in self._names:
                self._last_seen[peer] = time.monotonic()
            try:
                await self._dispatch(peer, message, buffers)
            except ProtocolError as error:
                self._count_malformed(self._names.get(peer, "a stranger"), error)

    async def _dispatch(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        if isinstance(message, Ping):
            await self._reply(peer, self._pong(message.sequence))
        elif isinstance(message, Hello):
            await self._greet(peer, message)
        elif peer not in self._names:
            # Perhaps one that was silent for too long. It must not wait for an answer that never comes.
            reason = "no greeting, or forgotten after a long silence: connect again"
            await self._reply(peer, Refusal(protocol_version=PROTOCOL_VERSION, reason=reason))
            raise ProtocolError(f"{type(message).__name__} before Hello")
        elif isinstance(message, Profile):
            self._profile(peer, message)
        else:
            self._service.handle(peer, message, buffers)

    def _profile(self, peer: bytes, message: Profile) -> None:
        if len(self._profiling) >= MAX_PROFILE_REQUESTS:
            raise ProtocolError(f"{MAX_PROFILE_REQUESTS} of {type(message).__name__} wait for an answer already")
        task = asyncio.create_task(self._answer_profile(peer, message))
        self._profiling.add(task)
        task.add_done_callback(self._profiling.discard)

    async def _answer_profile(self, peer: bytes, message: Profile) -> bool:
        return await self.send(peer, await self._profiler.handle(message))

    async def _pause(self, seconds: float) -> None:
        """Tell all peers that this process may be silent for so long."""
        for peer in list(self._names):
            await self._reply(peer, Pause(seconds=seconds))

    async def _greet(self, peer: bytes, hello: Hello) -> None:
        reason = self._reason_to_refuse(peer, hello)
        if reason:
            log.warning("refused %s: %s", hello.sender, reason)
            await self._reply(peer, Refusal(protocol_version=PROTOCOL_VERSION, reason=reason))
            return
        self._names[peer] = hello.sender
        self._last_seen[peer] = time.monotonic()
        log.info("%s connected", hello.sender)
        await self._reply(peer, Welcome(protocol_version=PROTOCOL_VERSION, worker=self._current_info()))

    def _reason_to_refuse(self, peer: bytes, hello: Hello) -> str | None:
        if hello.protocol_version != PROTOCOL_VERSION:
            return f"protocol version {hello.protocol_version}, this worker speaks {PROTOCOL_VERSION}"
        if hello.model not in ("", self._info.model):
            return f"checkpoint {hello.model}, this worker serves {self._info.model} ({self._config.model})"
        if peer not in self._names and len(self._names) >= MAX_PEERS:
            return f"{MAX_PEERS} proxies and encoders are connected, which is this worker's limit"
        return None

    def _pong(self, sequence: int) -> Pong:
        own = {"malformed_messages": self._malformed, "refused_connections": self._router.refused}
        return Pong(
            sequence=sequence,
            incarnation=self._info.incarnation,
            state=self._state,
            load=self._service.load(),
            stages=self._service.stages(),
            counters=self._service.counters() | own,
            stalled_s=self._watch.stalled_s,
            is_stuck=self._watch.is_stuck,
        )

    def _current_info(self) -> WorkerInfo:
        return msgspec.structs.replace(self._info, state=self._state, uptime_s=time.monotonic() - _STARTED)

    def _record(self) -> Record:
        """What stands in the metastore."""
        worker = self._current_info()
        return Record(
            role=worker.role,
            address=worker.address,
            incarnation=worker.incarnation,
            protocol_version=PROTOCOL_VERSION,
            worker=worker,
            load=self._service.load(),
            uptime_s=worker.uptime_s,
        )

    def _count_malformed(self, sender: str, error: ProtocolError) -> None:
        self._malformed += 1
        if sender not in self._warned and len(self._warned) < MAX_WARNED:
            self._warned.add(sender)
            log.warning("dropped a malformed message from %s (further ones are only counted): %s", sender, error)

    async def _watch_progress(self) -> None:
        was_stuck = False
        while True:
            self._watch.look(time.monotonic(), self._service.progress())
            if self._watch.is_stuck is not was_stuck:
                was_stuck = self._watch.is_stuck
                if was_stuck:
                    log.error("stuck: no step has ended for %.1f s", self._watch.stalled_s)
                else:
                    log.warning("not stuck any more")
            await asyncio.sleep(LOOK_INTERVAL_S)

    # -- peers -----------------------------------------------------------------------------------------------------

    async def _watch_peers(self) -> None:
        while True:
            await asyncio.sleep(PEER_TIMEOUT_S / 4)
            silent_since = time.monotonic() - PEER_TIMEOUT_S
            for peer in [peer for peer, seen in self._last_seen.items() if seen < silent_since]:
                self._forget(peer)

    def _forget(self, peer: bytes) -> None:
        self._last_seen.pop(peer, None)
        name = self._names.pop(peer, None)
        if name is not None:
            log.info("%s has gone", name)
            self._warned.discard(name)
            self._service.peer_gone(peer)

    async def _announce_to(self, proxy: str) -> None:
        """Tell a proxy where this worker is, every second and for ever: a proxy that restarts learns it again."""
        problem = ""
        while True:
            dealer = Dealer(proxy)
            dealer.connect()
            with contextlib.closing(dealer):
                try:
                    while True:
                        announcement = Announcement(protocol_version=PROTOCOL_VERSION, worker=self._current_info())
                        await dealer.send(announcement, timeout_s=60.0)
                        await asyncio.sleep(ANNOUNCE_INTERVAL_S if self._state is WorkerState.READY else 0.1)
                except PeerGone as error:
                    if str(error) != problem:
                        problem = str(error)
                        level = logging.WARNING if isinstance(error, HandshakeFailed) else logging.DEBUG
                        log.log(level, "proxy %s is not there, trying again: %s", proxy, problem)
            await asyncio.sleep(ANNOUNCE_RETRY_S)
