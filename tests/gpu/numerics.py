"""Right values on a device: tiny checkpoints against transformers' own answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from epd.types import SamplingParams
from tests import checkpoints
from tests.workers.engine.oracle import IMAGE, Answers, Oracle, Prompt, add, greedy, make_engine, picture, provide
from workers.engine.assembly import load_engine
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.ranks import Ranks
from workers.vision import VisionModel

if TYPE_CHECKING:
    from tests.gpu.check import Report

SECTION = "Values"
RANKS = 2
AGREEMENT = 0.99
"""Of teacher-forced positions in bfloat16."""
ROWS_TOLERANCE = 1e-3
"""Between two devices' embeddings of a picture in float32."""
TEXTS = ("a", "describe the image in one word", "the quick brown fox jumps over the lazy dog, what is left? " * 20)


def check(report: Report, folder: Path, device: str) -> None:
    """Add what was found to the report."""
    oracle = Oracle(checkpoints.build_qwen2_5_vl(folder / "values-vl"))
    _answers(report, oracle, device)
    _picture(report, oracle, device)
    text_oracle = Oracle(checkpoints.build_qwen2(folder / "values-text"))
    _teacher_forced(report, text_oracle, device)
    if device == "cuda":
        _graphs(report, text_oracle)
        _pipelining(report, text_oracle)
    if importlib.util.find_spec("accelerate") is None or torch.cuda.device_count() < RANKS:
        report.add(SECTION, "two ranks share a model", f"not tried: needs {RANKS} GPUs and the accelerate package")
    else:
        _ranks(report, oracle, device)


def _answers(report: Report, oracle: Oracle, device: str) -> None:
    """A batch with pictures, in chunks, in float32: every token is that of `generate` on the CPU."""
    engine = make_engine(oracle.path, device=device, max_num_batched_tokens=64)
    _compare(report, oracle, engine, _backend(engine))


def _ranks(report: Report, oracle: Oracle, device: str) -> None:
    """The same with two processes that share the model. Fewer blocks: each has half of the heads."""
    config = EngineConfig(
        model=str(oracle.path),
        dtype="float32",
        device=device,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=2 << 20,
    )
    ranks = Ranks(RANKS)
    try:
        group = ranks.start(config, name="rank", log_level="warning", threads=1)
        _compare(report, oracle, load_engine(config, group=group), f"{RANKS} ranks")
    finally:
        ranks.stop()


def _compare(report: Report, oracle: Oracle, engine: Engine, name: str) -> None:
    answers, expected = Answers(), {}
    for index in range(8):
        pictures = [picture(10 * index + k) for k in range(index % 3)]
        encoded = [oracle.encode(image, f"{index}-{k}") for k, image in enumerate(pictures)]
        prompt = oracle.prompt(
            f"number {index} " * (1 + 6 * index) + f"{IMAGE} and " * len(pictures) + "what?", encoded
        )
        expected[f"r{index}"] = oracle.generate(prompt, pictures, max_tokens=16)
        for one in encoded:
            provide(engine, one)
        add(engine, f"r{index}", prompt, greedy(16))
        answers.take(engine.step())
    found = answers.drain(engine).tokens
    same = sum(found[name] == tokens for name, tokens in expected.items())
    report.add(
        SECTION,
        f"greedy answers equal to transformers', float32, {name}",
        f"{same} of {len(expected)}",
        "all",
        same == len(expected),
    )


def _picture(report: Report, oracle: Oracle, device: str) -> None:
    model = VisionModel.load(oracle.path, dtype="float32", device=device)
    pictures = [picture(1), picture(2, 200, 60), picture(3, 64, 150)]
    rows = model.encode([model.preprocess(image) for image in pictures])
    expected = [oracle.encode(image, "").rows for image in pictures]
    error = max(float((a - b).abs().max()) for a, b in zip(rows, expected, strict=True))
    report.add(
        SECTION,
        "largest difference of a picture's embeddings, float32",
        f"{error:.1e}",
        f"at most {ROWS_TOLERANCE:.0e}",
        error <= ROWS_TOLERANCE,
    )


