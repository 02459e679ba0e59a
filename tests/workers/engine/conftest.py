from __future__ import annotations

from pathlib import Path

import pytest

from tests import checkpoints
from tests.workers.engine.oracle import Oracle


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def qwen2_5_vl(folder: Path) -> Oracle:
    return Oracle(checkpoints.build_qwen2_5_vl(folder / "qwen2_5_vl"))


@pytest.fixture(scope="session")
def qwen2_vl(folder: Path) -> Oracle:
    return Oracle(checkpoints.build_qwen2_vl(folder / "qwen2_vl", tie_word_embeddings=True))


@pytest.fixture(scope="session")
def qwen2(folder: Path) -> Oracle:
    return Oracle(checkpoints.build_qwen2(folder / "qwen2"))


@pytest.fixture(params=["qwen2_5_vl", "qwen2_vl"])
def vision_oracle(request: pytest.FixtureRequest) -> Oracle:
    oracle: Oracle = request.getfixturevalue(request.param)
    return oracle


@pytest.fixture(params=["qwen2", "qwen2_5_vl", "qwen2_vl"])
def any_oracle(request: pytest.FixtureRequest) -> Oracle:
    oracle: Oracle = request.getfixturevalue(request.param)
    return oracle
