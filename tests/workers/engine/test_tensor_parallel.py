"""Two ranks, real processes: the same tokens as transformers' own; and what happens when one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from epd.errors import ConfigError
from tests import checkpoints
from tests.workers.engine.oracle import IMAGE, Answers, Oracle, add, greedy, picture, provide
from workers.engine import tensor_parallel
from workers.engine.assembly import load_engine
from workers.engine.attention import PackedChunk
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.step_inputs import ImageRows, StepInputs
from workers.engine.tensor_parallel import ComputeHidden, LeadingForward
from workers.model_parts import load_config
from workers.ranks import Ranks


@dataclass
class Shared:
    """A model that two processes share, this one and another."""

    oracle: Oracle
    engine: Engine


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_tied"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen2_5_vl":
        path = checkpoints.build_qwen2_5_vl(folder)
    else:
        path = checkpoints.build_qwen2(folder, tie_word_embeddings=True)
    config = EngineConfig(
        model=str(path),
        dtype="float32",
        device="cpu",
        max_num_seqs=8,
        max_num_batched_tokens=16,
        kv_cache_memory_bytes=2 << 20,
    )
    deaths: list[str] = []
    ranks = Ranks(2)
    ranks.died = deaths.append
    try:
        group = ranks.start(config, name="test", log_level="info", threads=1)
        yield Shared(Oracle(path), load_engine(config, group=group))
    finally:
        ranks.stop()
        tensor_parallel.leave(None)
    assert (ranks.exit_codes, deaths) == ([0], [])


def test_each_rank_keeps_its_share_of_the_heads(shared: Shared) -> None:
    runner: Any = shared.engine._runner
    cache = runner._forward._local._backend.cache
    assert cache.keys[0].shape[2] == 1  # of two kv heads


def test_a_batch_in_chunks_equals_generate(shared: Shared) -> None:
    oracle, engine = shared.oracle, shared.engine
    answers, expected = Answers(), {}
    for index in range(5):
        pictures = [picture(index + k) for k in range(index % 3)] if oracle.multimodal else []
        encoded = [oracle.encode(image, f"{index}-{k}") for k, image in enumerate(pictures)]
        prompt = oracle.prompt(
            f"number {index} " * (1 + 3 * index) + f"{IMAGE} and " * len(pictures) + "what?", encoded
        )
        expected[f"r{index}"] = oracle.generate(prompt, pictures, max_tokens=8 + index)
        for one in encoded:
            provide(engine, one)
        add(engine, f"r{index}", prompt, greedy(8 + index))
        answers.take(engine.step())
    assert answers.drain(engine).tokens == expected


# -- one process -------------------------------------------------------------------------------------------------------


class Recorder:
    """A forward that computes nothing, and fails when told to."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def hidden(self, inputs: StepInputs) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        return torch.zeros(1, 4)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def step_inputs() -> StepInputs:
    chunks = (PackedChunk(0, 1, 40, (3, 1, 2)), PackedChunk(1, 2, 0, (7,), ((0, 2),)))
    images = (ImageRows(torch.tensor([1, 2]), torch.randn(2, 4).bfloat16()),)
    positions = torch.tensor([40, 0, 1]).expand(3, -1)
    return StepInputs(chunks, torch.tensor([5, 9, 9]), positions, images, torch.tensor([0, 2]))


def test_an_order_carries_all_of_a_step() -> None:
    frames: list[bytes] = []
    inputs = step_inputs()
    LeadingForward(Recorder(), frames.append).hidden(inputs)
    (frame,) = frames
    order = tensor_parallel._decoder.decode(frame)
    assert isinstance(order, ComputeHidden)
    assert order.inputs.chunks == inputs.chunks
    for name in ("token_ids", "positions", "wanted"):
        assert torch.equal(getattr(order.inputs, name), getattr(inputs, name))
    (image,), (expected,) = order.inputs.images, inputs.images
    assert torch.equal(image.rows, expected.rows)
    assert image.rows.dtype is torch.bfloat16
    assert torch.equal(image.targets, expected.targets)


def test_after_a_failure_no_order_is_given_any_more() -> None:
    """A rank may be in the middle of the step that failed here: the next one would meet it there."""
    frames: list[bytes] = []
    local = Recorder()
    leading = LeadingForward(local, frames.append)
    local.failure = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        leading.hidden(step_inputs())
    local.failure = None
    with pytest.raises(RuntimeError, match="no longer agree"):
        leading.hidden(step_inputs())
    assert len(frames) == 1


def config_of(**changes: Any) -> Any:
    text = {
        "base_model_tp_plan": {"layers.*.self_attn.k_proj": "colwise"},
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    }
    text_config = SimpleNamespace(**(text | changes))
    return cast("Any", SimpleNamespace(get_text_config=lambda: text_config, architectures=["Some"], model_type="some"))


def test_heads_that_cannot_be_shared_evenly_are_refused() -> None:
    tensor_parallel.check_model(config_of(), 4)
    with pytest.raises(ConfigError, match=r"--tp 3: 12 attention heads and 4 key-value heads .*; 2, 4 would do"):
        tensor_parallel.check_model(config_of(), 3)


def test_a_family_without_a_plan_is_refused(qwen2: Oracle) -> None:
    tensor_parallel.check_model(load_config(str(qwen2.path)), 2)
    with pytest.raises(ConfigError, match=r"no plan .* Some"):
        tensor_parallel.check_model(config_of(base_model_tp_plan=None), 2)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--tp 2 needs 2 GPUs, torch finds 1"):
        tensor_parallel.join(0, 2, tmp_path / "store", "cuda")
