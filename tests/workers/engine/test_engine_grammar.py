"""Whatever a random model says at a high temperature, it follows the grammar."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from epd.types import FinishReason, Grammar, GrammarKind, SamplingParams
from tests.workers.engine.oracle import Answers, Oracle, add, make_engine, run
from workers.engine.engine import Engine

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d( UTC)?"
CHOICES = ("left", "right", "above", "ab", "größer \U0001f642")
SUM = 'root ::= number ("+" number){0,3}\nnumber ::= [0-9]{1,2} | "(" root ")"'
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4
SEEDS = range(12)


GRAMMARS = {
    "schema": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    "regex": Grammar(GrammarKind.REGEX, DATE),
    "choice": Grammar(GrammarKind.CHOICE, json.dumps(CHOICES)),
    "ebnf": Grammar(GrammarKind.EBNF, SUM),
}


def follows(kind: str, text: str) -> bool:
    match kind:
        case "schema":
            value = json.loads(text)
            ok = isinstance(value["name"], str) and len(value["name"]) <= 8 and type(value["age"]) is int
            ok = ok and 0 <= value["age"] <= 130 and set(value["tags"]) <= {"red", "green"} and len(value["tags"]) <= 2
            return ok and list(value) == ["name", "age", "tags"]
        case "regex":
            return re.fullmatch(DATE, text, re.ASCII) is not None
        case "choice":
            return text in CHOICES
    return re.fullmatch(r"[0-9+()]+", text) is not None and eval(re.sub(r"\d+", "1", text)) > 0


def params(kind: str, seed: int, **more: Any) -> SamplingParams:
    return SamplingParams(seed=seed, temperature=1.5, max_tokens=600, grammar=GRAMMARS[kind], **more)


def texts(oracle: Oracle, answers: Answers) -> dict[str, str]:
    return {name: str(oracle.tokenizer.decode(ids, skip_special_tokens=True)) for name, ids in answers.tokens.items()}


@pytest.fixture(scope="module")
def engine(qwen2: Oracle) -> Engine:
    return make_engine(qwen2.path)


@pytest.mark.parametrize("kind", GRAMMARS)
def test_answers_follow_and_end_by_themselves(qwen2: Oracle, engine: Engine, kind: str) -> None:
    for seed in SEEDS:
        add(engine, str(seed), qwen2.prompt("what"), params(kind, seed))
    answers = run(engine)
    assert {end.finish_reason for end in answers.ends.values()} == {FinishReason.STOP}
    said = texts(qwen2, answers)
    assert [text for text in said.values() if not follows(kind, text)] == []
    assert len(set(said.values())) > 1
