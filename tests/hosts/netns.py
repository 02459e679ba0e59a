"""Hosts for tests: network namespaces on one bridge, each with its own address, loopback and ports.

    namespace of a host: eth0 ──veth── p3 ─┐
    namespace of a host: eth0 ──veth── p4 ─┴─ bridge, in a namespace of its own: the switch

Nothing touches the network of this machine. Links can be cut without a word to anybody (no RST, as when a cable is
pulled or a host loses power), and can delay and drop packets. Many kernels lack `tc netem`, so a small relay between
the bridge and the host's port does that (`tests.hosts.lossy_link`). Names begin with the id of the process that made
them: what a killed run left behind is found by the next and removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
_NAMES = Path("/run/netns")
_OURS = re.compile(r"epd(\d+)-")
_COMMAND_TIMEOUT_S = 20.0
_CLONE_NEWNET = 0x40000000
_SIOCETHTOOL = 0x8946
_OFFLOADS = (0x17, 0x1F, 0x24)  # ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO


def why_not() -> str | None:
    """Why this machine can't have such hosts, for people; None: it can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and the `ip` command of iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with network() as probe:
            probe.add_host("probe").impair(delay_ms=1)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        return f"the kernel has no network namespaces, veth, bridge or TAP for us: {told.strip()}"
    return None


def _ip(*words: str) -> str:
    """Run `ip`. Raises CalledProcessError with its message."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True)
    return done.stdout


class Network:
    """A switch and its hosts. Use `network()`, which removes everything at the end."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self._prefix = f"epd{os.getpid()}-{time.monotonic_ns() % 10**6}-"
        self.switch = f"{self._prefix}switch"
        """Namespace of the bridge, which has no address."""
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")

    def add_host(self, name: str) -> Host:
        """Another host, on the network. `name`: short, lower case."""
        host = Host(self, name, f"{self._prefix}{name}", len(self.hosts) + 1)
        self.hosts[name] = host
        return host

    def close(self) -> None:
        """End all processes on all hosts, and remove the hosts."""
        for host in self.hosts.values():
            host.mend()
        for name in (*(host.namespace for host in self.hosts.values()), self.switch):
            _remove(name)


class Host:
    """One network namespace.

    Args:
        network: its switch.
        name: for people.
        namespace: its name for `ip netns`.
        number: of the port on the switch, and in the address.
    """

    def __init__(self, network: Network, name: str, namespace: str, number: int) -> None:
        self.name, self.namespace = name, namespace
        self.address = f"10.77.0.{number}"
        self._switch = network.switch
        self._port = f"p{number}"
        self._tap = f"tap{number}"
        self._relay: subprocess.Popen[bytes] | None = None
        _ip("netns", "add", namespace)
        _ip("-n", self._switch, "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words before a command that is to run on this host. The process keeps its id."""
        return ("ip", "netns", "exec", self.namespace)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on this host: sockets that it makes, and those of its event loop, are the host's."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                _enter(self.namespace)
                results.append(function())
            except BaseException as error:  # raised in the thread that called
                errors.append(error)

        thread = threading.Thread(target=run, name=self.name)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    # -- faults ------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def heal(self) -> None:
        """Plug it in again."""
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def impair(self, *, delay_ms: float = 0.0, loss: float = 0.0) -> None:
        """Delay each packet from and to this host by so much, and drop this share of them, until `mend`."""
        assert self._relay is None, "mend it first"
        self.call(lambda: _no_offloads("eth0"))  # the relay wants packets as they are on a wire
        command = [sys.executable, "-m", "tests.hosts.lossy_link", self._port, self._tap, str(delay_ms), str(loss)]
        self._relay = subprocess.Popen(
            ["ip", "netns", "exec", self._switch, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != b"ready\n":
            _, told = self._relay.communicate(timeout=_COMMAND_TIMEOUT_S)
            self._relay = None
            raise OSError(f"no relay: {told.decode()[-500:]}")
        _ip("-n", self._switch, "link", "set", self._port, "nomaster")
        _ip("-n", self._switch, "link", "set", self._tap, "master", "bridge", "up")

    def mend(self) -> None:
        """Undo `impair`."""
        if self._relay is None:
            return
        relay, self._relay = self._relay, None
        relay.kill()
        relay.communicate(timeout=_COMMAND_TIMEOUT_S)  # its end of the cable goes with it
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge")

    def lose_packets_to(self, other: Host) -> None:
        """Let nothing through from this host to that one, which gets no word of it; the other way stays open."""
        _ip("-n", self.namespace, "route", "add", "blackhole", f"{other.address}/32")

    def reach_again(self, other: Host) -> None:
        """Undo `lose_packets_to`."""
        _ip("-n", self.namespace, "route", "del", "blackhole", f"{other.address}/32")

    def kill(self) -> None:
        """Lose power: off the network first, so that no dying process can say goodbye, then kill -9 of them all."""
        self.cut()
        _kill_all(self.namespace)


def _enter(namespace: str) -> None:
    """Move the calling thread to a namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_NAMES / namespace).open("rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), namespace)


def _no_offloads(interface: str) -> None:
    """Have the kernel fill in checksums and cut packets to size itself, in place of a card that veth does not have."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in _OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(any_socket, _SIOCETHTOOL, request)


def _kill_all(namespace: str) -> None:
    """kill -9 of every process in a namespace, and wait until they are gone from it."""
    deadline = time.monotonic() + _COMMAND_TIMEOUT_S
    while pids := [int(word) for word in _ip("netns", "pids", namespace).split()]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} of {namespace} do not end")
        time.sleep(0.01)


def _remove(namespace: str) -> None:
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        _kill_all(namespace)
    with contextlib.suppress(subprocess.SubprocessError):  # gone already
        _ip("netns", "del", namespace)


def _sweep() -> None:
    """Remove what runs that were killed have left."""
    names = os.listdir(_NAMES) if _NAMES.is_dir() else []
    for name in names:
        found = _OURS.match(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A switch without hosts; everything on it is ended and removed at the end of the `with` block."""
    _sweep()
    made = Network()
    try:
        yield made
    finally:
        made.close()


__all__ = ["Host", "Network", "network", "why_not"]
