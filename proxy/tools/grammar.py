"""Calls that are enforced, as a grammar in the format of the model's family, so that its parser reads what comes.

    required          one call or more, nothing else
    named             one call of one function
    auto, strict      free text, and calls whose arguments follow the schemas of functions that say `strict`
    auto, with form   an answer of the form that `response_format` asks for, or calls

The language is Lark's, as llguidance has it: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from epd.errors import InvalidRequest
from epd.grammar_check import BLANKS
from epd.types import Grammar, GrammarKind
from proxy.tools.families import LLAMA3, MISTRAL, MISTRAL_V11, Family
from proxy.tools.use import Choice, Function, ToolUse

MAX_CALLS = 32
"""That are enforced in one answer: a weak model would go on for ever."""
_ONE_BLANK = r"\x20?"
"""Between the JSON tokens of arguments: on one line, as models are trained to write them."""
_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "$comment", "deprecated"))
_OF_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
"""Keywords whose value has schemas as values, under any names."""
_VALUES = frozenset(("enum", "const", "required"))
_COMBINES = ("$ref", "allOf", "anyOf", "oneOf", "if", "not", "enum", "const")
_OPENS = ("additionalProperties", "unevaluatedProperties", "patternProperties")


@dataclass(frozen=True)
class Enforced:
    """A grammar twice."""

    grammar: Grammar
    """For workers: markers are the model's tokens."""
    trial: Grammar
    """For a check without the model's vocabulary: markers are text."""


def enforced(use: ToolUse, family: Family, tokens: Mapping[str, int], form: str | None) -> Enforced:
    """The grammar of a request's answers.

    Args:
        use: of tools.
        family: of the model.
        tokens: literal → id of the model's added tokens. llguidance takes them for no text, whether or not they are
            special, so that free text has to name them, and markers among them are written as what they are.
        form: JSON schema of answers without calls; None: they are free.
    """
    grammar, trial = (Grammar(GrammarKind.EBNF, _Maker(use, family, known, form).make()) for known in (tokens, {}))
    return Enforced(grammar, trial)


def arguments_schema(function: Function) -> dict[str, Any]:
    """The schema of a call's arguments: always an object, without parameters that the function does not have.

    Raises:
        InvalidRequest: it asks for something else than an object.
    """
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema: dict[str, Any] = _bare(function.parameters)
    if schema.get("type", "object") != "object":
        field = f"{function.field}.parameters"
        raise InvalidRequest(f"{field}: the schema of arguments must have type object.", param=field)
    is_closed = "properties" in schema and not any(word in schema for word in (*_COMBINES, *_OPENS))
    closed = {"additionalProperties": False} if is_closed else {}
    return {"type": "object"} | schema | closed


