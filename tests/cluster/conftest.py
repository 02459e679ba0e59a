from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from epd.demo import CHECKPOINT_DIR
from tests import checkpoints
from tests.cluster.harness import Cluster, running


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that file:// URLs may name."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, media_folder: Path) -> Iterator[Cluster]:
    """The demo model over IPC: one encoder, one PD."""
    flags = ["--allowed-local-media-path", str(media_folder), "--allowed-private-media", "127.0.0.2/32"]
    cluster = Cluster(tmp_path_factory.mktemp("demo"), CHECKPOINT_DIR, proxy_flags=flags)
    with running(cluster):
        yield cluster


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen2_vl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A tiny random checkpoint, with chunks small enough that prompts of some length need several."""
    folder = tmp_path_factory.mktemp(request.param)
    model = getattr(checkpoints, f"build_{request.param}")(folder / "model")
    with running(Cluster(folder, model, pd_flags=["--max-num-batched-tokens", "64"])) as cluster:
        yield cluster
