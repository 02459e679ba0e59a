from __future__ import annotations

import json
import subprocess
import sys

import pytest

from epd import grammar_check
from epd.errors import InvalidRequest
from epd.grammar_check import MAX_GRAMMAR_BYTES, validate
from epd.types import Grammar, GrammarKind

GBNF = 'root ::= greeting "!"\ngreeting ::= "hello" | "good" " "+ "day"'
LARK = 'start: greeting "!"\ngreeting: "hello" | "good" " "+ "day"'


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_object", ""),
        ("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
        ("json_schema", '{"anyOf": [{"type": "string", "format": "date"}, {"$ref": "#/$defs/x"}], "$defs": {"x": {}}}'),
        ("regex", r"^\d{3}-[a-z]+$"),
        ("regex", ""),
        ("regex", 'a/b\n"c"'),
        ("choice", json.dumps(["yes", "no", 'a "quoted" \\ one', "zwölf\n", "\x07"])),
        ("ebnf", GBNF),
        ("ebnf", LARK),
    ],
)
def test_what_can_be_followed_is_accepted(kind: str, text: str) -> None:
    validate(Grammar(GrammarKind(kind), text))


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", "{", "EOF"),
        ("json_schema", "true", "object schema"),
        ("json_schema", '{"type": "nonsense"}', "Invalid type: nonsense"),
        ("json_schema", '{"not": {"type": "string"}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', "Unimplemented keys"),
        ("json_schema", '{"$ref": "http://127.0.0.1/schema"}', "does not fetch"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}', "Unsatisfiable"),
        ("json_schema", json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(700)}}), "max is 2000"),
        ("regex", "[a-z", "unclosed"),
        ("regex", "(?=a)b", "look-ahead"),
        ("choice", "[]", "one or more"),
        ("choice", '["a", 1]', "strings"),
        ("choice", "nothing", "Expecting value"),
        ("ebnf", "start: other", "unknown name"),
        ("ebnf", "root ::= other", "'other' not found"),
        ("ebnf", 'root ::= "a', "Unexpected end"),
        ("ebnf", "root ::= " + "(" * 20_000, "recursion"),
        ("ebnf", 'start: "a" <|im_start|>', "unknown special token"),
        ("ebnf", 'start: start "a"', "no text satisfies it"),
        ("regex", "x" * (MAX_GRAMMAR_BYTES + 1), "at most 65536 are allowed"),
    ],
)
def test_what_can_not_is_refused_with_the_reason(kind: str, text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(Grammar(GrammarKind(kind), text), param="guided")
    assert reason in str(caught.value)
    assert caught.value.param == "guided"
    assert len(str(caught.value)) < 500


def test_what_would_cost_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "((a{1000}){1000}){1000}"
    monkeypatch.setattr(grammar_check, "_MAX_TRIAL_S", 0.05)  # it takes ten times that, whatever the machine
    with pytest.raises(InvalidRequest, match="too complex"):
        validate(Grammar(GrammarKind.REGEX, text))


def test_checking_needs_no_torch() -> None:
    code = (
        "import sys; from epd.grammar_check import validate; from epd.types import Grammar, GrammarKind;"
        "validate(Grammar(GrammarKind.REGEX, 'a')); print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
