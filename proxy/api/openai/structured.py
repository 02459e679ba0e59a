"""What an answer must look like: the several ways in which clients say it, to one `Grammar`."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import msgspec

from epd.errors import InvalidRequest
from epd.types import Grammar, GrammarKind
from proxy.api.openai.schema import ResponseFormat, SamplingRequest, StructuredOutputs

_REFUSED_OPTIONS = (
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",
)


_asking = attrgetter(
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"
)
_NOTHING_ASKED = (None,) * 6


def grammar_of(request: SamplingRequest) -> tuple[str, Grammar] | None:
    """The field that asks for a form, and the form; None when the answer is free text. Not yet validated.

    Raises:
        InvalidRequest: two fields ask for one, or a field has no schema, a type that does not exist, or no choice.
    """
    if _asking(request) == _NOTHING_ASKED:
        return None
    asked = dict(_all_asked(request))
    if len(asked) > 1:
        raise InvalidRequest(
            f"{' and '.join(asked)} each ask for a form of the answer; send one of them.", param=list(asked)[1]
        )
    return next(iter(asked.items()), None)


def _all_asked(request: SamplingRequest) -> list[tuple[str, Grammar]]:
    found = [("response_format", _of_response_format(request.response_format))] if request.response_format else []
    outputs = request.structured_outputs
    if outputs is not None:
        _check_options(outputs)
        found += [(f"structured_outputs.{name}", grammar) for name, grammar in _of_parts(outputs, "")]
    found += [(f"guided_{name}", grammar) for name, grammar in _of_parts(request, "guided_")]
    return [(name, grammar) for name, grammar in found if grammar is not None]


def _of_parts(source: SamplingRequest | StructuredOutputs, prefix: str) -> list[tuple[str, Grammar | None]]:
    """vLLM's names, of which one object and four fields share the meaning."""
    if isinstance(source, StructuredOutputs):
        schema, regex, choice, grammar = source.json, source.regex, source.choice, source.grammar
        is_object = bool(source.json_object)
    else:
        schema, regex = source.guided_json, source.guided_regex
        choice, grammar = source.guided_choice, source.guided_grammar
        is_object = False
    where = prefix or "structured_outputs."
    return [
        ("json", None if schema is None else Grammar(GrammarKind.JSON_SCHEMA, _schema_text(schema))),
        ("json_object", Grammar(GrammarKind.JSON_OBJECT) if is_object else None),
        ("regex", None if regex is None else Grammar(GrammarKind.REGEX, regex)),
        ("choice", None if choice is None else _of_choice(choice, f"{where}choice")),
        ("grammar", None if grammar is None else Grammar(GrammarKind.EBNF, grammar)),
    ]


def _of_choice(choice: list[str], field: str) -> Grammar:
    if not choice or not all(choice):
        raise InvalidRequest(f"{field} is empty, or has an empty choice.", param=field)
    return Grammar(GrammarKind.CHOICE, _json(choice))


def _of_response_format(wanted: ResponseFormat) -> Grammar | None:
    schema = wanted.schema if wanted.json_schema is None else wanted.json_schema.schema
    kind = "json_schema" if wanted.type is None and schema is not None else wanted.type
    match kind:
        case "text" if schema is None:
            return None
        case "json_object" if schema is None:
            return Grammar(GrammarKind.JSON_OBJECT)
        case "json_schema" | "json_object" if schema is not None:
            return Grammar(GrammarKind.JSON_SCHEMA, _json(schema))
        case "json_schema":
            field, problem = "json_schema.schema", "is missing"
        case "text":
            field, problem = "type", "is text, which has no schema"
        case None:
            field, problem = "type", "is missing"
        case other:
            field, problem = "type", f"{other[:100]!r} is not one of text, json_object, json_schema"
    raise InvalidRequest(f"response_format.{field} {problem}.", param=f"response_format.{field}")


def _check_options(outputs: StructuredOutputs) -> None:
    for name in _REFUSED_OPTIONS:
        if getattr(outputs, name):
            field = f"structured_outputs.{name}"
            raise InvalidRequest(f"{field} is not supported by this server; leave it out.", param=field)


def _schema_text(schema: dict[str, Any] | bool | str) -> str:
    return schema if isinstance(schema, str) else _json(schema)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
