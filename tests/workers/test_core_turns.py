"""Turns between real processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from workers import core_turns
from workers.core_turns import CoreTurns
from workers.families import FAMILIES
from workers.vision import VisionModel

_HOLD = """
import sys
from pathlib import Path
from workers.core_turns import CoreTurns
with CoreTurns(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process within its turn, until its input ends."""
    words = [sys.executable, "-c", _HOLD, str(tmp_path / "turns")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def take(path: Path, entered: threading.Event) -> threading.Thread:
    def run() -> None:
        with CoreTurns(path, longest_wait_s=60):
            entered.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_turn_ends_with_its_process_or_before(holder: subprocess.Popen[str], tmp_path: Path, is_killed: bool) -> None:
    entered = threading.Event()
    thread = take(tmp_path / "turns", entered)
    assert not entered.wait(0.2)
    if is_killed:
        holder.kill()
    else:
        assert holder.stdin is not None
        holder.stdin.close()
    assert entered.wait(20)
    thread.join()


def test_who_hangs_in_a_turn_does_not_stop_the_others(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    turns = CoreTurns(tmp_path / "turns", longest_wait_s=0.05)
    with turns:
        assert holder.poll() is None
    turns._longest_wait_s = 3600.0
    with turns:  # has waited once, and does not wait again
        assert holder.poll() is None
    holder.kill()
    holder.wait()
    with turns:
        entered = threading.Event()
        thread = take(tmp_path / "turns", entered)
        assert not entered.wait(0.2)  # turns are as before
    thread.join()


def test_who_waits_goes_before_who_wants_another_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one gets in although this one takes its next turn at once."""
    monkeypatch.setattr(core_turns, "SLICE_S", 0.0)
    monkeypatch.setattr(core_turns, "PERIOD_S", 0.0)
    turns, entered = CoreTurns(tmp_path / "turns", longest_wait_s=60), threading.Event()
    with turns:
        thread = take(tmp_path / "turns", entered)
        for _ in range(1_000_000):
            turns.give_way()
            if entered.is_set():
                break
        assert entered.is_set()
    thread.join()
    turns.close()


def test_turns_are_kept_for_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_turns, "SLICE_S", 3600.0)
    turns, entered = CoreTurns(tmp_path / "turns"), threading.Event()
    with turns:
        thread = take(tmp_path / "turns", entered)
        for _ in range(1000):
            turns.give_way()
        assert not entered.is_set()
    assert entered.wait(20)
    thread.join()


def test_without_a_path_there_is_nothing_to_wait_for() -> None:
    first, second = CoreTurns(None), CoreTurns(None)
    with first, second:
        first.give_way()
    first.close()


def test_a_tower_gives_way_before_each_layer(tmp_path: Path) -> None:
    class Turns(CoreTurns):
        pauses = 0

        def give_way(self) -> None:
            self.pauses += 1

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Identity(), nn.Identity()) for _ in range(3))
            self.merger = nn.Identity()

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                rows = block(rows)
            return rows

    tower: Any = Tower()
    turns, unused = Turns(None), cast(Any, None)
    vision = VisionModel(tower, FAMILIES["llava"], unused, torch.device("cpu"))
    vision.take_turns(turns)
    tower(torch.zeros(1))
    assert turns.pauses == 3 * 3
