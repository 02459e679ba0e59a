"""Calls that are enforced: what grammars let a model write is what the family's parser reads as calls, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llguidance
import pytest
from tokenizers import AddedToken

from epd.errors import InvalidRequest
from epd.grammar_check import limits, llguidance_grammar, validate
from epd.types import Grammar, GrammarKind
from proxy.text.tokenizer import Tokenizer
from proxy.tools.families import LLAMA3, MISTRAL, MISTRAL_V11, QWEN25, Family
from proxy.tools.grammar import arguments_schema, enforced
from proxy.tools.reader import CallReader
from proxy.tools.use import Choice, Function, ToolUse
from tests.proxy.model_files import write_model
from workers.engine.grammar import GrammarCompiler

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Function("get_weather", "tools[0].function", parameters=CITY)
TIME = Function("get_time", "tools[1].function")
BOTH = (WEATHER, TIME)
FAMILIES = pytest.mark.parametrize(
    "family", [QWEN25, LLAMA3, MISTRAL, MISTRAL_V11], ids=["qwen25", "llama3", "mistral", "mistral v11"]
)
Calls = list[tuple[str, str]]
PARIS: tuple[str, str] = ("get_weather", '{"city": "Paris } ; ]"}')
NOW: tuple[str, str] = ("get_time", "{}")


def written(family: Family, *calls: tuple[str, str]) -> str:
    """Calls as the family writes them."""
    if family is LLAMA3:
        return "; ".join(f'{{"name": "{name}", "parameters": {text}}}' for name, text in calls)
    if family is MISTRAL_V11:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{text}" for name, text in calls)
    objects = [f'{{"name": "{name}", "arguments": {text}}}' for name, text in calls]
    if family is MISTRAL:
        return f"[TOOL_CALLS][{', '.join(objects)}]"
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)


def takes(grammar: Grammar, text: str) -> bool:
    """Whether the grammar lets a model write the whole text, and end there."""
    source = llguidance_grammar(grammar)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), source, log_level=0, limits=limits())
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def grammar_of(family: Family, choice: Choice, **fields: Any) -> Grammar:
    form = fields.pop("form", None)
    settings: dict[str, Any] = {"shown": BOTH, "callable": BOTH, "choice": choice}
    use = ToolUse(**(settings | fields))
    found = enforced(use, family, {}, form)
    assert found.grammar == found.trial
    validate(found.trial, param="tools")
    return found.trial


def read(family: Family, text: str) -> tuple[str, Calls]:
    reader = CallReader(family.new_parser(None))
    content = reader.push(text)[1] + reader.finish()[1]
    return content, [(call.name, call.arguments) for call in reader.calls]


@FAMILIES
def test_required(family: Family) -> None:
    grammar = grammar_of(family, Choice.REQUIRED)
    for calls in ([PARIS], [NOW], [NOW, PARIS], [PARIS] * 5):
        text = written(family, *calls)
        assert takes(grammar, text)
        assert read(family, text) == ("", calls)
    assert not takes(grammar, "")
    assert not takes(grammar, "text")
    assert not takes(grammar, "text " + written(family, NOW))
    assert not takes(grammar, written(family, ("other", "{}")))
    assert not takes(grammar, written(family, ("get_weather", "{}")))  # city is required
    assert not takes(grammar, written(family, ("get_weather", '{"city": "x", "country": "y"}')))


@FAMILIES
def test_one_call_where_one_is_wanted(family: Family) -> None:
    named = grammar_of(family, Choice.NAMED, callable=(WEATHER,))
    one = grammar_of(family, Choice.REQUIRED, is_parallel=False)
    assert takes(named, written(family, PARIS))
    assert not takes(named, written(family, NOW))
    assert takes(one, written(family, NOW))
    for grammar in (named, one):
        assert not takes(grammar, written(family, PARIS, PARIS))


@FAMILIES
def test_strict_functions_bind_calls_that_the_model_chooses_to_make(family: Family) -> None:
    strict = Function("get_weather", "", parameters=CITY, strict=True)
    grammar = grammar_of(family, Choice.AUTO, callable=(strict, WEATHER_TOO))
    for text in ("", "Hello [ { <", "Let me see, <tool_cal", written(family, PARIS), written(family, PARIS, PARIS)):
        assert takes(grammar, text), text
    if family is not LLAMA3:
        assert takes(grammar, "Let me see. " + written(family, PARIS))
    assert not takes(grammar, written(family, ("get_weather", "{}")))
    assert takes(grammar, written(family, ("weather_too", '{"town": 1}')))  # not strict
    assert not takes(grammar, written(family, ("unknown", "{}")))


WEATHER_TOO = Function("weather_too", "", parameters=CITY)


@FAMILIES
def test_an_answer_of_the_wanted_form_or_calls(family: Family) -> None:
    grammar = grammar_of(family, Choice.AUTO, form='{"type": "object", "required": ["x"]}')
    assert takes(grammar, '{"x": 1}')
    assert takes(grammar, written(family, PARIS))
    assert not takes(grammar, "{}")
    assert not takes(grammar, "Hello")


@FAMILIES
def test_markers_that_are_tokens_are_those_tokens(family: Family) -> None:
    use = ToolUse(BOTH, BOTH, Choice.REQUIRED)
    found = enforced(use, family, {marker: 1000 + i for i, marker in enumerate(family.markers)}, None)
    validate(found.trial, param="tools")
    assert (found.grammar == found.trial) == (family is LLAMA3)  # which needs none
    assert ("<[1000]>" in found.grammar.text) == (family is not LLAMA3)
    for marker in family.markers:
        assert marker not in found.grammar.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With markers of Qwen, which are added tokens but no special ones, and of Mistral, which are special."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    backend = Tokenizer(folder / "tokenizer.json").backend
    backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True), AddedToken("[ARGS]", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("choice", [Choice.REQUIRED, Choice.AUTO])
@pytest.mark.parametrize("family", [QWEN25, MISTRAL, MISTRAL_V11], ids=["qwen25", "mistral", "mistral v11"])
def test_a_model_writes_markers_as_its_tokens(folder: Path, family: Family, choice: Choice) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    compiler = GrammarCompiler(folder / "tokenizer.json", tokenizer.vocab_size, (), 1)
    strict = Function("get_weather", "", parameters=CITY, strict=True)
    use = ToolUse(BOTH, (strict, TIME), choice)
    found = enforced(use, family, tokenizer.added_ids, None)
    begins = ["", "<think>Well.</think>\nSo: "] if choice is Choice.AUTO else [""]
    for text in [begin + written(family, PARIS, NOW) for begin in begins]:
        matcher, token_ids = compiler.matcher(found.grammar), tokenizer.encode(text)
        assert tokenizer.token_id(family.markers[0]) in token_ids
        for token in token_ids:
            matcher.accept(token)
            assert matcher.error is None, text
        assert matcher.is_accepting


TRICKY = {"type": "object", "properties": {"a::=b": {"type": "string", "description": 'x ::= {"\n} "'}}}


def test_schemas_may_say_anything() -> None:
    function = Function("f", "", parameters=TRICKY | {"x-guidance": {"lenient": True}})
    grammar = grammar_of(QWEN25, Choice.REQUIRED, callable=(function,))
    assert takes(grammar, written(QWEN25, ("f", '{"a::=b": "y"}')))


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        (None, {"type": "object", "properties": {}, "additionalProperties": False}),
        ({}, {"type": "object"}),
        ({"properties": {}}, {"type": "object", "properties": {}, "additionalProperties": False}),
        (CITY | {"additionalProperties": True}, CITY | {"additionalProperties": True}),
        ({"anyOf": [CITY], "properties": {}}, {"type": "object", "anyOf": [CITY], "properties": {}}),
        (
            {
                "description": "goes",
                "$defs": {"title": {"title": "goes", "type": "string"}},
                "properties": {
                    "description": {"description": "goes", "$ref": "#/$defs/title"},
                    "list": {"items": {"title": "goes", "enum": [{"title": "stays"}]}, "default": [1]},
                },
            },
            {
                "type": "object",
                "$defs": {"title": {"type": "string"}},
                "properties": {
                    "description": {"$ref": "#/$defs/title"},
                    "list": {"items": {"enum": [{"title": "stays"}]}},
                },
                "additionalProperties": False,
            },
        ),
    ],
)
def test_schemas_of_arguments(parameters: Any, wanted: Any) -> None:
    assert arguments_schema(Function("f", "tools[0].function", parameters=parameters)) == wanted


def test_arguments_are_an_object() -> None:
    with pytest.raises(InvalidRequest) as caught:
        arguments_schema(Function("f", "tools[0].function", parameters={"type": "string"}))
    assert caught.value.param == "tools[0].function.parameters"


def test_the_kind_is_one_that_workers_know() -> None:
    assert grammar_of(QWEN25, Choice.REQUIRED).kind is GrammarKind.EBNF
