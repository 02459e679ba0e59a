from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import checkpoints
from tests.cluster.harness import Cluster, running


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen2_vl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A tiny random checkpoint, with chunks small enough that prompts of some length need several."""
    folder = tmp_path_factory.mktemp(request.param)
    model = getattr(checkpoints, f"build_{request.param}")(folder / "model")
    with running(Cluster(folder, model, pd_flags=["--max-num-batched-tokens", "64"])) as cluster:
        yield cluster
