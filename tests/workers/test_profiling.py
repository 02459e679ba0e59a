"""Real traces of a thread that computes."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from epd.errors import ConfigError
from epd.messages import Profile, ProfileReply
from workers.profiling import Profiler


class Busy:
    """A thread that multiplies, and counts."""

    def __init__(self) -> None:
        self.steps = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()

    def _run(self) -> None:
        matrix = torch.ones(4, 4)
        while not self._is_over.wait(0.002):
            torch.matmul(matrix, matrix)
            self.steps += 1

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()


@pytest.fixture
def busy() -> Iterator[Busy]:
    thread = Busy()
    yield thread
    thread.end()


def operations(file: Path) -> set[str]:
    with gzip.open(file) as opened:
        trace: Any = json.load(opened)
    return {event.get("name") for event in trace["traceEvents"]}


def ask(profiler: Profiler, *, start: bool, **bounds: Any) -> Any:
    return profiler.handle(Profile(sequence=7, start=start, **bounds))


async def test_a_recording_is_ended_by_a_message_by_steps_and_by_time(busy: Busy, tmp_path: Path) -> None:
    pauses: list[float] = []

    async def pausing(seconds: float) -> None:
        pauses.append(seconds)

    profiler = Profiler(tmp_path / "new", "10.0.0.2:7001/../x", lambda: busy.steps, pausing)
    assert (await ask(profiler, start=False)) == ProfileReply(sequence=7, state="idle")
    files: list[str] = []
    for bounds in ({}, {"steps": 3}, {"seconds": 0.05}):
        started = await ask(profiler, start=True, **bounds)
        assert (started.state, started.files) == ("started", ())
        before = busy.steps
        async with asyncio.timeout(30):
            while busy.steps < before + 3:
                await asyncio.sleep(0.001)
        if bounds:  # it ends by itself
            async with asyncio.timeout(30):
                while len(list((tmp_path / "new").glob("*.gz"))) == len(files):
                    await asyncio.sleep(0.01)
        else:
            assert (await ask(profiler, start=True)).state == "running"
        stopped = await ask(profiler, start=False)
        assert stopped.state == "stopped"
        (name,) = stopped.files
        assert name.startswith("10.0.0.2_7001_.._x-")
        assert "aten::matmul" in operations(tmp_path / "new" / name)
        files.append(name)
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == sorted(set(files))
    assert len(pauses) == 3
    await ask(profiler, start=True)
    await profiler.close()
    assert len(list((tmp_path / "new").iterdir())) == 4


async def test_what_can_not_be_written_costs_the_trace_alone(tmp_path: Path) -> None:
    async def pausing(seconds: float) -> None:
        pass

    folder = tmp_path / "traces"
    profiler = Profiler(folder, "pd", lambda: 0, pausing)
    assert (await ask(profiler, start=True)).state == "started"
    folder.rmdir()
    failed = await ask(profiler, start=False)
    assert (failed.state, failed.files) == ("failed", ())
    assert failed.message
    assert (await ask(profiler, start=False)).state == "idle"
    await profiler.close()


async def test_without_a_folder_nothing_is_recorded(tmp_path: Path) -> None:
    async def pausing(seconds: float) -> None:
        pass

    profiler = Profiler(None, "pd", lambda: 0, pausing)
    assert (await ask(profiler, start=True)).state == "off"
    await profiler.close()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="--profile-dir"):
        Profiler(file, "pd", lambda: 0, pausing)
