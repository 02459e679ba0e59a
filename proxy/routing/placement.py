"""What a routing policy sees: snapshots of the workers, in one common unit of load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from proxy.cluster.worker_connection import WorkerConnection
from proxy.routing.policies import Candidate

_MOST_RIVALS = 8.0
"""Proxies that are reckoned with at most, this one included."""
_NOTHING: Sequence[float] = ()


class Plan:
    """What a request is about to place but has not sent yet, so that its own pieces spread over the workers."""

    def __init__(self) -> None:
        self._units: defaultdict[str, list[float]] = defaultdict(list)

    def note(self, address: str, units: float) -> None:
        """A piece of so many units is to go to this worker."""
        self._units[address].append(units)

    def at(self, address: str) -> Sequence[float]:
        """Units of each piece that is to go there."""
        return self._units.get(address, _NOTHING)


class PictureSizes:
    """What a picture of mean size is: the unit of an encoder's work."""

    def __init__(self) -> None:
        self._mean = 0.0

    def note(self, pixels: int) -> None:
        """A picture of so many pixels came by."""
        self._mean = pixels if not self._mean else 0.98 * self._mean + 0.02 * pixels

    def units(self, pixels: int) -> float:
        """Its work in pictures of mean size, within bounds: large ones are scaled down, small ones have fixed costs."""
        return min(max(pixels / self._mean, 0.25), 4.0) if self._mean and pixels else 1.0


def snapshots(
    workers: Mapping[str, WorkerConnection], pictures: Collection[str], units: float, plan: Plan
) -> tuple[list[Candidate], float]:
    """Candidates for a piece of work of so many `units`, and the slack of their loads (see `Question`).

    Loads are in milliseconds when all workers know how long a unit takes them, else in requests.

    Args:
        workers: address → connection, all of one role.
        pictures: content keys of the work.
        units: prompt tokens, or pictures of mean size.
        plan: what the same request places besides.
    """
    ledgers = [worker.ledger for worker in workers.values()]
    mine = sum(ledger.reported_mine for ledger in ledgers)
    rivals = min(1 + sum(ledger.foreign for ledger in ledgers) / max(mine, 1), _MOST_RIVALS)
    in_ms = all(ledger.rate > 0 for ledger in ledgers)
    candidates = []
    for address, worker in workers.items():
        ledger, planned = worker.ledger, plan.at(address)
        candidates.append(
            Candidate(
                key=address,
                load=ledger.outstanding_ms(rivals) + rivals * ledger.rate * sum(planned)
                if in_ms
                else ledger.requests(rivals) + rivals * len(planned),
                held=len(worker.pictures.among(pictures)),
                cost=ledger.rate * units if in_ms else 1.0,
                joins=any(ledger.has(picture) for picture in pictures),
                life=worker.info.incarnation if worker.info else "",
            )
        )
    return candidates, (rivals - 1) / 2
