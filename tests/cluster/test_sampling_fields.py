"""Fields that change sampling and output, through real processes: against transformers, or against each other."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import Cluster
from tests.cluster.reference import Reference, picture, user

MAX_TOKENS = 24
LONG = 800
"""Enough for JSON with as many blanks as a hot model likes."""
TEXT = [{"role": "user", "content": "Who are you?"}]
SHOWN = [user(picture(3), "What is this?")]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(CHECKPOINT_DIR)


def chat(
    cluster: Cluster, messages: Any, *, max_tokens: int = MAX_TOKENS, temperature: float = 0, **fields: Any
) -> Any:
    names = {"n", "logprobs", "top_logprobs", "stream", "response_format", "seed", "stop", "logit_bias"}
    extra = {name: value for name, value in fields.items() if name not in names}
    known = {name: value for name, value in fields.items() if name in names}
    with cluster.client() as client:
        create: Any = client.chat.completions.create
        answer = create(
            model="test-model",
            messages=messages,
            max_tokens=max_tokens,
            temperature=temperature,
            extra_body=extra | {"return_token_ids": True},
            **known,
        )
        return list(answer) if known.get("stream") else answer


def token_ids(answer: Any) -> list[int]:
    found: list[int] = answer.choices[0].token_ids
    return found


def complete(cluster: Cluster, prompt: Any, **fields: Any) -> Any:
    status, body = cluster.post("/v1/completions", {"model": "test-model", "prompt": prompt, **fields})
    assert status == 200, body
    return body


# -- penalties and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [TEXT, SHOWN], ids=["text", "picture"])
def test_repetition_penalty_as_transformers_has_it(demo: Cluster, reference: Reference, messages: Any) -> None:
    options = {"min_new_tokens": MAX_TOKENS}
    wanted = reference.answer(messages, MAX_TOKENS, repetition_penalty=3.0, **options)
    assert token_ids(chat(demo, messages, repetition_penalty=3, min_tokens=MAX_TOKENS)) == wanted
    assert wanted != reference.answer(messages, MAX_TOKENS, **options)


def test_min_tokens_as_transformers_has_it(demo: Cluster, reference: Reference) -> None:
    wanted = reference.answer(TEXT, MAX_TOKENS, min_new_tokens=MAX_TOKENS)
    assert token_ids(chat(demo, TEXT, min_tokens=MAX_TOKENS)) == wanted


def test_bad_words_as_transformers_has_them(demo: Cluster, reference: Reference) -> None:
    plain = chat(demo, TEXT).choices[0].message.content
    word = plain.split()[1]
    ids = [reference.tokenizer.encode(prefix + word, add_special_tokens=False) for prefix in ("", " ")]
    answer = chat(demo, TEXT, bad_words=[word])
    assert token_ids(answer) == reference.answer(TEXT, MAX_TOKENS, bad_words_ids=ids)
    assert word not in answer.choices[0].message.content.split()


def test_frequency_and_presence_penalties_end_repetition(demo: Cluster) -> None:
    """A token that came is pushed below all others."""
    ids = token_ids(chat(demo, TEXT, frequency_penalty=2, min_tokens=MAX_TOKENS, logit_bias={}))
    plain = token_ids(chat(demo, TEXT, min_tokens=MAX_TOKENS))
    assert len(set(ids)) > len(set(plain))
    assert token_ids(chat(demo, TEXT, presence_penalty=2, min_tokens=MAX_TOKENS)) != plain


def test_logit_bias_and_allowed_tokens(demo: Cluster, reference: Reference) -> None:
    first = token_ids(chat(demo, TEXT))[0]
    assert first not in token_ids(chat(demo, TEXT, logit_bias={str(first): -100}))
    other = first + 1
    assert token_ids(chat(demo, TEXT, logit_bias={str(other): 100}, max_tokens=3)) == [other] * 3
    allowed = token_ids(chat(demo, TEXT, allowed_token_ids=[other, other + 1], ignore_eos=True))
    assert set(allowed) <= {other, other + 1}


# -- log probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [TEXT, SHOWN], ids=["text", "picture"])
def test_greedy_tokens_are_the_likeliest(demo: Cluster, messages: Any) -> None:
    [choice] = chat(demo, messages, logprobs=True, top_logprobs=5).choices
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        best = entry.top_logprobs
        assert len(best) == 5
        assert (best[0].token, best[0].logprob) == (entry.token, entry.logprob)
        assert [one.logprob for one in best] == sorted((one.logprob for one in best), reverse=True)
        assert sum(math.exp(one.logprob) for one in best) <= 1 + 1e-5


def test_a_stream_tells_the_same_ones(demo: Cluster) -> None:
    whole = chat(demo, TEXT, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    told: list[Any] = []
    for chunk in chat(demo, TEXT, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            entries = choice.logprobs.content if choice.logprobs else []
            assert b"".join(bytes(entry.bytes) for entry in entries).decode() == (choice.delta.content or "")
            told += entries
    assert [entry.token for entry in told] == [entry.token for entry in whole]
    assert [entry.logprob for entry in told] == pytest.approx([entry.logprob for entry in whole], abs=1e-4)


def test_scoring_an_answer_gives_its_own_log_probabilities(demo: Cluster, reference: Reference) -> None:
    prompt = reference.tokenizer.encode("A red circle and", add_special_tokens=False)
    made = complete(demo, prompt, max_tokens=8, temperature=0, logprobs=1, return_token_ids=True, ignore_eos=True)
    [choice] = made["choices"]
    scored = complete(demo, prompt + choice["token_ids"], max_tokens=0, echo=True, logprobs=1, prompt_logprobs=3)
    [score] = scored["choices"]
    assert scored["usage"]["completion_tokens"] == 0
    assert score["logprobs"]["token_logprobs"][0] is None
    values = score["logprobs"]["token_logprobs"]
    assert values[len(prompt) :][: len(choice["logprobs"]["token_logprobs"])] == pytest.approx(
        choice["logprobs"]["token_logprobs"], abs=1e-4
    )
    for token, value, entry in zip(
        (prompt + choice["token_ids"])[1:], values[1:], score["prompt_logprobs"][1:], strict=True
    ):
        assert entry[str(token)]["logprob"] == pytest.approx(value, abs=1e-6)
        ranked = sorted(entry.values(), key=lambda one: one["rank"])
        assert [one["logprob"] for one in ranked] == sorted((one["logprob"] for one in ranked), reverse=True)


def test_prompt_logprobs_of_a_chat_with_a_picture(demo: Cluster) -> None:
    answer = chat(demo, SHOWN, max_tokens=1, prompt_logprobs=0)
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens
    assert answer.prompt_logprobs[0] is None
    assert all(len(entry) == 1 for entry in answer.prompt_logprobs[1:])


def test_best_of_is_the_best_of_them(demo: Cluster) -> None:
    fields = {"temperature": 1.5, "seed": 11, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
    every = complete(demo, "The", n=4, **fields)["choices"]
    means = [math.fsum(choice["logprobs"]["token_logprobs"]) / 8 for choice in every]
    assert len(set(means)) == 4
    best = complete(demo, "The", best_of=4, n=2, **fields)["choices"]
    ranked = sorted(range(4), key=lambda index: -means[index])
    assert [choice["text"] for choice in best] == [every[index]["text"] for index in ranked[:2]]


# -- structured output -------------------------------------------------------------------------------------------------


def schema_format() -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "shape", "strict": True, "schema": SCHEMA}}


def check_shape(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"colour", "count"}
    assert value["colour"] in ("red", "blue")
    assert value["count"] in range(10)


@pytest.mark.parametrize("seed", range(3))
def test_json_schema_in_a_stream(demo: Cluster, seed: int) -> None:
    chunks = chat(
        demo, SHOWN, stream=True, response_format=schema_format(), temperature=1.5, seed=seed, max_tokens=LONG
    )
    assert chunks[-1].choices[0].finish_reason == "stop"
    check_shape("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


class Shape(BaseModel):
    """What openai-python makes a schema of."""

    name: Literal["square", "circle"]
    sides: int = Field(ge=0, le=9)
    corners: list[bool] | None = Field(max_length=3)


def test_openai_python_parses_into_a_model(demo: Cluster) -> None:
    with demo.client() as client:
        answer = client.chat.completions.parse(
            model="test-model",
            messages=[{"role": "user", "content": "Who are you?"}],
            response_format=Shape,
            max_tokens=LONG,
            temperature=1.2,
            seed=1,
        )
    assert isinstance(answer.choices[0].message.parsed, Shape)


def test_all_of_several_samples_follow_the_schema(demo: Cluster) -> None:
    answer = chat(demo, TEXT, n=3, response_format=schema_format(), temperature=1.5, seed=5, max_tokens=LONG)
    for choice in answer.choices:
        check_shape(choice.message.content)


def test_choice_regex_and_grammar(demo: Cluster) -> None:
    choices = ["a square", "a circle"]
    assert chat(demo, TEXT, guided_choice=choices).choices[0].message.content in choices
    text = chat(demo, TEXT, structured_outputs={"regex": "[xyz]{4}"}, temperature=1).choices[0].message.content
    assert len(text) == 4
    assert set(text) <= set("xyz")
    grammar = 'start: "so " ("yes" | "no")'
    assert chat(demo, TEXT, guided_grammar=grammar).choices[0].message.content in ("so yes", "so no")


def test_a_schema_that_can_not_be_followed_is_a_400(demo: Cluster) -> None:
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        chat(demo, TEXT, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "array", "uniqueItems": True}}})  # fmt: skip


# -- ends --------------------------------------------------------------------------------------------------------------


def test_stop_strings_in_the_output(demo: Cluster) -> None:
    plain = chat(demo, TEXT).choices[0].message.content
    stop = plain[3:6]
    end = plain.index(stop)
    for include, wanted in ((False, plain[:end]), (True, plain[:end] + stop)):
        [choice] = chat(demo, TEXT, stop=[stop], include_stop_str_in_output=include, logprobs=True).choices
        assert choice.message.content == wanted
        told = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
        assert told.startswith(wanted)
        assert len(told) < len(wanted) + 12


def test_priorities_are_taken(demo: Cluster) -> None:
    assert token_ids(chat(demo, TEXT, priority=-5)) == token_ids(chat(demo, TEXT, priority=5))


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_an_answer_that_was_begun_goes_on_as_the_model_would(demo: Cluster) -> None:
    whole = chat(demo, TEXT, max_tokens=LONG).choices[0].message.content
    begun = whole[: whole.index(" ", 4)]
    messages = [*TEXT, {"role": "assistant", "content": begun}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    rest = chat(demo, messages, max_tokens=LONG, **fields).choices[0].message.content
    assert begun + rest == whole
    assert chat(demo, messages, max_tokens=LONG, echo=True, **fields).choices[0].message.content == whole


def test_prefixes_are_shared_within_a_salt(demo: Cluster) -> None:
    messages = [{"role": "user", "content": "A prompt that nobody else sends, of some length. " * 8}]

    def cached(**fields: Any) -> int:
        found: int = chat(demo, messages, max_tokens=1, **fields).usage.prompt_tokens_details.cached_tokens
        return found

    assert cached(cache_salt="one") == 0
    assert cached(cache_salt="one") > 0
    assert cached(cache_salt="two") == 0
    assert cached() == 0
