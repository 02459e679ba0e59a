"""What is deleted of compiled code, and that nobody misses it."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from workers.engine import cache_files
from workers.engine.kernels import build

HOUR_S = 3600.0


def make(file: Path, hours: float, size: int = 100) -> Path:
    """A file that was used so many hours ago."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(size))
    age(file, hours)
    return file


def age(path: Path, hours: float) -> None:
    moment = time.time() - hours * HOUR_S
    os.utime(path, (moment, moment))


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    for hours, name in enumerate(("graph-a.bin", "inductor/ab/cd.main.so", "draw-1.so", "inductor/fxgraph/e"), 2):
        make(tmp_path / name, hours)
    again = make(tmp_path / "graph-old.bin", 90)
    assert cache_files.was_made(again)
    with (tmp_path / "draw-1.so").open("rb") as loading:
        age(tmp_path / "draw-1.so", 4)  # opening it counts
        cache_files.remove_old(tmp_path, kept_bytes=350)
        assert loading.read() == bytes(100)
    assert left(tmp_path) == {"graph-old.bin", "graph-a.bin", "inductor", "ab", "cd.main.so", "fxgraph"}


def test_reading_is_using(tmp_path: Path) -> None:
    for name in ("read", "written"):
        make(tmp_path / name, 9)
    os.utime(tmp_path / "read", (time.time(), time.time() - 9 * HOUR_S))
    cache_files.remove_old(tmp_path, kept_bytes=0)
    assert left(tmp_path) == {"read"}


def test_what_was_used_just_now_stays_whatever_its_size(tmp_path: Path) -> None:
    make(tmp_path / "graph-new.bin", 0.5, size=1000)
    make(tmp_path / "graph-old.bin", 2)
    cache_files.remove_old(tmp_path, kept_bytes=50)
    assert left(tmp_path) == {"graph-new.bin"}


def test_empty_files_and_folders_go_after_a_day(tmp_path: Path) -> None:
    for name, hours in (("graph-1.lock", 25), ("graph-2.lock", 2), ("compiled-0123", 25)):
        make(tmp_path / name, hours, size=0)
    kept = make(tmp_path / "kept" / "file", 99)
    for name, hours in (("old", 25), ("new", 2), ("kept", 25)):
        (tmp_path / name).mkdir(exist_ok=True)
        age(tmp_path / name, hours)
    cache_files.remove_old(tmp_path)
    assert left(tmp_path) == {"graph-2.lock", "new", "kept", "file"}
    assert kept.exists()


def test_several_may_tidy_up_at_once(tmp_path: Path) -> None:
    for index in range(300):
        make(tmp_path / f"{index % 10}" / f"{index}", 2 + index)
    ended: list[int] = []

    def tidy() -> None:
        cache_files.remove_old(tmp_path, kept_bytes=1050)
        ended.append(1)

    threads = [threading.Thread(target=tidy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 4
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 10


def test_a_folder_that_may_only_be_read_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "old", 9)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "unlink", refuse)
    cache_files.remove_old(tmp_path, kept_bytes=0)
    assert left(tmp_path) == {"old"}


def test_a_file_that_is_not_there_was_not_made(tmp_path: Path) -> None:
    assert not cache_files.was_made(tmp_path / "x")
    assert left(tmp_path) == set()


def test_a_kernel_that_was_deleted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has loaded it goes on with it; making it tidies up."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(cache_files, "remove_old", partial(cache_files.remove_old, kept_bytes=0))
    made: list[Path] = []

    def compile_it(found: str, source: Path, library: Path) -> None:
        made.append(library)
        library.write_bytes(b"a library")

    monkeypatch.setattr(build, "compiler", lambda: "/bin/sh")
    monkeypatch.setattr(build, "_compile", compile_it)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: path)
    load: Callable[[str], object] = build.load.__wrapped__
    forgotten = make(cache_files.folder() / "paged_attention-0.so", 9)
    found = [load("draw"), load("draw")]
    assert found == [str(made[0])] * 2
    assert len(made) == 1
    made[0].unlink()
    assert load("draw") == found[0]
    assert len(made) == 2
    assert not forgotten.exists()
