"""Everything about decode graphs but CUDA's part: a graph that computes its function anew stands in for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from tests.workers.engine.oracle import IMAGE, Answers, Oracle, add, greedy, make_engine, picture, provide
from tests.workers.engine.varlen_reference import kernel
from workers.engine import attention_varlen, model_loader, tensor_parallel
from workers.engine.assembly import load_engine
from workers.engine.attention import PackedChunk
from workers.engine.attention_varlen import VarlenBackend
from workers.engine.config import EngineConfig
from workers.engine.decode_graphs import (
    Compute,
    DecodeGraphs,
    Layout,
    StaticInputs,
    agreed,
    padded_size,
    padded_sizes,
)
from workers.engine.engine import Engine
from workers.engine.forward import LocalForward
from workers.engine.step_inputs import StepInputs
from workers.engine.tensor_parallel import ParallelGroup

CPU = torch.device("cpu")
SCRATCH = 9
LAYOUT = Layout(num_axes=3, block_size=4, table_width=5, scratch_block=SCRATCH)


def test_sizes_are_powers_of_two_up_to_the_largest_batch() -> None:
    assert padded_sizes(1) == (1,)
    assert padded_sizes(8) == (1, 2, 4, 8)
    assert padded_sizes(48) == (1, 2, 4, 8, 16, 32, 48)


def test_a_step_takes_the_smallest_size_that_holds_it() -> None:
    sizes = (1, 2, 4, 8, 12)
    assert [padded_size(n, sizes) for n in (1, 2, 3, 4, 5, 9, 12, 13)] == [1, 2, 4, 4, 8, 12, 12, None]


def step(*rows: tuple[int, tuple[int, ...]]) -> StepInputs:
    """A decode step: (tokens so far, block table) of each row; token ids 100, 101, …"""
    chunks = tuple(PackedChunk(index, 1, start, table) for index, (start, table) in enumerate(rows))
    starts = torch.tensor([start for start, _ in rows])
    return StepInputs(chunks, torch.arange(100, 100 + len(rows)), starts.expand(3, -1), (), torch.arange(len(rows)))


def test_padding_goes_to_the_scratch_block_and_nowhere_else() -> None:
    static = StaticInputs(4, LAYOUT, CPU)
    steps = [
        step((5, (3, 1)), (0, (2,)), (18, (4, 5, 6, 7, 8))),
        step((6, (3, 1))),  # rows that were used become padding again
        step((7, (3, 1)), (1, (2,)), (3, (0,)), (4, (6, 7))),
    ]
    for inputs in steps:
        static.load(inputs)
        count, rows = len(inputs.chunks), static.rows
        assert rows.token_ids.tolist() == [*inputs.token_ids.tolist(), *[0] * (4 - count)]
        assert rows.positions[:, :count].equal(inputs.positions)
        own = [c.block_table[c.start // 4] * 4 + c.start % 4 for c in inputs.chunks]
        assert rows.slots.tolist() == [*own, *[SCRATCH * 4] * (4 - count)]
        assert rows.lengths.tolist() == [*(c.start + 1 for c in inputs.chunks), *[1] * (4 - count)]
        for index in range(4):
            table = inputs.chunks[index].block_table if index < count else ()
            assert rows.block_table[index].tolist() == [*table, *[SCRATCH] * (5 - len(table))]


def test_static_tensors_stay_where_they_are() -> None:
    static = StaticInputs(2, LAYOUT, CPU)
    before = [getattr(static.rows, name).data_ptr() for name in vars(static.rows)]
    static.load(step((5, (3, 1))))
    assert [getattr(static.rows, name).data_ptr() for name in vars(static.rows)] == before


def test_tokens_that_the_host_does_not_know_come_from_the_device() -> None:
    static = StaticInputs(4, LAYOUT, CPU)
    first = step((5, (3, 1)), (0, (2,)))
    static.load(first)
    static.load(msgspec.structs.replace(step((6, (3, 1)), (1, (2,))), token_ids=torch.tensor([70, 71]), is_unread=True))
    assert static.rows.token_ids.tolist() == [70, 71, 0, 0]
    assert static.rows.lengths.tolist() == [7, 2, 1, 1]


def test_what_one_step_copies_from_is_not_what_the_next_one_writes_to() -> None:
    static = StaticInputs(2, LAYOUT, CPU)
    static.load(step((5, (3, 1))))
    copied = [buffer.clone() for buffer in static._hosts[1].buffers]
    static.load(step((18, (4, 5, 6, 7, 8)), (0, (2,))))
    assert all(a.equal(b) for a, b in zip(copied, static._hosts[0].buffers, strict=True))


def static_result(compute: Compute) -> Compute:
    """Like a graph, gives the same tensor each time."""
    result = compute().clone()
    return lambda: result.copy_(compute())


def graphed_engine(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capture: Any = static_result, **settings: Any
) -> Engine:
    monkeypatch.setattr(attention_varlen, "varlen_attn", kernel)
    monkeypatch.setattr(model_loader, "_backend_class", lambda *_: VarlenBackend)
    monkeypatch.setattr(model_loader, "_capture", lambda *_: capture)
    return make_engine(oracle.path, max_num_seqs=6, max_num_batched_tokens=32, max_model_len=600, **settings)


def forward_of(engine: Engine) -> Any:
    runner: Any = engine._runner
    return runner._forward


@pytest.mark.parametrize("pipelining", ["off", "on"])
def test_answers_are_the_same_with_graphs(any_oracle: Oracle, monkeypatch: pytest.MonkeyPatch, pipelining: str) -> None:
    engine = graphed_engine(any_oracle, monkeypatch, pipelining=pipelining)
    graphs = forward_of(engine)
    assert isinstance(graphs, DecodeGraphs)
    answers, expected = Answers(), {}
    for index in range(6):
        pictures = [picture(index)] * (any_oracle.multimodal and index % 2)
        encoded = [any_oracle.encode(image, f"{index}") for image in pictures]
        prompt = any_oracle.prompt(f"number {index} " * (1 + 12 * index) + IMAGE * len(pictures) + " what?", encoded)
        expected[f"r{index}"] = any_oracle.generate(prompt, pictures, max_tokens=4 + 3 * index)
        for one in encoded:
            provide(engine, one)
        add(engine, f"r{index}", prompt, greedy(4 + 3 * index))
        answers.take(engine.step())
    steps_before = graphs.num_replays
    assert answers.drain(engine).tokens == expected
    assert graphs.num_replays > steps_before + 5  # the batch shrank from six rows to one


def test_padding_leaves_the_blocks_of_requests_alone(qwen2: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = graphed_engine(qwen2, monkeypatch)
    cache = forward_of(engine)._backend.cache
    for index in range(3):  # padded to four
        add(engine, f"r{index}", qwen2.prompt("what is it?"))
    Answers().drain(engine)
    written = cache.keys[0].flatten(1).any(dim=1)
    scratch = cache.num_blocks - 1
    assert engine.load().kv_total_blocks == scratch  # the engine never gives it away
    assert written[scratch]
    used = cache.keys[0][:scratch].flatten(2).any(dim=2).sum(dim=1)  # tokens in each block
    assert used.max() <= len(qwen2.prompt("what is it?").token_ids) + 12 - 1


def test_a_model_that_cannot_be_captured_runs_without(qwen2: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Callable[[], torch.Tensor]) -> Compute:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = graphed_engine(qwen2, monkeypatch, fails)
    assert isinstance(forward_of(engine), LocalForward)
    prompt = qwen2.prompt("what is it?")
    add(engine, "r", prompt)
    assert Answers().drain(engine).tokens["r"] == qwen2.generate(prompt)


# -- of a model that ranks share ---------------------------------------------------------------------------------------


class Alone(ParallelGroup):
    """A group whose ranks take their turns in this process: each computes all of the model."""

    def agree_on_smallest(self, value: int) -> int:
        return value


def test_all_ranks_replay_graphs(qwen2: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "varlen_attn", kernel)
    monkeypatch.setattr(model_loader, "_backend_class", lambda *_: VarlenBackend)
    monkeypatch.setattr(model_loader, "_capture", lambda *_: static_result)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: None)
    config = EngineConfig(
        model=str(qwen2.path), dtype="float32", max_num_seqs=6, max_model_len=600, kv_cache_memory_bytes=4 << 20
    )
    frames: list[bytes] = []
    engine = load_engine(config, group=Alone(0, 1, CPU, frames.append))
    prompts = {f"r{index}": qwen2.prompt(f"number {index} " * (1 + index)) for index in range(5)}
    for index, (name, prompt) in enumerate(prompts.items()):
        add(engine, name, prompt, greedy(5 + index))
    found = Answers().drain(engine).tokens
    assert found == {
        name: qwen2.generate(prompt, max_tokens=5 + index) for index, (name, prompt) in enumerate(prompts.items())
    }
    first = forward_of(engine)._local
    group = Alone(1, 1, CPU)
    loaded = model_loader.load(config, group)
    tensor_parallel.follow(frames, loaded.forward, group, hidden_size=loaded.info.hidden_size, dtype=torch.float32)
    second: Any = loaded.forward
    assert isinstance(second, DecodeGraphs)
    assert second.num_replays == first.num_replays > 5
    ours, theirs = (one._backend.cache for one in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True))


def test_no_graph_is_left_when_a_rank_leaves_its_group(qwen2: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[weakref.ref[Compute]] = []

    def capture(compute: Compute) -> Compute:
        replay = static_result(compute)
        replays.append(weakref.ref(replay))
        return replay

    left: list[list[Compute | None]] = []
    monkeypatch.setattr(attention_varlen, "varlen_attn", kernel)
    monkeypatch.setattr(model_loader, "_backend_class", lambda *_: VarlenBackend)
    monkeypatch.setattr(model_loader, "_capture", lambda *_: capture)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: None)
    config = EngineConfig(
        model=str(qwen2.path), dtype="float32", max_num_seqs=2, max_model_len=300, kv_cache_memory_bytes=4 << 20
    )
    group = Alone(0, 1, CPU, lambda _: None)
    engine = load_engine(config, group=group)  # outlives the group
    assert [ref() is not None for ref in replays] == [True, True]
    with monkeypatch.context() as joined:
        joined.setattr(torch.distributed, "is_initialized", lambda: True)
        joined.setattr(torch.distributed, "destroy_process_group", lambda: left.append([ref() for ref in replays]))
        tensor_parallel.leave(group)
    assert left == [[None, None]]
    prompt = qwen2.prompt("what is it?")
    add(engine, "r", prompt)
    assert Answers().drain(engine).tokens["r"] == qwen2.generate(prompt)


def test_ranks_have_graphs_all_or_none() -> None:
    def fails(_: Compute) -> Compute:
        raise RuntimeError("operation not permitted")

    def compute() -> torch.Tensor:
        return torch.ones(1)

    said: list[int] = []

    def among(others: int) -> Callable[[int], int]:
        def smallest(value: int) -> int:
            said.append(value)
            return min(value, others)

        return smallest

    assert agreed(static_result, among(1))(compute)().equal(torch.ones(1))
    with pytest.raises(RuntimeError, match="not this one"):
        agreed(static_result, among(0))(compute)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        agreed(fails, among(1))(compute)
    assert said == [1, 1, 0]  # the one that fails says so to the others
