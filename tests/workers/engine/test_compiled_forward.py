"""Compiled steps against plain ones, and what happens when they can't be had."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.aot_compile_types import SerializableCallable

from epd.errors import ConfigError
from tests.workers.engine.oracle import Encoded, Oracle, add, greedy, make_engine, picture, provide, run
from workers.engine import (
    attention,
    attention_cpu,
    compiled_forward,
    graph_files,
    int8_kernel,
    int8_linear,
    model_loader,
)
from workers.engine.compiled_forward import CompiledForward
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler deprecates parts of itself


HAS_COMPILER = attention_cpu.is_available(torch.float32)


def engine_with(path: Path, **settings: Any) -> tuple[Engine, CompiledForward]:
    """An engine whose steps could be compiled."""
    engine = make_engine(path, compile="off", **settings)
    runner: Any = engine._runner
    plain = runner._forward
    forward = CompiledForward(plain._model, plain._backend, EngineConfig(model=str(path), dtype="float32"))
    runner._forward = forward
    return engine, forward


def answers_of(engine: Engine, oracle: Oracle, encoded: Encoded) -> dict[str, list[int]]:
    """Of several requests at once: prompts in chunks beside running answers, one with a picture; and of a lone one."""
    prompts = {
        "text": oracle.prompt("what is it? what is it? what is it?"),
        "image": oracle.prompt("see <|vision_start|><|image_pad|><|vision_end|> what is it?", [encoded]),
        "word": oracle.prompt("describe"),
    }
    provide(engine, encoded)
    for name, prompt in prompts.items():
        add(engine, name, prompt, greedy(5 if name == "word" else 12))
    tokens = run(engine).tokens
    add(engine, "lone", prompts["word"], greedy(6))
    return tokens | run(engine).tokens


def test_compiled_steps_give_the_same_tokens(qwen2_5_vl: Oracle) -> None:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "enable_prefix_caching": False}
    encoded = qwen2_5_vl.encode(picture(1), "p")
    expected = answers_of(make_engine(qwen2_5_vl.path, compile="off", **settings), qwen2_5_vl, encoded)
    engine, forward = engine_with(qwen2_5_vl.path, **settings)
    if HAS_COMPILER:
        forward.prepare()
    assert answers_of(engine, qwen2_5_vl, encoded) == expected
    assert forward.is_compiled == HAS_COMPILER  # no step fell back


class Plain(SerializableCallable):
    """A graph as it was traced."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.graph = graph

    def __call__(self, *tensors: Any) -> Any:
        return self.graph(*tensors)

    @classmethod
    def serialize_compile_artifacts(cls, _: Any) -> bytes:
        raise NotImplementedError

    @classmethod
    def deserialize_compile_artifacts(cls, _: bytes) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_is_traced_once(qwen2_5_vl: Oracle, quantization: str) -> None:
    """One graph, which takes seconds to make, for any number of tokens; compiled by something quick here."""
    if quantization == "int8" and not int8_linear.is_available(torch.device("cpu")):
        pytest.skip("needs a processor with AVX512-VNNI")
    engine = make_engine(qwen2_5_vl.path, dtype="bfloat16", compile="off", quantization=quantization)
    runner: Any = engine._runner
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Plain:
        graphs.append(graph)
        return Plain(graph)

    plain = runner._forward
    forward = CompiledForward(plain._model, plain._backend, EngineConfig(model=""))
    forward.prepare(compiled_forward.compile_hidden(forward._model, keep))
    assert len(graphs) == 1
    int8_ops = (torch.ops.epd_int8.linear, torch.ops.epd_int8.products)
    products = [node for node in graphs[0].graph.nodes if node.target in int8_ops]
    # Of two layers, whose other products have too few outputs; ours computes gate and up in one.
    assert len(products) == (0 if quantization == "none" else 2 if int8_kernel.is_available() else 4)


def test_compiled_steps_in_eight_bits_are_the_plain_ones_but_for_rounding(qwen2_5_vl: Oracle) -> None:
    """Float32 differs in its last digits; where that moves a number past the middle of two codes, one code differs.

    Tokens are not compared: such a code can decide between the nearly equal logits of a random model.
    """
    if not (HAS_COMPILER and int8_kernel.is_available()):
        pytest.skip("needs a processor with AVX512-VNNI and a C++ compiler")
    _, forward = engine_with(qwen2_5_vl.path, quantization="int8")
    forward.prepare()
    compiled, model = forward._compiled, forward._model
    assert compiled is not None
    torch.manual_seed(0)
    differences = []
    with torch.inference_mode(), attention.use_backend(compiled_forward._Echo()):
        for count in (*range(1, 21), 64, 200):
            embeds = model.embedding_weight[torch.randint(5, len(model.embedding_weight), (count,))].clone()
            positions = torch.randint(0, 200, (count,)).repeat(model.adapter.num_axes, 1)
            expected, actual = model.hidden(embeds, positions), compiled(embeds, positions)
            differences.append((actual - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-6))
    rows = torch.cat(differences)
    assert (rows < 1e-5).double().mean() > 0.95
    assert rows.max() < 0.02


