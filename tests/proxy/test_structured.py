"""What an answer must look like: all the ways of saying it reach the workers as one grammar, or are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from epd.types import Grammar, GrammarKind
from tests.proxy.conftest import Cluster
from tests.proxy.test_requests import assert_error

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"z": {"type": "integer"}, "a": {"type": "string"}},
    "required": ["z", "a"],
    "additionalProperties": False,
}
OPENAI_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
REGEX = "[a-z]{3}"
EBNF = 'start: "yes" | "no"'

GOOD: list[tuple[dict[str, Any], GrammarKind, Any]] = [
    ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_OBJECT, ""),
    ({"response_format": OPENAI_SCHEMA}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"guided_json": SCHEMA}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"guided_json": {}}, GrammarKind.JSON_SCHEMA, {}),
    ({"structured_outputs": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"structured_outputs": {"json_object": True}}, GrammarKind.JSON_OBJECT, ""),
    ({"guided_regex": REGEX}, GrammarKind.REGEX, REGEX),
    ({"structured_outputs": {"regex": REGEX}}, GrammarKind.REGEX, REGEX),
    ({"guided_choice": ["yes", "no"]}, GrammarKind.CHOICE, ["yes", "no"]),
    ({"structured_outputs": {"choice": ["yes"]}, "response_format": {"type": "text"}}, GrammarKind.CHOICE, ["yes"]),
    ({"guided_grammar": EBNF}, GrammarKind.EBNF, EBNF),
    ({"structured_outputs": {"grammar": EBNF, "json_object": False}}, GrammarKind.EBNF, EBNF),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("fields", "kind", "content"), GOOD)
async def test_reaches_the_worker(
    cluster: Cluster, path: str, fields: dict[str, Any], kind: GrammarKind, content: Any
) -> None:
    response = await cluster.http.post(path, json={"messages": HI, "prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    grammar = cluster.pd.requests[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind is kind
    if isinstance(content, str):
        assert grammar == Grammar(kind, content)
    else:
        assert json.loads(grammar.text) == content
        # The order of properties is the order in which they are written.
        assert list(json.loads(grammar.text)) == list(content)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}])
async def test_free_text_has_no_grammar(cluster: Cluster, fields: dict[str, Any]) -> None:
    assert (await cluster.chat("hi", **fields)).status_code == 200
    assert cluster.pd.requests[0].sampling.grammar is None


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format", ""),
    ({"guided_json": {"type": "object", "patternProperties": 5}}, "guided_json", "patternProperties"),
    ({"guided_json": {"type": "object", "unevaluatedProperties": False}}, "guided_json", "unevaluatedProperties"),
    ({"guided_json": "{"}, "guided_json", ""),
    ({"guided_json": False}, "guided_json", ""),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", ""),
    ({"guided_regex": "(?=a)b"}, "guided_regex", ""),
    ({"guided_grammar": "start: nothing_like_that"}, "guided_grammar", ""),
    ({"guided_regex": "a" * 70_000}, "guided_regex", "bytes"),
    ({"structured_outputs": {"json_schema": {}}}, "structured_outputs", "`json_schema`"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "reason"), BAD)
async def test_what_can_not_be_followed_is_refused_at_admission(
    cluster: Cluster, fields: dict[str, Any], param: str, reason: str, stream: bool
) -> None:
    response = await cluster.chat("hi", stream=stream, **fields)
    assert response.status_code == 400, response.text
    assert_error(response.json(), 400, code="invalid_request", param=param)
    assert reason in response.json()["message"]
    assert cluster.pd.requests == []
