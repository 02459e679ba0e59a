"""`epd bench engine`: steps of the engine without a network, against transformers alone and against the machine.

Everything that is compared is measured in turns in one run, so that a busy neighbour costs all sides alike; figures
are medians. A decode step of ours includes all that it costs: scheduling, block tables, attention over the paged
cache, sampling, outputs. `forward` is what the model's own computation took inside those very steps.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from epd.bench.output import markdown_table, number
from epd.errors import ConfigError
from epd.types import SamplingParams
from workers import model_parts
from workers.engine.assembly import load_engine
from workers.engine.compiled_forward import CompiledForward
from workers.engine.config import EngineConfig
from workers.engine.forward import Forward
from workers.engine.step_inputs import StepInputs

_BANDWIDTH_BYTES = 256 << 20
"""Read to measure memory bandwidth: far more than any cache holds."""
_MATMUL_SIZE = 2048
_FLOOR_ROUNDS = 5
_MIN_ROUNDS = 2
_IDS_FROM = 300
"""Prompts are random tokens above this: below are single bytes."""


@dataclass(frozen=True, kw_only=True)
class EngineBench:
    """What to measure."""

    model: Path
    dtype: str = "auto"
    threads: int | None = None
    """None: torch's own choice."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Requests that decode together."""
    context: int = 192
    """Tokens of each before the measured steps."""
    prefill: int = 512
    """Tokens of the prompt that is measured."""
    rounds: int = 5
    steps: int = 8
    """Decode steps of each side in a round."""
    settle_s: float = 0.0
    """At most so long, nothing is measured while steps are compiled in the background."""
    load_format: str = "auto"
    engine: dict[str, Any] = field(default_factory=dict)
    """Further fields of `EngineConfig`."""

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for name in ("context", "prefill", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: want at least 1")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError("--batch: want sizes of at least 1")
        if self.rounds < _MIN_ROUNDS:
            raise ConfigError(f"--rounds {self.rounds}: want at least {_MIN_ROUNDS}")


@dataclass(frozen=True)
class DecodeFigures:
    """A decode step of one batch size, in milliseconds."""

    batch: int
    ours: float
    forward: float
    """The model's part of `ours`."""
    transformers: float
    """Its eager forward, with its own attention and cache, without sampling."""
    floor: float
    """Weights and keys and values, read once at the measured bandwidth."""


@dataclass(frozen=True)
class PrefillFigures:
    """One prompt, in milliseconds."""

    tokens: int
    ours: float
    transformers: float
    floor: float
    """The matrix products of the layers at the measured rate."""


@dataclass(frozen=True)
class Machine:
    """What the hardware gives, measured between the rest."""

    bandwidth_gb_s: float
    """Reading one large tensor."""
    matmul_gflop_s: float
    """A square product in the model's dtype."""


@dataclass(frozen=True)
class EngineFigures:
    """All that was measured."""

    dtype: str
    threads: int
    machine: Machine
    prefill: PrefillFigures
    decode: tuple[DecodeFigures, ...]


def run_engine_bench(bench: EngineBench, notify: Callable[[str], None] = lambda _: None) -> EngineFigures:
    """Measure. Takes about a second for each batch size and round of the small checkpoint.

    Raises:
        ConfigError: the checkpoint or a setting cannot work.
    """
    if bench.threads is not None:
        torch.set_num_threads(bench.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    notify("loading the model twice: for the engine and for transformers alone")
    ours = _Ours(bench)
    theirs = _Theirs(bench)
    machine = _measure_machine(theirs.dtype)
    if bench.settle_s:
        notify("waiting for compiled steps")
        notify("steps are compiled" if ours.settle(bench.settle_s) else "steps are not compiled")
    notify(f"prefill of {bench.prefill} tokens")
    prefill = _measure_prefill(bench, ours, theirs, machine)
    decode = []
    for batch in bench.batches:
        notify(f"decode at batch {batch}")
        decode.append(_measure_decode(bench, batch, ours, theirs, machine))
    return EngineFigures(
        str(theirs.dtype).removeprefix("torch."), torch.get_num_threads(), machine, prefill, tuple(decode)
    )


# -- ours --------------------------------------------------------------------------------------------------------------


class _TimedForward:
    """Passes calls on, and sums how long they take."""

    def __init__(self, inner: Forward) -> None:
        self._inner = inner
        self.elapsed_s = 0.0

    def hidden(self, inputs: StepInputs) -> torch.Tensor:
        return self._timed(lambda: self._inner.hidden(inputs))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._timed(lambda: self._inner.logits(hidden))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _timed(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        start = time.perf_counter()
        result = call()
        self.elapsed_s += time.perf_counter() - start
        return result


class _Ours:
    """The engine, fed with requests of random tokens."""

    def __init__(self, bench: EngineBench) -> None:
        known = {each.name for each in dataclasses.fields(EngineConfig)}
        for name in bench.engine:
            if name not in known:
                raise ConfigError(f"--engine: the engine has no setting {name!r}")
        tokens = max(bench.batches) * (bench.context + (bench.rounds + 2) * bench.steps + 64) + bench.prefill
        settings: dict[str, Any] = {
            "model": str(bench.model),
            "load_format": bench.load_format,
            "dtype": bench.dtype,
            "device": "cpu",
            "max_num_seqs": max(bench.batches),
            "max_num_batched_tokens": max(bench.prefill, 512, *bench.batches),
            "enable_prefix_caching": False,
            **bench.engine,
        }
        self.engine = load_engine(EngineConfig(**settings))
        load = self.engine.load()
        if load.kv_total_blocks * 16 < tokens:
            raise ConfigError(f"the KV cache has no room for {tokens} tokens; lower --batch or --context")
        runner: Any = self.engine._runner  # the seam between scheduling and computing has no public name
        self._forward: Forward = runner._forward
        self.forward = runner._forward = _TimedForward(self._forward)
        self.engine.warm_up()
        self._rng = random.Random(0)
        self._count = 0

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        return [self._rng.randrange(_IDS_FROM, self.engine.info.vocab_size - 32) for _ in range(length)]

    def start(self, prompt: Sequence[int], max_tokens: int) -> str:
        """Add a request."""
        self._count += 1
        name = str(self._count)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add_request(name, prompt, sampling)
        return name

    def timed_step(self) -> tuple[float, float]:
        """One step. Returns its milliseconds, and those of the model's part."""
        before, start = self.forward.elapsed_s, time.perf_counter()
        self.engine.step()
        return (time.perf_counter() - start) * 1000, (self.forward.elapsed_s - before) * 1000

    def decoding(self, batch: int, context: int, max_steps: int) -> list[str]:
        """Start a batch, and step until each request has its first token."""
        names = [self.start(self.prompt(context), max_steps) for _ in range(batch)]
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step() if output.token_ids}
        return names

    def stop(self, names: Sequence[str]) -> None:
        """End requests, and let the engine say so."""
        for name in names:
            self.engine.abort(name)
        self.engine.step()

    def settle(self, seconds: float) -> bool:
        """Stay idle until compiled steps are there or the time is over. Returns which."""
        if not isinstance(self._forward, CompiledForward):
            return False
        self._forward.ended.wait(seconds)
        return self._forward.is_compiled


# -- theirs ------------------------------------------------------------------------------------------------------------


class _Theirs:
    """The same weights in the same class, with transformers' own attention and cache."""

    def __init__(self, bench: EngineBench) -> None:
        dtype = bench.dtype if bench.dtype == "auto" else getattr(torch, bench.dtype)
        self.model: Any = model_parts.load_language_part(
            str(bench.model), dtype, "cpu", attn_implementation="sdpa", load_format=bench.load_format
        )
        self.dtype: torch.dtype = self.model.dtype
        self.config = self.model.config.get_text_config()

    @torch.inference_mode()
    def prefill_ms(self, prompt: Sequence[int]) -> float:
        """One prompt with one row of logits."""
        ids = torch.tensor([prompt])
        cache = transformers.DynamicCache(config=self.model.config)
        start = time.perf_counter()
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return (time.perf_counter() - start) * 1000

    @torch.inference_mode()
    def decode_steps(self, batch: int, context: int) -> Iterator[float]:
        """Milliseconds of each further step of a batch; the prompts are computed before the first."""
        cache = transformers.DynamicCache(config=self.model.config)
        ids = torch.randint(_IDS_FROM, self.config.vocab_size - 32, (batch, context))
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        while True:
            with torch.inference_mode():
                ids = ids[:, -1:]
                start = time.perf_counter()
                self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                elapsed_ms = (time.perf_counter() - start) * 1000
            yield elapsed_ms

    def step_bytes(self, batch: int, context: int) -> int:
        """Read by a decode step at least: all weights but the rows of the embedding that nobody asks for, and the
        keys and values."""
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings().weight
        tied = head is not None and head.weight is embedding
        weights = sum(p.nbytes for p in self.model.parameters() if tied or p is not embedding)
        config = self.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * self.dtype.itemsize
        return int(weights + batch * context * per_token)

    def prefill_flop(self, tokens: int) -> float:
        """Of the layers' matrix products; attention and head are left out."""
        layers: int = sum(p.numel() for p in self.model.get_decoder().layers.parameters() if p.dim() > 1)
        return 2.0 * layers * tokens


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure_machine(dtype: torch.dtype) -> Machine:
    large = torch.ones(_BANDWIDTH_BYTES // 4)
    read_s = statistics.median(_seconds(large.sum) for _ in range(_FLOOR_ROUNDS))
    square = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE).to(dtype)
    square @ square
    multiply_s = statistics.median(_seconds(lambda: square @ square) for _ in range(_FLOOR_ROUNDS))
    return Machine(_BANDWIDTH_BYTES / read_s / 1e9, 2 * _MATMUL_SIZE**3 / multiply_s / 1e9)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _measure_prefill(bench: EngineBench, ours: _Ours, theirs: _Theirs, machine: Machine) -> PrefillFigures:
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(bench.rounds + 1):
        prompt = ours.prompt(bench.prefill)
        ours.start(prompt, 1)
        elapsed_ms, _ = ours.timed_step()
        if ours.engine.has_work():
            raise ConfigError("the prompt took more than one step; --engine max_num_batched_tokens is too small for it")
        other_ms = theirs.prefill_ms(prompt)
        if round_number:  # the first warms up
            times[0].append(elapsed_ms)
            times[1].append(other_ms)
    floor_ms = theirs.prefill_flop(bench.prefill) / machine.matmul_gflop_s / 1e6
    return PrefillFigures(bench.prefill, statistics.median(times[0]), statistics.median(times[1]), floor_ms)


def _measure_decode(bench: EngineBench, batch: int, ours: _Ours, theirs: _Theirs, machine: Machine) -> DecodeFigures:
    names = ours.decoding(batch, bench.context, (bench.rounds + 2) * bench.steps + 64)
    other_steps = theirs.decode_steps(batch, bench.context)
    steps: list[tuple[float, float]] = []
    others: list[float] = []
    for round_number in range(bench.rounds + 1):
        mine = [ours.timed_step() for _ in range(bench.steps)]
        their = [next(other_steps) for _ in range(bench.steps)]
        if round_number:  # the first warms up
            steps += mine
            others += their
    ours.stop(names)
    context = bench.context + (bench.rounds + 1) * bench.steps // 2
    floor_ms = theirs.step_bytes(batch, context) / machine.bandwidth_gb_s / 1e6
    return DecodeFigures(
        batch,
        statistics.median(total for total, _ in steps),
        statistics.median(part for _, part in steps),
        statistics.median(others),
        floor_ms,
    )


# -- output ------------------------------------------------------------------------------------------------------------


def format_engine_figures(figures: EngineFigures) -> str:
    """Two tables in Markdown."""
    machine, prefill = figures.machine, figures.prefill
    decode_rows = [
        [
            str(row.batch),
            number(row.ours, 1),
            number(row.forward, 1),
            number(row.ours / row.forward, 2),
            number(row.transformers, 1),
            number(row.ours / row.transformers, 2),
            number(row.floor, 1),
            number(row.ours / row.floor, 2),
            number(row.batch * 1000 / row.ours, 0),
        ]
        for row in figures.decode
    ]
    prefill_row = [
        str(prefill.tokens),
        number(prefill.tokens * 1000 / prefill.ours, 0),
        number(prefill.tokens * 1000 / prefill.transformers, 0),
        number(prefill.transformers / prefill.ours, 2),
        number(prefill.tokens * 1000 / prefill.floor, 0),
        number(prefill.floor / prefill.ours, 2),
    ]
    decode_header = (
        "batch", "step, ms", "forward alone", "ratio", "transformers eager", "ratio", "memory floor", "ratio", "tok/s",
    )  # fmt: skip
    prefill_header = ("prompt", "tok/s", "transformers SDPA", "ratio", "matmul floor", "ratio")
    return "\n".join(
        [
            f"{figures.dtype}, {figures.threads} threads; memory {machine.bandwidth_gb_s:.1f} GB/s, "
            f"products {machine.matmul_gflop_s:.0f} GFLOP/s.",
            "",
            "Decode, milliseconds a step (a ratio of 1 is level, less is ahead):",
            "",
            markdown_table(decode_header, decode_rows),
            "",
            "Prefill, tokens a second (a ratio of 1 is level, more is ahead):",
            "",
            markdown_table(prefill_header, [prefill_row]),
        ]
    )
