"""Text-only families: the engine answers as transformers does, alone, in chunks and in company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import checkpoints_text
from tests.workers.engine.oracle import Answers, Oracle, add, greedy, make_engine, run
from workers import model_parts

TEXTS = (
    "a",
    "describe the image in one word",
    "<|im_start|>user\nred green blue?<|im_end|>\n<|im_start|>assistant\n",
    "the quick brown fox jumps over the lazy dog, what is left? " * 8,
    "one two three " * 3,
    "left right above below " * 5,
)
MAX_TOKENS = 16


@pytest.fixture(scope="module", params=checkpoints_text.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(checkpoints_text.build(tmp_path_factory.mktemp("text") / request.param, request.param))


@pytest.fixture(scope="module")
def expected(family: Oracle) -> list[list[int]]:
    return [family.generate(family.prompt(text), max_tokens=MAX_TOKENS) for text in TEXTS]


def test_the_reference_tells_prompts_apart(expected: list[list[int]]) -> None:
    """Otherwise the tests below could pass with the requests swapped."""
    assert len({tuple(answer) for answer in expected}) == len(TEXTS)


@pytest.mark.parametrize("batched_tokens", [512, 16], ids=["whole", "chunked"])
def test_alone(family: Oracle, expected: list[list[int]], batched_tokens: int) -> None:
    engine = make_engine(family.path, max_num_batched_tokens=batched_tokens)
    for index, text in enumerate(TEXTS):
        add(engine, "r", family.prompt(text), greedy(MAX_TOKENS))
        assert run(engine).tokens["r"] == expected[index]


def test_together(family: Oracle, expected: list[list[int]]) -> None:
    """One joins at each step, so that chunks of prompts run beside tokens of answers."""
    engine = make_engine(family.path, max_num_batched_tokens=32)
    answers = Answers()
    for index, text in enumerate(TEXTS):
        add(engine, str(index), family.prompt(text), greedy(MAX_TOKENS))
        answers.take(engine.step())
    tokens = answers.drain(engine).tokens
    assert [tokens[str(index)] for index in range(len(TEXTS))] == expected


SEQUENCES, LENGTH = 4, 64


def test_bfloat16_under_teacher_forcing(family: Oracle) -> None:
    """The most likely token after each prefix is that of transformers' own bfloat16 forward of the prefix.

    Both see one prefix after the other: the same prefix at another place of a longer row already moves 1 to 2 % of
    these checkpoints' many near-ties, in transformers as well.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(family.path, dtype=torch.bfloat16).eval()
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 380, (SEQUENCES, LENGTH), generator=draw)
    prefixes = {f"{i}-{length}": rows[i, :length] for i in range(SEQUENCES) for length in range(1, LENGTH + 1)}
    engine = make_engine(
        family.path, dtype="bfloat16", max_num_seqs=32, max_waiting=len(prefixes), kv_cache_memory_bytes=32 << 20
    )
    for name, prefix in prefixes.items():
        engine.add_request(name, prefix.tolist(), greedy(1))
    answers = run(engine).tokens
    with torch.inference_mode():
        reference = {name: int(model(input_ids=row[None]).logits[0, -1].argmax()) for name, row in prefixes.items()}
    agreeing = sum(answers[name] == [token] for name, token in reference.items())
    assert agreeing >= 0.99 * len(prefixes)


def test_experts_of_a_mixture_run_grouped(tmp_path: Path) -> None:
    """transformers' choice for the packed row of a step: one matmul per expert over whatever tokens chose it."""
    path = checkpoints_text.build(tmp_path, "qwen3_moe")
    model: Any = model_parts.load_language_part(str(path), "auto", "cpu")
    assert model.config._experts_implementation == "grouped_mm"
    assert type(model.model.layers[0].mlp).__name__ == "Qwen3MoeSparseMoeBlock"


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    """InternLM3 ships Python beside its weights; transformers has the architecture itself."""
    path = checkpoints_text.build(tmp_path, "internlm3")
    assert "auto_map" in (path / "config.json").read_text()
    assert (path / "modeling_internlm3.py").exists()
    model: Any = model_parts.load_language_part(str(path), "auto", "cpu")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.bias is not None
    assert model.model.rotary_emb.rope_type == "dynamic"
