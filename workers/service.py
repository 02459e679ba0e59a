"""What a worker's work and the runtime around it (`workers.runtime`) know of each other."""

from __future__ import annotations

from typing import Protocol

from epd.codec import Buffer
from epd.messages import AnyMessage, Load, StageStats
from workers.stall_watch import Progress


class Send(Protocol):
    """Answers a peer. A peer that has vanished is no error for the caller: `Service.peer_gone` tells the service."""

    async def __call__(self, peer: bytes, message: AnyMessage, *buffers: Buffer) -> bool:
        """True when it was handed to the peer's connection."""
        ...


class Service(Protocol):
    """The work of one kind of worker. All methods are called on the event loop."""

    def handle(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        """Take a message that the runtime does not answer itself. Must not block.

        Raises:
            ProtocolError: this worker does not take such a message.
        """

    def peer_gone(self, peer: bytes) -> None:
        """Stop everything that was done for this peer."""

    async def drain(self) -> None:
        """Refuse new work from now on; return when the running work is finished and answered."""

    async def hand_over(self) -> None:
        """End the work that is left with `HandedOver`, so that its askers go on elsewhere; return when they were told.

        Called after `drain`, which may not have returned, when the time for draining is over.
        """

    async def stop(self) -> None:
        """End threads and connections. Called once, whether drained or not."""

    def load(self) -> Load:
        """What `Pong` and the roster show."""

    def progress(self) -> Progress:
        """Whether the work moves; asked ten times a second."""

    def stages(self) -> dict[str, StageStats]:
        """Durations since start."""

    def counters(self) -> dict[str, int]:
        """Counts since start."""
