"""What one worker has in hand for this proxy: requests and pictures, and who wants to hear of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from epd.errors import EPDError, WorkerFailed
from epd.messages import EncodeResult, TokenOutput
from proxy.routing.work_ledger import WorkLedger

OutputSink = Callable[[TokenOutput | EPDError], None]
EncodeSink = Callable[[EncodeResult | EPDError], None]
EncodeKey = tuple[str, int]


class WorkerGone(WorkerFailed):
    """The connection to a worker ended, or it is stuck, with the request in hand.

    Args:
        message: for the client.
        died: whether the worker may have died of the request: it had it, and said something after that or broke off.
    """

    def __init__(self, message: str, *, died: bool = True) -> None:
        super().__init__(message)
        self.died = died


@dataclass(frozen=True)
class Lost:
    """A request that a worker had in hand when it went."""

    sink: Callable[[EPDError], None]
    was_heard: bool
    """Whether the worker was heard after the request was sent."""


class InHand:
    """Requests and pictures by id. Counts what is heard, to tell what a worker may have died of.

    Args:
        ledger: of the worker's work, which is told of what leaves it.
    """

    def __init__(self, ledger: WorkLedger) -> None:
        self._ledger = ledger
        self.generations: dict[str, OutputSink] = {}
        self.encodes: dict[EncodeKey, EncodeSink] = {}
        self._heard = 0
        self._heard_when_sent: dict[str | EncodeKey, int] = {}

    def __len__(self) -> int:
        return len(self.generations) + len(self.encodes)

    def heard(self) -> None:
        """The worker gave a sign of life."""
        self._heard += 1

    def add_generation(self, request_id: str, sink: OutputSink) -> None:
        """A request is about to be sent."""
        self.generations[request_id] = sink
        self._heard_when_sent[request_id] = self._heard

    def add_encode(self, key: EncodeKey, sink: EncodeSink) -> None:
        """A picture is about to be sent."""
        self.encodes[key] = sink
        self._heard_when_sent[key] = self._heard

    def take_generation(self, request_id: str) -> OutputSink | None:
        """Whoever waits for the last word of a request; it is in hand no more."""
        self._heard_when_sent.pop(request_id, None)
        self._ledger.ended(request_id)
        return self.generations.pop(request_id, None)

    def take_encode(self, key: EncodeKey) -> EncodeSink | None:
        """The same for a picture."""
        self._heard_when_sent.pop(key, None)
        self._ledger.ended(key)
        return self.encodes.pop(key, None)

    def forget(self, request_id: str) -> bool:
        """Nobody wants to hear of this request any more. False: it was not in hand."""
        pictures = [self.take_encode(key) for key in [key for key in self.encodes if key[0] == request_id]]
        return self.take_generation(request_id) is not None or bool(pictures)

    def take_all(self) -> list[Lost]:
        """Everything; nothing is in hand afterwards."""
        before = self._heard_when_sent
        for each in before:
            self._ledger.ended(each)
        lost = [Lost(sink, self._heard > before[key]) for key, sink in self.generations.items()]
        lost += [Lost(sink, self._heard > before[key]) for key, sink in self.encodes.items()]
        self.generations.clear()
        self.encodes.clear()
        self._heard_when_sent.clear()
        return lost

    def ids(self) -> tuple[str, ...]:
        """Ids of all requests and pictures, as `Abort` names them."""
        return (*self.generations, *dict.fromkeys(key[0] for key in self.encodes))
