"""Whatever a random model says at a high temperature, it follows the grammar."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest

from epd.errors import InvalidRequest
from epd.types import FinishReason, Grammar, GrammarKind, SamplingParams
from tests.workers.engine.fakes import FakeRunner, fake_engine
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


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 8}, {"kv_cache_memory_bytes": 9 * BLOCK_BYTES, "max_model_len": 128}],
    ids=["batched", "chunked", "preempted"],
)
def test_same_seed_same_tokens_with_every_feature(qwen2: Oracle, engine: Engine, settings: dict[str, Any]) -> None:
    penalties: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    requests: dict[str, SamplingParams] = {
        "schema": params("schema", 1, logprobs=2, **penalties),
        "regex": params("regex", 2, top_k=20),
        "ebnf": params("ebnf", 3, logit_bias=((12, 3.0),)),
        "plain": SamplingParams(seed=4, max_tokens=50),
        "penalised": SamplingParams(seed=5, max_tokens=50, min_tokens=20, **penalties),
        "words": SamplingParams(seed=6, max_tokens=50, temperature=0.7, bad_words=((3,), (4, 5)), **penalties),
    }
    requests = {name: msgspec.structs.replace(asked, max_tokens=50) for name, asked in requests.items()}
    alone: dict[str, list[int]] = {}
    for name, asked in requests.items():
        add(engine, name, qwen2.prompt(f"number {name} is"), asked)
        alone |= run(engine).tokens
    crowded = make_engine(qwen2.path, **settings)
    for name, asked in requests.items():
        add(crowded, name, qwen2.prompt(f"number {name} is"), asked)
    assert run(crowded).tokens == alone
    assert ("max_model_len" in settings) == (crowded.num_preemptions > 0)


def test_greedy_answers_follow_too(qwen2: Oracle, engine: Engine) -> None:
    add(engine, "a", qwen2.prompt("what"), SamplingParams(temperature=0, max_tokens=50, grammar=GRAMMARS["choice"]))
    answers = run(engine)
    assert texts(qwen2, answers)["a"] in CHOICES


def test_the_end_comes_only_after_a_whole_sentence(qwen2: Oracle, engine: Engine) -> None:
    """A model that wants nothing but to end, and may: after one digit, not before."""
    wants_end = tuple((token, 100.0) for token in engine.info.eos_token_ids)
    digits = Grammar(GrammarKind.REGEX, r"\d{1,5}")
    for name, minimum in (("free", 0), ("longer", 3)):
        sampling = SamplingParams(max_tokens=20, min_tokens=minimum, logit_bias=wants_end, grammar=digits)
        add(engine, name, qwen2.prompt("what"), sampling)
    answers = run(engine)
    for name, length in (("free", 1), ("longer", 3)):
        assert answers.ends[name].stop_token_id in engine.info.eos_token_ids
        assert len(answers.tokens[name]) == length + 1
        assert re.fullmatch(r"[0-9]{1,5}", texts(qwen2, answers)[name])


def test_min_tokens_gives_way_to_a_grammar_that_is_complete(qwen2: Oracle, engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=50, min_tokens=40, grammar=GRAMMARS["choice"])
    add(engine, "a", qwen2.prompt("what"), sampling)
    answers = run(engine)
    assert answers.ends["a"].finish_reason is FinishReason.STOP
    assert answers.ends["a"].stop_token_id is None
    assert texts(qwen2, answers)["a"] in CHOICES


def test_a_stop_token_ends_where_the_grammar_accepts(qwen2: Oracle, engine: Engine) -> None:
    stop = qwen2.tokenizer.convert_tokens_to_ids("7")
    sampling = SamplingParams(
        max_tokens=20,
        stop_token_ids=(stop,),
        logit_bias=((stop, 100.0),),
        grammar=Grammar(GrammarKind.REGEX, "[78]{3,9}"),
    )
    add(engine, "a", qwen2.prompt("what"), sampling)
    answers = run(engine)
    assert answers.ends["a"].stop_token_id == stop
    assert qwen2.tokenizer.decode(answers.tokens["a"]) == "8887"


def test_ignore_eos_goes_on_until_the_grammar_is_complete(qwen2: Oracle, engine: Engine) -> None:
    wants_end = tuple((token, 100.0) for token in engine.info.eos_token_ids)
    five = Grammar(GrammarKind.REGEX, "a{1,5}")
    add(engine, "a", qwen2.prompt("what"), SamplingParams(ignore_eos=True, logit_bias=wants_end, grammar=five))
    answers = run(engine)
    assert answers.ends["a"].finish_reason is FinishReason.STOP
    assert texts(qwen2, answers)["a"] == "aaaaa"


def test_max_tokens_cuts_an_answer_short(qwen2: Oracle, engine: Engine) -> None:
    schema = params("schema", 1)
    add(engine, "a", qwen2.prompt("what"), msgspec.structs.replace(schema, max_tokens=3))
    answers = run(engine)
    assert answers.ends["a"].finish_reason is FinishReason.LENGTH
    assert len(answers.tokens["a"]) == 3


def test_masks_that_leave_nothing_end_the_answer(qwen2: Oracle, engine: Engine) -> None:
    only_x = tuple(range(5))
    sampling = SamplingParams(allowed_token_ids=only_x, ignore_eos=True, grammar=Grammar(GrammarKind.REGEX, "zz+"))
    add(engine, "a", qwen2.prompt("what"), sampling)
    add(engine, "b", qwen2.prompt("what"), SamplingParams(max_tokens=3))
    answers = run(engine)
    assert answers.tokens["a"] == []
    assert answers.ends["a"].finish_reason is FinishReason.STOP
    assert len(answers.tokens["b"]) == 3


def test_a_grammar_that_turns_out_too_complex_ends_its_request_alone(qwen2: Oracle, engine: Engine) -> None:
    add(engine, "a", qwen2.prompt("what"), SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a{1000000}")))
    add(engine, "b", qwen2.prompt("what"), SamplingParams(max_tokens=3))
    answers = run(engine)
    error = answers.ends["a"].error
    assert error is not None
    assert (error.code, error.param) == ("invalid_request", "response_format")
    assert "can't be followed" in error.message
    assert len(answers.tokens["b"]) == 3


def test_a_grammar_that_can_not_be_compiled_is_refused_at_the_door(qwen2: Oracle, engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="unknown special token"):
        add(engine, "a", qwen2.prompt("x"), SamplingParams(grammar=Grammar(GrammarKind.EBNF, "start: <|no_such|>")))
    engine.check_integrity()
    assert not engine.has_work()


def test_a_model_without_a_tokenizer_follows_no_grammar() -> None:
    engine = fake_engine(FakeRunner())
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json"):
        engine.add_request("a", [1], SamplingParams(grammar=GRAMMARS["regex"]))
    assert not engine.has_work()
