"""The processes behind a worker whose model is shared by several: started, fed and watched by the first of them.

Orders go down one pipe for each process, its standard input, as frames with their length in front. The pipe is also
what tells a rank that the worker has gone: it ends, and the rank with it. The worker in turn waits for each process on
a thread of its own, since a rank that dies leaves the others in a collective that never ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from epd import collector
from epd.errors import ConfigError
from epd.observability import setup_logging
from workers.engine import model_loader, tensor_parallel
from workers.engine.config import EngineConfig
from workers.model_parts import load_config

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "epd", "rank")
_LENGTH_BYTES = 8
_LONGEST_FRAME = 1 << 32
_EXIT_FAILED = 1
_EXIT_CONFIG_ERROR = 2
_GRACE_S = 10.0
"""For a process to end by itself, or for the first rank to find what is wrong with its flags too."""

Died = Callable[[str], object]


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame: who a process is."""

    rank: int
    size: int
    rendezvous: str
    name: str
    """For its log."""
    log_level: str
    threads: int | None
    engine: EngineConfig


class Ranks:
    """Ranks 1 to size - 1 of a worker; the caller is rank 0. With a size of 1 there are none, and nothing happens."""

    def __init__(self, size: int) -> None:
        """Make no process yet."""
        self.size = size
        self.died: Died = _end_at_once
        """Called on a thread when a process ends before `stop`, with a sentence that says so. At first it ends this
        process too: while the model loads, nobody waits for an answer and nothing can interrupt the loading."""
        self._folder = tempfile.TemporaryDirectory(prefix="epd-ranks-", ignore_cleanup_errors=True)
        self._rendezvous = Path(self._folder.name) / "store"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._group: tensor_parallel.ParallelGroup | None = None
        self._is_stopping = threading.Event()

    def start(
        self, engine: EngineConfig, *, name: str, log_level: str, threads: int | None
    ) -> tensor_parallel.ParallelGroup | None:
        """Start the processes and meet them; they load the model at once.

        Args:
            engine: their settings, and the caller's.
            name: heads their log lines, with their number.
            log_level: as for `setup_logging`.
            threads: of torch, in each.

        Returns:
            The caller's place among them, for `load_engine`; None when it is alone.

        Raises:
            ConfigError: the model can't be shared by so many, or this machine can't run them.
        """
        if self.size == 1:
            return None
        tensor_parallel.check_model(load_config(engine.model), self.size)
        for rank in range(1, self.size):
            start = RankStart(
                rank=rank,
                size=self.size,
                rendezvous=str(self._rendezvous),
                name=f"{name}.{rank}",
                log_level=log_level,
                threads=threads,
                engine=engine,
            )
            process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE)  # noqa: S603  # ourselves
            self._processes.append(process)
            _write_frame(_pipe(process), msgspec.msgpack.encode(start))
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank {rank}", daemon=True).start()
        self._group = tensor_parallel.join(0, self.size, self._rendezvous, engine.device, self.send)
        return self._group

    @property
    def exit_codes(self) -> list[int | None]:
        """Of ranks 1, 2, …; None while one runs."""
        return [process.returncode for process in self._processes]

    def send(self, frame: bytes) -> None:
        """Hand an order to all. Raises OSError when one is gone."""
        for process in self._processes:
            _write_frame(_pipe(process), frame)

    def stop(self) -> None:
        """End the processes: those that carry out no order at once, the others by force."""
        self._is_stopping.set()
        leaving = threading.Thread(target=self._leave, name="leave", daemon=True)
        for process in self._processes:
            with contextlib.suppress(OSError):  # it is gone
                _pipe(process).close()
        # All leave at once: with NCCL they wait for each other there. One that is gone would be waited for in vain.
        if self._group is not None and all(process.poll() in (None, 0) for process in self._processes):
            leaving.start()
        for process in self._processes:
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if leaving.ident is not None:
            leaving.join(_GRACE_S)
        self._folder.cleanup()

    def _leave(self) -> None:
        try:
            tensor_parallel.leave(self._group)
        except Exception:  # the thread's edge, and the end of the process anyway
            log.exception("the ranks could not part")

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        # What one rank dislikes about the configuration the first most likely dislikes as well, and tells better.
        if code == _EXIT_CONFIG_ERROR and self._is_stopping.wait(_GRACE_S):
            return
        if not self._is_stopping.is_set():
            self.died(f"rank {rank} has ended ({code})")


def _end_at_once(reason: str) -> None:
    log.error("%s; the worker can't go on without it", reason)
    logging.shutdown()
    os._exit(_EXIT_FAILED)


def _pipe(process: subprocess.Popen[bytes]) -> BinaryIO:
    assert process.stdin is not None
    return process.stdin  # type: ignore[return-value]  # IO[bytes] has all that is used here


def _write_frame(pipe: BinaryIO, frame: bytes) -> None:
    pipe.write(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame)
    pipe.flush()


# -- in the other processes --------------------------------------------------------------------------------------------


def run_rank(pipe: BinaryIO) -> int:
    """Be one of the other ranks until the worker closes the pipe. Returns the exit code.

    Raises:
        ConfigError: the model can't be loaded here.
    """
    # Ctrl-C, or the end of a service, reaches all processes, but running requests are still finished.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    first = _read_frame(pipe)
    if first is None:
        return 0
    start = msgspec.msgpack.decode(first, type=RankStart)
    setup_logging(start.name, start.log_level)
    orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read_orders, args=(pipe, orders), name="orders", daemon=True).start()
    return _follow(start, iter(orders.get, None))


def _follow(start: RankStart, orders: Iterator[bytes]) -> int:
    if start.threads is not None:
        torch.set_num_threads(start.threads)
    group = tensor_parallel.join(start.rank, start.size, Path(start.rendezvous), start.engine.device)
    collector.keep()
    loaded = model_loader.load(start.engine, group)
    collector.settle()
    try:
        tensor_parallel.follow(
            orders, loaded.forward, group, hidden_size=loaded.info.hidden_size, dtype=loaded.info.dtype
        )
    except Exception:  # the process's edge: the first rank sees it end, and says so to whom it concerns
        log.exception("the model failed")
        return _EXIT_FAILED
    tensor_parallel.leave(group)
    return 0


def _read_orders(pipe: BinaryIO, orders: queue.SimpleQueue[bytes | None]) -> None:
    while (frame := _read_frame(pipe)) is not None:
        orders.put(frame)
    orders.put(None)
    # The worker has gone. The main thread may be in a collective that waits for it.
    threading.Event().wait(_GRACE_S)
    os._exit(_EXIT_FAILED)


def _read_frame(pipe: BinaryIO) -> bytes | None:
    """The next frame; None at the end. Raises ConfigError when what comes is no frame: nobody types into this pipe."""
    header = pipe.read(_LENGTH_BYTES)
    if not header:
        return None
    length = int.from_bytes(header, "little")
    if len(header) < _LENGTH_BYTES or length > _LONGEST_FRAME:
        raise ConfigError("`epd rank` is started by `epd pd --tp`, not by hand")
    frame = pipe.read(length)
    return frame if len(frame) == length else None
