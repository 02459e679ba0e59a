"""Ports that a test may give to a process which binds them a moment later."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket

# Below the ports that systems hand out by themselves, to those who ask for any and to those who connect: between the
# look at such a port and its use it may be taken. Redis servers of a cluster use one 10000 above besides.
_FIRST, _LAST = 12000, 21999


def _candidates() -> itertools.cycle[int]:
    """Each of the processes that share the tests has ports of its own; a second run on this host begins elsewhere."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    ports = range(_FIRST + int(worker), _LAST, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    start = random.SystemRandom().randrange(len(ports))
    return itertools.cycle((*ports[start:], *ports[:start]))


_ports = _candidates()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses, nor the one 10000 above, and that no test is given again soon."""
    for port in itertools.islice(_ports, _LAST - _FIRST):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as above:
            one.bind(("127.0.0.1", port))
            above.bind(("127.0.0.1", port + 10000))
            return port
    raise AssertionError(f"no free port from {_FIRST} to {_LAST}")
