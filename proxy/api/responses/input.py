"""Requests of the Responses API to those of chats. Whatever can't be served is a 400 that names it."""

from __future__ import annotations

from typing import Any

from epd.errors import InvalidRequest
from proxy.api.field_names import FieldNames
from proxy.api.openai.schema import (
    ChatRequest,
    ContentPart,
    FunctionDefinition,
    JSONSchemaFormat,
    ResponseFormat,
    Tool,
)
from proxy.api.responses.schema import LOGPROBS, InputItem, InputPart, ResponsesRequest, ResponsesTool
from proxy.api.turns import Said, Turns, shown

_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
    "tool_choice.function.name": "tool_choice.name",
    "tool_choice.allowed_tools.tools": "tool_choice.tools",
}
_ROLES = ("user", "system", "developer", "assistant")
_TEXTS = ("input_text", "output_text", "text", None)
_REFUSED = {
    "previous_response_id": "responses are not kept; send the whole conversation in input",
    "conversation": "conversations are not kept; send the whole one in input",
    "prompt": "there are no stored prompts; send instructions and input",
    "background": "answers are not kept; leave it out, or stream",
    "context_management": "nothing is compacted here; leave it out",
    "moderation": "there is no model for it; leave it out",
}
_ALIKE = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "priority", "cache_salt"),
)
"""Fields that a chat has too."""


def chat_of(request: ResponsesRequest) -> tuple[ChatRequest, FieldNames]:
    """The same request as a chat, and what its fields are called.

    Raises:
        InvalidRequest: something can't be served.
    """
    _check(request)
    names = FieldNames(_NAMES)
    messages = _messages(request, names)
    wants_logprobs = request.top_logprobs is not None or LOGPROBS in (request.include or ())
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())]
    chat = ChatRequest(
        **{name: getattr(request, name) for name in _ALIKE},
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        logprobs=wants_logprobs or None,
        top_logprobs=request.top_logprobs,
        tools=tools or None,
        tool_choice=_tool_choice(request.tool_choice, has_tools=bool(tools)),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_format(request),
        chat_template_kwargs=_switches(request),
    )
    return chat, names


def _check(request: ResponsesRequest) -> None:
    for field, reason in _REFUSED.items():
        if getattr(request, field):
            raise InvalidRequest(f"{field} is not supported: {reason}.", param=field)
    if request.truncation not in (None, "auto", "disabled"):
        raise InvalidRequest(
            f"truncation: {request.truncation[:100]!r} is neither auto nor disabled.", param="truncation"
        )
    if not request.input:
        raise InvalidRequest("input is empty; send a text or items.", param="input")


# -- the conversation --------------------------------------------------------------------------------------------------


def _messages(request: ResponsesRequest, names: FieldNames) -> list[Any]:
    turns = Turns(names)
    if request.instructions:
        turns.say("system", request.instructions, "instructions")
    if isinstance(request.input, str):
        turns.say("user", request.input, "input")
        return turns.finish()
    for i, item in enumerate(request.input):
        _add(turns, item, f"input[{i}]")
    messages = turns.finish()
    if not messages:
        raise InvalidRequest("input has no message, no call and no output.", param="input")
    return messages


def _add(turns: Turns, item: InputItem, where: str) -> None:
    match item.type or ("message" if item.role is not None else None):
        case "message":
            _add_message(turns, item, where)
        case "function_call":
            if item.name is None:
                raise InvalidRequest(f"{where}.name is missing.", param=f"{where}.name")
            turns.call(item.call_id or item.id, item.name, item.arguments or "", where, "call_id")
        case "function_call_output":
            if item.output is None:
                raise InvalidRequest(f"{where}.output is missing.", param=f"{where}.output")
            output = [InputPart("input_text", item.output)] if isinstance(item.output, str) else item.output
            turns.result(item.call_id, _parts(output, f"{where}.output"), where, "call_id")
        case "reasoning":
            pass  # of another model, or hidden
        case "item_reference":
            raise InvalidRequest(
                f"{where}: items are not kept here; send the item itself instead of a reference.", param=where
            )
        case kind:
            problem = "has no type" if kind is None else f"is of type {kind[:100]!r}"
            raise InvalidRequest(
                f"{where} {problem}; send message, function_call, function_call_output or reasoning.",
                param=f"{where}.type",
            )


def _add_message(turns: Turns, item: InputItem, where: str) -> None:
    if item.role not in _ROLES:
        given = "is missing" if item.role is None else f"{item.role[:100]!r} is not one of {', '.join(_ROLES)}"
        raise InvalidRequest(f"{where}.role: {given}.", param=f"{where}.role")
    if item.content is None:
        raise InvalidRequest(f"{where}.content is missing.", param=f"{where}.content")
    content = item.content if isinstance(item.content, str) else _parts(item.content, f"{where}.content")
    if item.role != "assistant":
        turns.say(item.role, content, where)
        return
    if not isinstance(content, str):
        picture = next((place for part, place in content if part.image_url is not None), None)
        if picture is not None:
            raise InvalidRequest(f"{picture}: the assistant shows no images.", param=picture)
        content = "".join(part.text or "" for part, _ in content)
    turns.reply(content, where)


def _parts(parts: list[InputPart], where: str) -> list[Said]:
    return [(_part(part, f"{where}[{i}]"), f"{where}[{i}]") for i, part in enumerate(parts)]


def _part(part: InputPart, where: str) -> ContentPart:
    if part.type == "input_image":
        if not part.image_url:
            raise InvalidRequest(f"{where}.image_url is missing; there are no files here.", param=f"{where}.image_url")
        return shown(part.image_url, part.detail)
    text = part.refusal if part.type == "refusal" else part.text
    if part.type != "refusal" and part.type not in _TEXTS:
        raise InvalidRequest(
            f"{where}: content of type {str(part.type)[:100]!r} is not supported; send input_text or input_image.",
            param=where,
        )
    if text is None:
        raise InvalidRequest(f"{where} has no text.", param=where)
    return ContentPart("text", text)


# -- tools and form ----------------------------------------------------------------------------------------------------


def _tool(tool: ResponsesTool, where: str) -> Tool:
    if tool.type != "function":
        raise InvalidRequest(
            f"{where}.type: {tool.type[:100]!r} is not function; no tools run on this server.", param=f"{where}.type"
        )
    if tool.name is None:
        raise InvalidRequest(f"{where}.name is missing.", param=f"{where}.name")
    return Tool(FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict))


def _tool_choice(choice: Any, *, has_tools: bool) -> Any:
    match choice:
        case None | "none" | "required":
            return choice
        case "auto":
            return choice if has_tools else None
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(tools)}:
            found = [{"function": {"name": tool.get("name")}} if isinstance(tool, dict) else None for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": found}}
    raise InvalidRequest(
        'tool_choice: want none, auto, required, {"type": "function", "name": …} or '
        '{"type": "allowed_tools", "mode": "auto" or "required", "tools": […]}.',
        param="tool_choice",
    )


def _format(request: ResponsesRequest) -> ResponseFormat | None:
    asked = request.text.format if request.text is not None else None
    if asked is None:
        return None
    if asked.type != "json_schema":
        return ResponseFormat(asked.type)
    schema = JSONSchemaFormat(asked.schema, asked.name, asked.description, asked.strict)
    return ResponseFormat("json_schema", schema)


def _switches(request: ResponsesRequest) -> dict[str, Any] | None:
    if request.reasoning is None or request.reasoning.effort != "none":
        return request.chat_template_kwargs
    return {"enable_thinking": False} | (request.chat_template_kwargs or {})
