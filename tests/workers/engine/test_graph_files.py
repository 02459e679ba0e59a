"""Several processes and one graph file; real processes, whose locks are real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers.engine import graph_files

HOLD = """
import sys
from pathlib import Path
from workers.engine import graph_files
file = Path(sys.argv[1])
with graph_files.only_maker(file, timeout_s=10):
    print("mine", flush=True)
    if sys.stdin.readline():
        file.write_text("made there")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "graph-0123.bin"


def another_maker(file: Path) -> subprocess.Popen[str]:
    """A process that makes the file when told a line, and has the lock already."""
    words = [sys.executable, "-c", HOLD, str(file)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "mine\n"
    return child


def end(child: subprocess.Popen[str], words: str = "") -> None:
    child.communicate(words, timeout=20)


def test_who_comes_second_waits_and_finds_what_the_first_made(file: Path) -> None:
    child = another_maker(file)
    try:
        with pytest.raises(TimeoutError, match="another process"), graph_files.only_maker(file, timeout_s=0.05):
            pass
        assert child.stdin is not None
        child.stdin.write("go on\n")
        child.stdin.flush()
        with graph_files.only_maker(file, timeout_s=20):
            assert file.read_text() == "made there"
    finally:
        end(child)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_lock_dies_with_its_process(file: Path) -> None:
    child = another_maker(file)
    child.kill()
    end(child)
    with graph_files.only_maker(file, timeout_s=20):
        assert not file.exists()
