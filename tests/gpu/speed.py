"""Steps on real shapes with random weights, against bandwidth and matmul rate measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epd.bench.checkpoint import write_checkpoint
from epd.types import SamplingParams
from tests import checkpoints
from workers.engine.assembly import load_engine
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine

if TYPE_CHECKING:
    from tests.gpu.check import Report

SECTION = "Speed"
ROUNDS = 5


@dataclass(frozen=True)
class Size:
    """What to run."""

    batches: tuple[int, ...]
    context: int
    """Tokens of each request before the measured decode steps."""
    steps: int
    prefill: int
    """Tokens of the measured prompts together."""
    prompt: int
    """Tokens of each of them."""
    max_model_len: int
    copy_bytes: int
    matmul: int


SIZES = {
    "7b": Size((1, 16, 64), 1024, 50, 32768, 4096, 8192, 4 << 30, 8192),
    "tiny": Size((1, 4), 32, 5, 256, 64, 512, 32 << 20, 256),
}
DECODE_TARGETS = {1: 1.25, 64: 1.4}
"""Batch size → step over floor, at most."""
PREFILL_TARGET = 0.55
"""Of the measured matmul rate, at least."""


def check(report: Report, folder: Path, device: str, size: str) -> None:
    """Add figures to the report; on a CPU they are not judged."""
    chosen = SIZES[size]
    path = folder / size
    if size == "tiny":
        checkpoints.build_qwen2_5_vl(path)
    else:
        write_checkpoint("qwen2.5-vl-7b", path)
    bandwidth, matmul_rate = _bandwidth(device, chosen.copy_bytes), _matmul_rate(device, chosen.matmul)
    report.add(SECTION, "measured bandwidth (copy, both ways)", f"{bandwidth / 1e9:.0f} GB/s")
    report.add(SECTION, f"measured matmul rate ({chosen.matmul}³, bfloat16)", f"{matmul_rate / 1e12:.1f} TFLOP/s")
    start = time.perf_counter()
    engine = load_engine(
        EngineConfig(
            model=str(path),
            load_format="dummy",
            dtype="bfloat16",
            device=device,
            max_num_seqs=max(chosen.batches),
            max_model_len=chosen.max_model_len,
            enable_prefix_caching=False,
        )
    )
    engine.warm_up()
    report.add(SECTION, "loading, KV cache and graphs", f"{time.perf_counter() - start:.1f} s")
    model = _Model.of(engine)
    _check_prefill(report, engine, model, chosen, matmul_rate, device)
    for batch in chosen.batches:
        _check_decode(report, engine, model, chosen, batch, bandwidth, device)


@dataclass(frozen=True)
class _Model:
    """Sizes that the floors follow from."""

    matmul_weights: int
    """Numbers that take part in a product for every token, without the head."""
    read_bytes: int
    """Weights that every decode step reads: those, norms and the head."""
    kv_bytes_per_token: int
    vocab_size: int

    @classmethod
    def of(cls, engine: Engine) -> _Model:
        forward: Any = engine._runner
        forward = forward._forward
        model = forward._model._model
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        total = sum(_num_bytes(parameter) for parameter in model.parameters())  # tied ones are listed once
        layers = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters() if parameter.ndim == 2)
        cache = forward._backend.cache
        slots = cache.num_blocks * cache.block_size
        kv_bytes = sum(side.nbytes for sides in (cache.keys, cache.values) for side in sides) // slots
        not_read = 0 if embedding is head else _num_bytes(embedding)  # but for a row for each token
        return cls(layers, total - not_read, kv_bytes, engine.info.vocab_size)


def _num_bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.dtype.itemsize  # nbytes is nothing that packed weights have


def _check_decode(
    report: Report, engine: Engine, model: _Model, size: Size, batch: int, bandwidth: float, device: str
) -> None:
    for index in range(batch):
        _add(engine, model, f"d{index}", size.context, size.max_model_len - size.context)
    while engine.load().waiting or not _all_decode(engine):
        engine.step()
    for _ in range(3):
        engine.step()
    step_s = statistics.median(_timed(engine.step) for _ in range(size.steps))
    for index in range(batch):
        engine.abort(f"d{index}")
    engine.step()
    tokens = batch * (size.context + size.steps // 2)
    floor_s = (model.read_bytes + tokens * model.kv_bytes_per_token) / bandwidth
    target = DECODE_TARGETS.get(batch)
    report.add(
        SECTION,
        f"decode step, batch {batch}, context {size.context}",
        f"{step_s * 1e3:.2f} ms, {step_s / floor_s:.2f} × the floor of {floor_s * 1e3:.2f} ms",
        "" if target is None else f"at most {target} ×",
        None if device == "cpu" or target is None else step_s <= target * floor_s,
    )


def _check_prefill(report: Report, engine: Engine, model: _Model, size: Size, matmul_rate: float, device: str) -> None:
    def prefill() -> None:
        for index in range(size.prefill // size.prompt):
            _add(engine, model, f"p{index}", size.prompt, 1)
        while engine.has_work():
            engine.step()

    prefill()
    elapsed_s = statistics.median(_timed(prefill) for _ in range(3))
    share = 2 * model.matmul_weights * size.prefill / elapsed_s / matmul_rate
    report.add(
        SECTION,
        f"prefill, {size.prefill} tokens in prompts of {size.prompt}",
        f"{size.prefill / elapsed_s:.0f} tokens/s, {share:.0%} of the measured matmul rate",
        f"at least {PREFILL_TARGET:.0%}",
        None if device == "cpu" else share >= PREFILL_TARGET,
    )


def _add(engine: Engine, model: _Model, name: str, prompt_tokens: int, max_tokens: int) -> None:
    draw = torch.randint(0, min(model.vocab_size, 100_000), (prompt_tokens,)).tolist()
    engine.add_request(name, draw, SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True))


def _all_decode(engine: Engine) -> bool:
    return all(request.num_output_tokens > 0 for request in engine._requests.values())


def _timed(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def _bandwidth(device: str, num_bytes: int) -> float:
    """Bytes a second, read and written, of copying within the device's memory."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * num_bytes / min(_timed(lambda: target.copy_(source)) for _ in range(ROUNDS))


@torch.inference_mode()
def _matmul_rate(device: str, size: int) -> float:
    """Floating-point operations a second of a square product in bfloat16."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * size**3 / min(_timed(lambda: a @ b) for _ in range(ROUNDS))
