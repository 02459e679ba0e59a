"""The GPU check itself, dry: on a CPU and tiny shapes it runs to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import check

ROOT = Path(__file__).resolve().parents[2]


def test_a_dry_run_finds_right_values_and_writes_its_report(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [str(ROOT / "deploy/gpu-check.sh"), str(report), "--device", "cpu", "--size", "tiny"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text()
    assert "| 8 of 8 | all | yes |" in text
    for heading in ("## Machine", "## Values", "## Speed", "decode step, batch 4", "prefill, 256 tokens"):
        assert heading in text
    assert text.endswith("Everything judged is as wanted.\n")


def test_without_cuda_it_says_so_and_ends_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([str(tmp_path / "report.md")]) == 2
    assert not (tmp_path / "report.md").exists()


def test_what_is_not_as_wanted_is_named_at_the_end() -> None:
    report = check.Report()
    report.add("Speed", "decode step", "2 ms", "at most 1 ms", False)
    report.add("Speed", "prefill", "9 tokens/s")
    assert "| decode step | 2 ms | at most 1 ms | **no** |" in report.markdown()
    assert report.markdown().endswith("Not as wanted: decode step.\n")
