"""Roster → one connection per worker, and who of them can take a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine

from epd.errors import ConfigError, NoWorker, WorkerFailed
from epd.messages import PROTOCOL_VERSION, Announcement, WorkerInfo
from epd.transport import PeerGone, ProtocolError, Router, endpoint
from epd.types import WorkerRole, WorkerState
from metastore.roster import Member, Roster
from proxy.cluster.greeting import Identity
from proxy.cluster.worker_connection import WorkerConnection
from proxy.models.catalog import ModelCatalog, ModelRef
from proxy.routing.placement import PictureSizes, Plan, snapshots
from proxy.routing.policies import Policy, Question
from proxy.routing.prefix_affinity import Chain

log = logging.getLogger(__name__)

_MAX_WORKERS = 1 << 12
"""Whoever announces more costs others nothing: each one that is known takes a connection."""
_EXPIRE_INTERVAL_S = 1.0
_RETIRE_POLL_S = 0.05
_ROLE_NAMES = {
    WorkerRole.ENCODER: "encoder",
    WorkerRole.PREFILL: "prefill",
    WorkerRole.DECODE: "decode",
    WorkerRole.PREFILL_DECODE: "prefill-decode",
}


def no_worker(role: WorkerRole, model: ModelRef) -> NoWorker:
    """The error that names the role which is missing."""
    return NoWorker(f"No {_ROLE_NAMES[role]} worker of {model.name} is available. Try again in a moment.")


class WorkerPool:
    """All workers of the roster.

    Args:
        roster: who should be there.
        name: how the proxy introduces itself.
        catalog: which models it can serve.
        policies: how a worker of a role is chosen.
        announce_addr: where workers announce themselves; None: nowhere.
    """

    def __init__(
        self,
        roster: Roster,
        name: str,
        catalog: ModelCatalog,
        policies: dict[WorkerRole, Policy],
        announce_addr: str | None = None,
    ) -> None:
        self._roster = roster
        self._identity = Identity(name, catalog.reason_to_refuse)
        self._catalog = catalog
        self._policies = policies
        self._router = Router(announce_addr) if announce_addr else None
        self._connections: dict[Member, WorkerConnection] = {}
        self._runners: dict[Member, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._chores: set[asyncio.Task[None]] = set()
        self._complaints: set[str] = set()
        self.picture_sizes = PictureSizes()
        """Of all pictures that this proxy saw."""
        self._malformed_announcements = 0
        self.became_ready = asyncio.Event()
        """Set when a worker begins to take requests; another event takes its place then."""
        self.is_closing = False
        self.loop: asyncio.AbstractEventLoop
        """That it runs on, from `start` on."""

    async def start(self) -> None:
        """Connect to the workers of the roster and follow its changes.

        Raises:
            ConfigError: the announcement address can't be bound.
        """
        self.loop = asyncio.get_running_loop()
        if self._router is not None:
            self._router.bind()
            self._spawn(self._listen(self._router), "announcements")
        self._spawn(self._expire(), "roster leases")
        self._roster.subscribe(self._join, self._leave, self._change)

    async def tried(self) -> None:
        """Return when every worker that is known now has answered, or could not be reached at the first try."""
        await asyncio.gather(*(one.was_tried.wait() for one in self._connections.values()))

    async def close(self) -> None:
        """Drop all connections; requests in hand fail."""
        self.is_closing = True
        tasks = [*self._runners.values(), *self._retiring, *self._chores]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._runners.clear()
        self._connections.clear()
        if self._router is not None:
            self._router.close()

    def counters(self) -> dict[str, int]:
        """What went wrong at the address for announcements since the start."""
        return {
            "malformed_announcements": self._malformed_announcements,
            "refused_connections": self._router.refused if self._router is not None else 0,
        }

    def connections(self, role: WorkerRole | None = None) -> list[WorkerConnection]:
        """All connections, or those of a role, up or not."""
        return [one for one in self._connections.values() if role in (None, one.member.role)]

    def infos(self) -> list[WorkerInfo | None]:
        """What all workers say of themselves; None for those that are not up."""
        return [one.info for one in self._connections.values()]

    def up(self, role: WorkerRole, model: ModelRef) -> list[WorkerConnection]:
        """Those of a role that answer and serve the model. Encoders serve a checkpoint, whatever it is called."""
        is_encoder, catalog = role is WorkerRole.ENCODER, self._catalog
        return [
            one
            for one in self._connections.values()
            if one.member.role is role
            and (info := one.info) is not None
            and info.model == model.fingerprint
            and (is_encoder or (info.served_model_name or catalog.default_name(info.model)) == model.name)
        ]

    def ready(self, role: WorkerRole, model: ModelRef) -> list[WorkerConnection]:
        """Those of them that take new requests. If all failed too often, all of them: one may do it after all."""
        ready = [one for one in self.up(role, model) if one.is_ready and one.circuit.lets_through]
        return ready or [one for one in self.up(role, model) if one.is_ready]

    def pick(
        self,
        role: WorkerRole,
        model: ModelRef,
        key: str = "",
        *,
        avoid: Collection[str] = (),
        pictures: Collection[str] = (),
        units: float = 1.0,
        chain: Callable[[], Chain] = tuple,
        plan: Plan | None = None,
    ) -> WorkerConnection:
        """A worker for new work, by the role's policy.

        Args:
            role: of the worker.
            model: that it serves.
            key: what the work is about, for affinity.
            avoid: addresses of workers that just failed.
            pictures: content keys of the work: a worker that has them is preferred.
            units: size of the work, in prompt tokens or pictures of mean size.
            chain: gives that of the prompt, for affinity (`proxy.routing.prefix_affinity`).
            plan: what the same request places at the same time; this work is added to it.

        Raises:
            NoWorker: no other one is ready.
        """
        able = self.ready(role, model)
        if avoid:
            able = [one for one in able if one.member.address not in avoid]
        ready = {one.member.address: one for one in able if not one.is_full}
        ready = ready or {one.member.address: one for one in able}
        if not ready:
            raise no_worker(role, model)
        plan, policy = plan or Plan(), self._policies[role]
        if len(ready) == 1 and not policy.learns:
            (chosen,) = ready.values()
        else:
            candidates, slack = snapshots(ready, pictures, units, plan)
            chosen = ready[policy.pick(candidates, Question(key, chain, slack)).key]
        plan.note(chosen.member.address, units)
        return chosen

    # -- following the roster ------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._chores.add(task)
        task.add_done_callback(self._chore_done)

    def _chore_done(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s stopped by a bug", task.get_name(), exc_info=task.exception())

    def _join(self, member: Member) -> None:
        connection = WorkerConnection(
            member, self._identity, self._pd_addresses, lambda: self._came_up(member), self._on_ready
        )
        self._connections[member] = connection
        self._runners[member] = asyncio.create_task(connection.run(), name=f"worker {member.address}")

    def _came_up(self, member: Member) -> None:
        self._tell_encoders(member)
        connection, worker = self._connections.get(member), self._roster.worker(member)
        load = self._roster.load(member)
        if connection is None or connection.info is None or worker is None or load is None:
            return
        if worker.incarnation == connection.info.incarnation:  # until its first pong, its lease tells how busy it is
            connection.note_load(load)

    def _on_ready(self) -> None:
        news, self.became_ready = self.became_ready, asyncio.Event()
        news.set()

    def _leave(self, member: Member) -> None:
        log.info("%s %s left", member.role.value, member.address)
        self._retire(member)
        self._tell_encoders(member)

    def _change(self, member: Member) -> None:
        """Another state or incarnation, told faster than by the next ping."""
        connection, worker = self._connections.get(member), self._roster.worker(member)
        if connection is None or connection.info is None or worker is None:
            return  # it finds out when it connects
        if worker.incarnation != connection.info.incarnation:
            self._retire(member)
            self._join(member)
        elif worker.state is WorkerState.DRAINING:
            connection.state = worker.state

    def _retire(self, member: Member) -> None:
        """Take a connection out; requests in hand may end on it, if it lasts."""
        connection, runner = self._connections.pop(member, None), self._runners.pop(member, None)
        if connection is None or runner is None:
            return
        if not connection.in_hand:
            runner.cancel()
            return
        retiring = asyncio.create_task(_run_out(connection, runner), name=f"retire {member.address}")
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    def is_up(self, member: Member) -> bool:
        """Whether a worker is connected and answers."""
        connection = self._connections.get(member)
        return connection is not None and connection.info is not None

    def _pd_addresses(self, model: str) -> tuple[str, ...]:
        """Of one checkpoint. Who is down for a moment keeps its place."""
        pds = self.connections(WorkerRole.PREFILL_DECODE)
        return tuple(one.member.address for one in pds if one.model == model)

    def _tell_encoders(self, changed: Member) -> None:
        if changed.role is WorkerRole.PREFILL_DECODE:
            for encoder in self.connections(WorkerRole.ENCODER):
                self._spawn(_tell_peers(encoder), "peers")

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_INTERVAL_S)
            self._roster.expire()

    async def _listen(self, router: Router) -> None:
        """Turn announcements into members with a lease."""
        while True:
            try:
                _, message, _ = await router.receive()
            except ProtocolError as error:
                self._malformed_announcements += 1
                self._complain(f"dropped a malformed announcement: {error}")
                continue
            if isinstance(message, Announcement):
                self._announced(message)

    def _announced(self, message: Announcement) -> None:
        worker = message.worker
        try:
            address = endpoint(worker.address)
        except ConfigError as error:
            self._complain(f"announcement ignored: {error}")
            return
        if message.protocol_version != PROTOCOL_VERSION:
            self._complain(f"{address} refused: it speaks protocol {message.protocol_version}, not {PROTOCOL_VERSION}")
        elif Member(worker.role, address) not in self._connections and len(self._connections) >= _MAX_WORKERS:
            self._complain(f"{address} refused: {_MAX_WORKERS} workers are known already")
        else:  # also one that can't be used: its connection finds out, and is listed with the reason
            self._roster.renew(worker.role, address, worker=worker)

    def _complain(self, text: str) -> None:
        """Log once: announcements come every second."""
        if text not in self._complaints and len(self._complaints) < 1000:
            self._complaints.add(text)
            log.warning("%s", text)


async def _run_out(connection: WorkerConnection, runner: asyncio.Task[None]) -> None:
    """Cancel a connection when its last request has ended, as each does by its deadline."""
    try:
        while connection.in_hand and not runner.done():
            await asyncio.wait({runner}, timeout=_RETIRE_POLL_S)
    finally:
        runner.cancel()


async def _tell_peers(encoder: WorkerConnection) -> None:
    try:
        await encoder.tell_peers()
    except (WorkerFailed, PeerGone) as error:
        log.debug("%s was not told of its peers: %s", encoder.member.address, error)
