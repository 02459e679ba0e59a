"""A bad cable: passes Ethernet frames between a port and a TAP device, late, and not all of them.

    python -m tests.hosts.lossy_link PORT TAP DELAY_MS LOSS

Runs in the namespace of the switch until it is killed, and prints `ready` when the TAP device is there. It does what
tc-netem(8) does where a kernel has it. Frames keep their order; a direction that holds too many drops the newest, as a
full queue does.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_ETH_P_ALL = 0x0003
_FRAME_BYTES = 65536
_MAX_HELD = 5000


def _open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


class _Direction:
    """Frames on their way from one end to the other."""

    def __init__(self, read: Callable[[], bytes | None], write: Callable[[bytes], object]) -> None:
        self._read, self._write = read, write
        self._held: deque[tuple[float, bytes]] = deque()

    def take(self, delay_s: float, loss: float) -> None:
        """Read all that is there."""
        while (frame := self._read()) is not None:
            if random.random() >= loss and len(self._held) < _MAX_HELD:
                self._held.append((time.monotonic() + delay_s, frame))

    def pass_on(self) -> float | None:
        """Write all that is due. Returns the seconds until the next is; None: there is none."""
        while self._held and self._held[0][0] <= time.monotonic():
            try:
                self._write(self._held.popleft()[1])
            except OSError:  # the other end is down, or full: the frame is lost
                continue
        return max(0.0, self._held[0][0] - time.monotonic()) if self._held else None


def main(port_name: str, tap_name: str, delay_ms: str, loss: str) -> None:
    """Pass frames for ever."""
    tap = _open_tap(tap_name)
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    port.setblocking(False)
    port.bind((port_name, _ETH_P_ALL))

    def from_tap() -> bytes | None:
        try:
            return os.read(tap, _FRAME_BYTES)
        except OSError:  # nothing there, or not up yet
            return None

    def from_port() -> bytes | None:
        while True:
            try:
                frame, (_, _, kind, *_) = port.recvfrom(_FRAME_BYTES)
            except OSError:
                return None
            if kind != socket.PACKET_OUTGOING:  # those are our own
                return frame

    directions = [_Direction(from_port, lambda frame: os.write(tap, frame)), _Direction(from_tap, port.send)]
    print("ready", flush=True)
    while True:
        waits = [wait for one in directions if (wait := one.pass_on()) is not None]
        # A TAP device that is down reads as an error at once, so never spin on it.
        select.select([port.fileno(), tap], [], [], min(waits, default=1.0))
        for one in directions:
            one.take(float(delay_ms) / 1000, float(loss))


if __name__ == "__main__":
    main(*sys.argv[1:])