def _teacher_forced(report: Report, oracle: Oracle, device: str) -> None:
    """bfloat16: the most likely token at every position of given texts, against transformers on the same device.

    Random weights have many near ties: transformers' own two attentions, eager and SDPA, agree on 97 % of these
    positions. So whoever is at least as near to float32 as transformers in bfloat16 is right too.
    """
    prompts = [oracle.prompt(text) for text in TEXTS[1:]]
    engine = make_engine(oracle.path, device=device, dtype="bfloat16", max_num_batched_tokens=128)
    found = [token for prompt in prompts for token in _likeliest(engine, prompt)]
    theirs = _reference(oracle, prompts, device, torch.bfloat16)
    exact = _reference(oracle, prompts, device, torch.float32)
    same, near, theirs_near = _count_same(found, theirs), _count_same(found, exact), _count_same(theirs, exact)
    report.add(
        SECTION,
        f"teacher-forced agreement with transformers, bfloat16, {_backend(engine)}",
        f"{same} of {len(found)}; with float32 {near}, theirs {theirs_near}",
        f"{AGREEMENT:.0%}, or as near to float32 as theirs",
        same >= AGREEMENT * len(found) or near >= theirs_near,
    )


def _reference(oracle: Oracle, prompts: Sequence[Prompt], device: str, dtype: torch.dtype) -> list[int]:
    """What transformers holds most likely at each position of the prompts but the first."""
    model: Any = AutoModelForCausalLM.from_pretrained(oracle.path, dtype=dtype).to(device).eval()
    tokens: list[int] = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt.token_ids], device=device)).logits[0, :-1]
        tokens += logits.argmax(-1).tolist()
    return tokens


def _count_same(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


def _likeliest(engine: Engine, prompt: Prompt) -> list[int]:
    """The most likely token behind each token of a prompt but the last."""
    add(engine, "r", prompt, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
    for _ in range(100):
        for output in engine.step():
            if output.prompt_logprobs:
                return [one.top[0][0] for one in output.prompt_logprobs if one is not None]
    raise RuntimeError("the engine gave no prompt_logprobs")


def _graphs(report: Report, oracle: Oracle) -> None:
    """Decode steps as graphs give the tokens that they give without."""
    graphed, plain = (
        _decode(make_engine(oracle.path, device="cuda", dtype="bfloat16", enable_cuda_graphs=flag), oracle)
        for flag in (True, False)
    )
    same = sum(_common(a, b) for a, b in zip(graphed[1], plain[1], strict=True))
    total = sum(map(len, plain[1]))
    report.add(SECTION, "decode steps are", graphed[0], "DecodeGraphs", graphed[0] == "DecodeGraphs")
    report.add(
        SECTION,
        "tokens equal with graphs and without, up to the first difference of an answer",
        f"{same} of {total}",
        f"{AGREEMENT:.0%}",
        same >= AGREEMENT * total,
    )


def _pipelining(report: Report, oracle: Oracle) -> None:
    """Steps that are launched before the ones before them are read give the tokens that they give one by one."""
    engines = [make_engine(oracle.path, device="cuda", dtype="float32", pipelining=mode) for mode in ("on", "off")]
    pipelined, plain = (_decode(engine, oracle)[1] for engine in engines)
    same = sum(a == b for a, b in zip(pipelined, plain, strict=True))
    report.add(
        SECTION, "answers equal with pipelining and without, float32", f"{same} of {len(plain)}", "all",
        same == len(plain),
    )  # fmt: skip


def _decode(engine: Engine, oracle: Oracle) -> tuple[str, list[list[int]]]:
    for index in range(5):
        add(engine, f"{index}", oracle.prompt(TEXTS[index % 3] + f" {index}"), greedy(40 + index))
    tokens = Answers().drain(engine).tokens
    return type(_forward(engine)).__name__, [tokens[f"{index}"] for index in range(5)]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def _forward(engine: Engine) -> Any:
    runner: Any = engine._runner
    return runner._forward


def _backend(engine: Engine) -> str:
    return type(_forward(engine)._backend).__name__
