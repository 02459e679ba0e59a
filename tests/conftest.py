"""What holds for all tests, and what several folders of them share."""

from __future__ import annotations

import os
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
