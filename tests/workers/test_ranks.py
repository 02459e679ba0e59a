"""How the processes that share a model part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workers import ranks
from workers.engine import tensor_parallel
from workers.engine.tensor_parallel import ParallelGroup

RANK = """
import pathlib, sys, time
sys.stdin.buffer.read()  # until the worker closes it
deadline = time.monotonic() + 10
while not pathlib.Path(sys.argv[1]).exists():  # as NCCL waits for the others in the end of a group
    if time.monotonic() > deadline:
        sys.exit(3)
    time.sleep(0.005)
"""


def started(marker: Path, script: str = RANK) -> ranks.Ranks:
    """Two ranks, this process and another; what `join` would do is done."""
    two = ranks.Ranks(2)
    two._processes.append(subprocess.Popen([sys.executable, "-c", script, str(marker)], stdin=subprocess.PIPE))
    two._group = ParallelGroup(0, 2, torch.device("cpu"))
    return two


def test_all_ranks_leave_their_group_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "left"
    monkeypatch.setattr(tensor_parallel, "leave", lambda _: marker.touch())
    two = started(marker)
    two.stop()
    assert two.exit_codes == [0]


def test_nobody_waits_in_a_group_for_a_rank_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "left"
    monkeypatch.setattr(tensor_parallel, "leave", lambda _: marker.touch())
    two = started(marker, "raise SystemExit(1)")
    two._processes[0].wait(20)
    two.stop()
    assert not marker.exists()


def test_a_group_that_does_not_end_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_GRACE_S", 0.05)
    two = started(tmp_path / "never")
    monkeypatch.setattr(tensor_parallel, "leave", lambda _: two._processes[0].wait())  # as long as the other one lives
    two.stop()
    assert two.exit_codes == [-9]