def _bare(schema: Any) -> Any:
    """A schema without what only explains, which is most of many: what a grammar may have of bytes is limited."""
    if isinstance(schema, list):
        return [_bare(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for name, value in schema.items():
        if name in _OF_SCHEMAS and isinstance(value, dict):
            found[name] = {key: _bare(one) for key, one in value.items()}
        elif name not in _ANNOTATIONS:
            found[name] = value if name in _VALUES else _bare(value)
    return found


class _Maker:
    """Writes one grammar. Each method gives a rule's right-hand side, or adds rules."""

    def __init__(self, use: ToolUse, family: Family, tokens: Mapping[str, int], form: str | None) -> None:
        self._use = use
        self._family = family
        self._tokens = tokens
        self._form = form
        self._rules: list[str] = []

    def make(self) -> str:
        self._add_calls()
        if self._use.choice is not Choice.AUTO:
            self._rule("start", "calls")
        elif self._form is not None:
            self._rule("start", f"calls | %json {_schema(json.loads(self._form), BLANKS)}")
        else:
            self._add_free_text()
        return "\n".join(self._rules) + "\n"

    def _marker(self, literal: str) -> str:
        return f"<[{self._tokens[literal]}]>" if literal in self._tokens else _text(literal)

    def _rule(self, name: str, right: str) -> None:
        self._rules.append(f"{name}: {right}")

    def _repeated(self, one: str, more: str) -> str:
        """One call, and more of them where there may be several."""
        limit = MAX_CALLS - 1 if self._use.max_calls is None else self._use.max_calls - 1
        return f"{one} ({more}){{0,{limit}}}" if limit else one

    def _add_calls(self) -> None:
        """`calls`, of which `rest` is what follows the first opener."""
        opener = self._opener
        self._rule("body", " | ".join(f"body_{i}" for i in range(len(self._use.callable))))
        self._rule("calls", f"{opener} rest")
        if self._family is LLAMA3:
            self._rule("rest", self._repeated("body", f"{_text('; ')} body"))
            self._add_objects("parameters")
        elif self._family is MISTRAL_V11:
            self._rule("rest", self._repeated("body", f"{opener} body"))
            self._add_bodies(lambda name: f"{_text(name)} {self._marker('[ARGS]')}", "")
        elif self._family is MISTRAL:
            calls = self._repeated("body", f"{_text(', ')} body")
            self._rule("rest", f'"[" {calls} "]"')
            self._add_objects("arguments")
        else:
            self._rule("rest", self._repeated("block", f"{_text(chr(10))} {opener} block"))
            closer = self._marker(self._family.markers[1])
            self._rule("block", f"{_text(chr(10))} body {_text(chr(10))} {closer}")
            self._add_objects("arguments")

    @property
    def _opener(self) -> str:
        """Llama's calls need none."""
        return "" if self._family is LLAMA3 else self._marker(self._family.markers[0])

    def _add_objects(self, key: str) -> None:
        # In the pieces that JSON has: where an answer may be JSON too, both begin alike.
        self._add_bodies(
            lambda name: f'"{{" {_text(_text("name"))} ": " {_text(_text(name))} ", " {_text(_text(key))} ": "', '"}"'
        )

    def _add_bodies(self, head: Callable[[str], str], tail: str) -> None:
        for i, function in enumerate(self._use.callable):
            self._rule(f"body_{i}", f"{head(function.name)} arguments_{i} {tail}")
            is_free = self._use.choice is Choice.AUTO and not function.strict
            schema = {"type": "object"} if is_free else arguments_schema(function)
            self._rule(f"arguments_{i}", f"%json {_schema(schema, _ONE_BLANK)}")

    def _add_free_text(self) -> None:
        """Text that turns into calls where the family's opener comes."""
        literal = self._family.markers[0]
        others = _ranges(token for text, token in self._tokens.items() if text not in self._family.markers)
        self._rule("text", f"(TEXT | <[{others}]>)*" if others else "TEXT*")
        if self._family is LLAMA3:
            self._rule("start", "calls | (BEGIN text)?")
            self._rule("BEGIN", r"/[ \t\r\n]*[^{ \t\r\n]/")
            self._rule("TEXT", "/(?s:.+)/")
            return
        if literal in self._tokens:
            # Nothing is said against spelling the marker in other tokens: a mask takes 0.01 ms so, else over 1 ms.
            self._rule("TEXT", "/(?s:.+)/")
            self._rule("start", "text calls?")
            return
        self._rule("TEXT", f"/(?s:.+)/ & ~/(?s:.*){_regex(literal)}(?s:.*)/")
        is_blocks = self._family not in (MISTRAL, MISTRAL_V11)
        rest = "block start" if is_blocks and self._use.max_calls is None else "rest"
        self._rule("start", f"text | before {rest}")
        self._rule(f"before[suffix={_text(literal)}]", "/(?s:.*)/")


def _ranges(tokens: Iterable[int]) -> str:
    """Ids as llguidance lists them: `1,5-9`."""
    found: list[list[int]] = []
    for token in sorted(set(tokens)):
        if found and token == found[-1][1] + 1:
            found[-1][1] = token
        else:
            found.append([token, token])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def _text(literal: str) -> str:
    return json.dumps(literal, ensure_ascii=False)


def _regex(literal: str) -> str:
    return "".join(f"\\{letter}" if not letter.isalnum() and letter not in "_<>" else letter for letter in literal)


def _schema(schema: dict[str, Any] | bool, blanks: str) -> str:
    """For `%json`. With options of ours, and without what would be read as another grammar language."""
    options = {"lenient": False, "whitespace_pattern": blanks}
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return json.dumps(schema | {"x-guidance": options}, ensure_ascii=False).replace("::=", "\\u003a:=")
