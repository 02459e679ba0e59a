"""Traces of what a worker computes: torch.profiler, begun and ended by messages, within bounds.

Recording costs time in every operation, and what was recorded stays in memory until it is written, during which torch
lets no other thread run. So a recording ends by itself after some seconds or steps, whichever comes first, and all
peers are told of the pause. With several processes for one model the first one is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import os
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from epd.errors import ConfigError
from epd.messages import Profile, ProfileReply

log = logging.getLogger(__name__)

MAX_SECONDS = 600.0
MAX_STEPS = 10_000
PAUSE_S = 20.0
"""Writing may take so long; a hundred steps take about a second."""
_LOOK_INTERVAL_S = 0.02
_MAX_FILES = 64
"""Names that wait for a reply; of more the oldest are forgotten."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class Profiler:
    """Of one worker. Used on the event loop; a thread of its own does what blocks.

    Args:
        folder: for the traces; None: there are to be none.
        name: of the worker, for the names of files.
        steps: how many steps have ended since the start.
        pausing: awaited with the seconds for which nothing may be heard of this process, before that.

    Raises:
        ConfigError: the folder can't be made or written to.
    """

    def __init__(
        self, folder: Path | None, name: str, steps: Callable[[], int], pausing: Callable[[float], Awaitable[None]]
    ) -> None:
        self._folder = folder
        self._name = _UNSAFE.sub("_", name).strip("._") or "worker"
        self._steps = steps
        self._pausing = pausing
        self._thread = ThreadPoolExecutor(1, "profiler")
        self._turn = asyncio.Lock()
        self._recording: asyncio.Task[None] | None = None
        self._is_wanted = asyncio.Event()
        """Somebody waits for the end of the recording."""
        self._files: list[str] = []
        self._failure = ""
        if folder is not None:
            _check_folder(folder)

    async def handle(self, message: Profile) -> ProfileReply:
        """Begin or end a recording. What goes wrong is in the reply."""
        if self._folder is None:
            return ProfileReply(sequence=message.sequence, state="off")
        async with self._turn:
            state = await (self._start(message) if message.start else self._stop())
            files, self._files = tuple(self._files), []
            failure, self._failure = self._failure, ""
        return ProfileReply(
            sequence=message.sequence, state="failed" if failure else state, files=files, message=failure
        )

    async def close(self) -> None:
        """End what is recorded, and write it."""
        async with self._turn:
            await self._stop()
        self._thread.shutdown()

    async def _start(self, message: Profile) -> str:
        if self._recording is not None and not self._recording.done():
            return "running"
        seconds = min(max(message.seconds, 0.0), MAX_SECONDS)
        steps = min(max(message.steps, 1), MAX_STEPS)
        try:
            recorder = await asyncio.get_running_loop().run_in_executor(self._thread, _begin)
        except Exception as error:  # torch's own; the worker goes on without a trace
            log.exception("profiling did not begin")
            self._failure = _short(error)
            return "failed"
        log.info("profiling for %g s or %d steps", seconds, steps)
        self._is_wanted.clear()
        self._recording = asyncio.create_task(self._record(recorder, seconds, steps), name="profile")
        return "started"

    async def _stop(self) -> str:
        if self._recording is None:
            return "idle"
        self._is_wanted.set()
        await self._recording
        self._recording = None
        return "stopped"

    async def _record(self, recorder: Any, seconds: float, steps: int) -> None:
        """Wait for the end, then write the trace down."""
        last, until = self._steps() + steps, time.monotonic() + seconds
        while self._steps() < last and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_INTERVAL_S):
                    await self._is_wanted.wait()
                    break
        await self._pausing(PAUSE_S)
        try:
            name = await asyncio.get_running_loop().run_in_executor(self._thread, self._write, recorder)
        except Exception as error:  # torch's own, or a full disk; the worker goes on without a trace
            log.exception("the profile could not be written")
            self._failure = _short(error)
        else:
            log.info("profile written: %s", name)
            self._files = [*self._files, name][-_MAX_FILES:]

    def _write(self, recorder: Any) -> str:
        """Runs on the profiler's thread. Returns the name of the file, which is there as a whole or not at all."""
        assert self._folder is not None
        recorder.stop()
        name = f"{self._name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 10**6}.json.gz"
        raw, packed = self._folder / f".{name}.raw", self._folder / f".{name}.part"
        try:
            recorder.export_chrome_trace(str(raw))
            with raw.open("rb") as source, gzip.open(packed, "wb", compresslevel=5) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            packed.replace(self._folder / name)
        finally:
            raw.unlink(missing_ok=True)
            packed.unlink(missing_ok=True)
        return name


def _begin() -> Any:
    """Runs on the profiler's thread."""
    import torch  # noqa: PLC0415 - not before somebody asks for it: tests run workers without
    from torch._C._profiler import _ExperimentalConfig  # noqa: PLC0415

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # The work is done on other threads than this one; Python objects for each event would take minutes to make.
    try:
        options = _ExperimentalConfig(profile_all_threads=True, trace_only=True)
    except TypeError:  # before torch 2.13
        options = _ExperimentalConfig(profile_all_threads=True)
    recorder = torch.profiler.profile(activities=activities, experimental_config=options)
    recorder.start()
    return recorder


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--profile-dir {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--profile-dir {folder}: this process may not write there")
