"""`tools`, `tool_choice` and their older forms to what they ask for. What contradicts itself is a 400 that names it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import msgspec

from epd.errors import InvalidRequest
from epd.types import Grammar, GrammarKind
from proxy.api.json_values import MAX_VALUES, count_values
from proxy.api.openai.schema import ChatRequest, FunctionDefinition
from proxy.api.openai.structured import grammar_of
from proxy.models.served_model import ServedModel
from proxy.tools.grammar import Enforced, arguments_schema, enforced
from proxy.tools.reader import CallOptions
from proxy.tools.use import Choice, Function, ToolUse

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_CHOICES = {"auto": Choice.AUTO, "required": Choice.REQUIRED}


_asked_for = attrgetter("tools", "functions", "tool_choice", "function_call")
_NOTHING = (None,) * 4

# -- what a request asks for -------------------------------------------------------------------------------------------


def tool_use_of(request: ChatRequest) -> ToolUse | None:
    """What the request says about tools; None: that none may be called.

    Raises:
        InvalidRequest: fields contradict each other, or name no function.
    """
    if _asked_for(request) == _NOTHING:
        return None
    if request.tools == [] and request.tool_choice == "none":
        return None
    functions, field = _functions(request)
    choice_field = "function_call" if field == "functions" else "tool_choice"
    choice: Any = getattr(request, choice_field)
    if not functions:
        if request.tool_choice not in (None, "none") or request.function_call not in (None, "none"):
            name = "tool_choice" if request.tool_choice not in (None, "none") else "function_call"
            raise InvalidRequest(f"{name} needs {'functions' if name == 'function_call' else 'tools'}.", param=name)
        return None
    if choice == "none":
        return None
    is_old = field == "functions"
    if is_old and isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    shown, callable_, kind = _chosen(choice, functions, choice_field)
    is_parallel = request.parallel_tool_calls is not False and not is_old
    return ToolUse(shown, callable_, kind, is_parallel, is_old)


def _functions(request: ChatRequest) -> tuple[tuple[Function, ...], str]:
    if request.tools is not None and request.functions is not None:
        raise InvalidRequest("functions is the older form of tools; send one of them.", param="functions")
    if request.functions is not None:
        found = [(f"functions[{i}]", one) for i, one in enumerate(request.functions)]
        return _checked("functions", found), "functions"
    found = []
    for i, tool in enumerate(request.tools or ()):
        where = f"tools[{i}]"
        if tool.type != "function":
            raise InvalidRequest(f"{where}.type: {tool.type[:100]!r} is not function.", param=f"{where}.type")
        if tool.function is None:
            raise InvalidRequest(f"{where}.function is missing.", param=f"{where}.function")
        found.append((f"{where}.function", tool.function))
    if request.tools is not None:
        return _checked("tools", found), "tools"
    return (), "tools"


def _checked(field: str, given: Sequence[tuple[str, FunctionDefinition]]) -> tuple[Function, ...]:
    if not given:
        raise InvalidRequest(f"{field} is empty; leave it out where there is nothing to call.", param=field)
    if len(given) > MAX_TOOLS:
        raise InvalidRequest(f"{field}: {len(given)} functions; at most {MAX_TOOLS}.", param=field)
    found: dict[str, Function] = {}
    values_left = MAX_VALUES
    for where, one in given:
        if not _NAME.fullmatch(one.name):
            raise InvalidRequest(
                f"{where}.name: {one.name[:140]!r} is no name for a function: 1 to 128 of the letters a-z, A-Z, 0-9 "
                "and _ - . : /",
                param=f"{where}.name",
            )
        if one.name in found:
            raise InvalidRequest(f"{where}.name: there are two functions {one.name!r}.", param=f"{where}.name")
        function = Function(one.name, where, one.description, one.parameters, bool(one.strict))
        try:
            values_left -= count_values(one.parameters, values_left)
        except ValueError as error:
            raise InvalidRequest(f"{where}.parameters {error}.", param=f"{where}.parameters") from error
        arguments_schema(function)
        found[one.name] = function
    return tuple(found.values())


def _chosen(
    choice: Any, functions: tuple[Function, ...], field: str
) -> tuple[tuple[Function, ...], tuple[Function, ...], Choice]:
    """Functions to show, functions that may be called, and who decides."""
    if choice is None:
        return functions, functions, Choice.AUTO
    if isinstance(choice, str) and choice in _CHOICES:
        return functions, functions, _CHOICES[choice]
    match choice:
        case {"type": "function", "function": {"name": str(name)}}:
            return functions, (_named(name, functions, f"{field}.function.name"),), Choice.NAMED
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}}:
            where = f"{field}.allowed_tools.tools"
            if len(tools) > MAX_TOOLS:
                raise InvalidRequest(f"{where}: {len(tools)} functions; at most {MAX_TOOLS}.", param=where)
            names = [tool.get("function", {}).get("name") if isinstance(tool, dict) else None for tool in tools]
            found = [_named(name, functions, f"{where}[{i}].function.name") for i, name in enumerate(names)]
            allowed = tuple({one.name: one for one in found}.values())
            if not allowed:
                raise InvalidRequest(f"{where} is empty.", param=where)
            # Those that may not be called are not described either: nothing else keeps a free answer from them.
            return allowed, allowed, _CHOICES[mode]
    raise InvalidRequest(
        f'{field}: want none, auto, required, {{"type": "function", "function": {{"name": …}}}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": […]}}.',
        param=field,
    )


def _named(name: Any, functions: tuple[Function, ...], field: str) -> Function:
    found = next((function for function in functions if function.name == name), None)
    if found is None:
        raise InvalidRequest(f"{field}: there is no function {str(name)[:140]!r} among the tools.", param=field)
    return found


# -- what that means for one model -------------------------------------------------------------------------------------


class ToolSide(msgspec.Struct, frozen=True):
    """What tools change about prompt, tokens and answer."""

    tools: tuple[dict[str, Any], ...] = ()
    """For the chat template."""
    calls: CallOptions | None = None
    enforced: Enforced | None = None
    """The form of the answer; None: none for the sake of tools."""
    is_deprecated: bool = False
    is_strict: bool = False
    """Whether a function of the request is."""


NO_TOOLS = ToolSide()


async def tool_side_of(request: ChatRequest, model: ServedModel) -> ToolSide:
    """What the tools of a request change, checked as far as it can be here.

    Raises:
        InvalidRequest: see `tool_use_of`; or the model's format is not known, or a schema can't be followed.
    """
    use = tool_use_of(request)
    if use is None or model.template is None:  # without one there are no chats, which is told elsewhere
        return NO_TOOLS
    tools = tuple(function.tool for function in use.shown)
    model.check_size(tools)
    family = model.tool_family
    if family is None:
        raise InvalidRequest(
            "How this model calls tools is not known from its chat template; start the proxy with --tool-call-parser.",
            param="functions" if use.is_deprecated else "tools",
        )
    added_ids = model.tokenizer.added_ids
    marker_ids = {added_ids[marker] for marker in family.markers if marker in added_ids}
    form = await _form_beside_calls(request, use, model)
    follows = use.choice is not Choice.AUTO or form is not None or any(one.strict for one in use.callable)
    return ToolSide(
        tools=tools,
        calls=CallOptions(
            new_parser=partial(family.new_parser, use.max_calls),
            shown_ids=model.tokenizer.special_ids & marker_ids,
            ends_with_calls=use.choice is not Choice.NAMED,
        ),
        enforced=await _checked_grammar(enforced(use, family, added_ids, form), use, model) if follows else None,
        is_deprecated=use.is_deprecated,
        is_strict=any(one.strict for one in use.shown),
    )


async def _form_beside_calls(request: ChatRequest, use: ToolUse, model: ServedModel) -> str | None:
    """The JSON schema of answers without calls, where the request has one and the model may choose."""
    asked = grammar_of(request)
    if asked is None:
        return None
    field, grammar = asked
    await model.check_grammar(field, grammar)
    if field == "response_format" and use.choice is not Choice.AUTO:
        return None  # it is about content, and there will be none
    if grammar.kind is GrammarKind.JSON_OBJECT and use.choice is Choice.AUTO:
        return '{"type": "object"}'
    if grammar.kind is GrammarKind.JSON_SCHEMA and use.choice is Choice.AUTO:
        return grammar.text
    raise InvalidRequest(
        f"{field} does not go with tools: an answer can't follow it and call a tool; set tool_choice to none, or leave "
        "one of them out.",
        param=field,
    )


async def _checked_grammar(found: Enforced, use: ToolUse, model: ServedModel) -> Enforced:
    for function in use.callable:
        if use.choice is not Choice.AUTO or function.strict:
            schema = Grammar(GrammarKind.JSON_SCHEMA, _json(arguments_schema(function)))
            await model.check_grammar(f"{function.field}.parameters", schema)
    await model.check_grammar("functions" if use.is_deprecated else "tools", found.trial)
    return found


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
