"""What holds for all tests, and what several folders of them share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from epd import collector

if TYPE_CHECKING:
    from tests.cluster.harness import Cluster

# The processes that share the tests share the cores as well, and more threads than cores wait for each other in every
# matrix product; those of the few tests that want several are not to wait in a busy loop, which would take ten times as
# long. Said before torch is imported, which asks once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Nor need Python look through a million imported objects again and again.
collector.start()


def pytest_collection_finish() -> None:
    """All test modules are imported."""
    collector.settle()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Behind the last test of a file, fail if the file has left something open: else another one would, some day.

    What was left in a cycle of references is found when Python collects those, which is at any time otherwise.
    """
    yield
    if nextitem is not None and nextitem.path == item.path:
        return
    if isinstance(item, pytest.Function):
        item.funcargs.clear()  # fixtures that are over, but held
    if left := left_open():
        pytest.fail(f"a test of {item.path.name} has left open:\n" + "\n".join(left), pytrace=False)


def left_open() -> list[str]:
    """What objects that nobody holds any more say as they go."""
    told: list[str] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda one: told.append(f"{one.exc_value!r} in {one.object!r}")
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before
    return told


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that file:// URLs may name."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def profile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers of `demo` write traces."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, media_folder: Path, profile_folder: Path) -> Iterator[Cluster]:
    """The demo model over IPC: one encoder, one PD."""
    from epd.demo import CHECKPOINT_DIR
    from tests.cluster.harness import Cluster, running  # most tests do without what it imports

    flags = ["--allowed-local-media-path", str(media_folder), "--allowed-private-media", "127.0.0.2/32"]
    traces = ["--profile-dir", str(profile_folder)]
    cluster = Cluster(tmp_path_factory.mktemp("demo"), CHECKPOINT_DIR, proxy_flags=flags, worker_flags=traces)
    with running(cluster):
        yield cluster