def test_steps_go_on_plainly_when_the_compiler_fails(
    qwen2: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such compiler\nand its many lines")

    monkeypatch.setattr(compiled_forward, "_run_helper", fail)
    monkeypatch.setattr(compiled_forward, "_graph_file", lambda _: tmp_path / "graph")
    engine, forward = engine_with(qwen2.path)
    with caplog.at_level(logging.WARNING):
        forward.start()
        assert forward.ended.wait(60)
    assert [record.getMessage() for record in caplog.records] == ["steps are not compiled: no such compiler"]
    add(engine, "a", qwen2.prompt("what"))
    assert run(engine).tokens["a"] == qwen2.generate(qwen2.prompt("what"))


def test_a_graph_that_fails_costs_no_request(qwen2: Oracle, caplog: pytest.LogCaptureFixture) -> None:
    engine, forward = engine_with(qwen2.path)

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("the graph does not fit")

    forward._compiled = fail
    add(engine, "a", qwen2.prompt("what"))
    assert run(engine).tokens["a"] == qwen2.generate(qwen2.prompt("what"))
    assert not forward.is_compiled
    assert "the graph does not fit" in caplog.text


def test_a_graph_that_computes_something_else_is_not_used(
    qwen2: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled_forward, "load_hidden", lambda _: lambda model, *x: -model.hidden(*x))
    monkeypatch.setattr(compiled_forward, "_graph_file", lambda _: tmp_path / "graph")
    (tmp_path / "graph").touch()
    _, forward = engine_with(qwen2.path)
    with caplog.at_level(logging.WARNING):
        forward.start()
        assert forward.ended.wait(60)
    assert not forward.is_compiled
    assert "differ from plain ones by 200%" in caplog.text
    assert not (tmp_path / "graph").exists()  # the next start makes another one


def test_a_broken_file_is_made_anew_at_the_next_start(
    qwen2: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled_forward, "_graph_file", lambda _: tmp_path / "graph")
    (tmp_path / "graph").write_bytes(b"half of a")
    _, forward = engine_with(qwen2.path)
    with caplog.at_level(logging.WARNING):
        forward.start()
        assert forward.ended.wait(60)
    assert not forward.is_compiled
    assert "steps are not compiled" in caplog.text
    assert not (tmp_path / "graph").exists()


def test_a_worker_waits_for_the_graph_that_another_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        pytest.fail("it is made twice")

    file, waits = tmp_path / "graph-0.bin", threading.Event()
    monkeypatch.setattr(compiled_forward, "_run_helper", never)
    monkeypatch.setattr(graph_files.log, "info", lambda *_: waits.set())
    with ThreadPoolExecutor(1) as second:
        with graph_files.only_maker(file, timeout_s=0):
            made = second.submit(compiled_forward._make, EngineConfig(model="m"), file)
            assert waits.wait(20)
            file.touch()
        made.result(20)


def test_the_helper_has_room_for_any_context(qwen2: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is small, and what does not fit into a cache is refused where it was asked for."""
    given: list[dict[str, Any]] = []

    def note(*_: Any, **arguments: Any) -> subprocess.CompletedProcess[str]:
        given.append(json.loads(arguments["input"]))
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.setattr(compiled_forward, "_HELPER_CACHE_BYTES", 1 << 14)
    context = qwen2.model.config.max_position_embeddings
    config = EngineConfig(model=str(qwen2.path), dtype="float32", max_model_len=context)
    compiled_forward._run_helper(config, tmp_path / "graph")
    settings = given[0]
    with pytest.raises(ConfigError, match="has room for"):
        model_loader.load(EngineConfig(**settings | {"max_model_len": context}))
    assert model_loader.load(EngineConfig(**settings)).model is not None


def test_a_graph_is_made_once_and_serves_other_processes(qwen2_5_vl: Oracle, tmp_path: Path) -> None:
    """The helper has other weights, and addresses of its own."""
    if not HAS_COMPILER:
        pytest.skip("needs a C++ compiler")
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "enable_prefix_caching": False}
    encoded = qwen2_5_vl.encode(picture(1), "p")
    expected = answers_of(make_engine(qwen2_5_vl.path, compile="off", **settings), qwen2_5_vl, encoded)
    engine, forward = engine_with(qwen2_5_vl.path, **settings)
    compiled_forward._run_helper(forward._config, tmp_path / "graph")
    forward._prepare_from(tmp_path / "graph")
    assert answers_of(engine, qwen2_5_vl, encoded) == expected
    assert forward.is_compiled
    assert forward.compiled_steps > 0
