"""Requests of the Messages API to those of chats. Whatever can't be served is a 400 that names it."""

from __future__ import annotations

from typing import Any

from epd.errors import InvalidRequest
from proxy.api.field_names import FieldNames
from proxy.api.messages.schema import (
    BlockSource,
    ContentBlock,
    CountTokensRequest,
    MessagesRequest,
    MessagesTool,
    MessagesToolChoice,
    MessagesTurn,
)
from proxy.api.openai.schema import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    FunctionDefinition,
    JSONSchemaFormat,
    ResponseFormat,
    StreamOptions,
    Tool,
)
from proxy.api.turns import Said, Turns, shown
from proxy.media.inline import base64_url

_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "tool_choice.function.name": "tool_choice.name",
    "continue_final_message": "messages",
}
_TOOL_KEYS = {"parameters": "input_schema"}
_THOUGHTS = ("thinking", "redacted_thinking")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = ("disabled", "enabled", "adaptive", "between_tools")


def chat_of(request: CountTokensRequest) -> tuple[ChatRequest, FieldNames]:
    """The same request as a chat, and what its fields are called.

    Raises:
        InvalidRequest: something can't be served.
    """
    names = FieldNames(_NAMES, _TOOL_KEYS)
    messages = _messages(request, names)
    last = messages[-1]
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())]
    choice = request.tool_choice
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        tools=tools or None,
        tool_choice=_tool_choice(choice, has_tools=bool(tools)),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        response_format=_format(request),
        chat_template_kwargs=_switches(request),
        continue_final_message=True if last.role == "assistant" and not last.tool_calls else None,
    )
    if isinstance(request, MessagesRequest):
        _add_sampling(chat, request)
    return chat, names


def _add_sampling(chat: ChatRequest, request: MessagesRequest) -> None:
    for field in ("container", "mcp_servers"):
        if getattr(request, field):
            raise InvalidRequest(f"{field}: no tools run on this server; leave it out.", param=field)
    chat.max_completion_tokens = request.max_tokens
    chat.stop = request.stop_sequences
    chat.temperature, chat.top_p, chat.top_k = request.temperature, request.top_p, request.top_k
    chat.stream = request.stream
    if request.stream:  # the first event has the prompt's tokens
        chat.stream_options = StreamOptions(include_usage=True, continuous_usage_stats=True)


# -- the conversation --------------------------------------------------------------------------------------------------


def _messages(request: CountTokensRequest, names: FieldNames) -> list[ChatMessage]:
    if not request.messages:
        raise InvalidRequest("messages is empty; send at least one.", param="messages")
    turns = Turns(names)
    if request.system:
        turns.say("system", _text(request.system, "system", "\n"), "system")
    for i, turn in enumerate(request.messages):
        _add(turns, turn, f"messages[{i}]")
    return turns.finish()


def _add(turns: Turns, turn: MessagesTurn, where: str) -> None:
    content = [ContentBlock("text", turn.content)] if isinstance(turn.content, str) else turn.content
    match turn.role:
        case "user" if isinstance(turn.content, str):
            turns.say("user", turn.content, where)
        case "user":
            _add_user(turns, content, where)
        case "assistant":
            _add_assistant(turns, content, where)
        case "system":
            turns.say("system", _text(content, f"{where}.content", "\n"), where)
        case role:
            raise InvalidRequest(
                f"{where}.role: {role[:100]!r} is not one of user, assistant, system.", param=f"{where}.role"
            )


def _add_user(turns: Turns, blocks: list[ContentBlock], where: str) -> None:
    """What tools gave back, and what the user says beside it."""
    said: list[Said] = []
    for i, block in enumerate(blocks):
        place = f"{where}.content[{i}]"
        if block.type != "tool_result":
            said.append((_part(block, place), place))
            continue
        if said:
            turns.say("user", said, where)
            said = []
        turns.result(block.tool_use_id, _result(block, place), place, "tool_use_id")
    if said or not blocks:
        turns.say("user", said, where)


def _result(block: ContentBlock, where: str) -> list[Said]:
    given = block.content or []
    blocks = [ContentBlock("text", given)] if isinstance(given, str) else given
    return [(_part(one, f"{where}.content[{i}]"), f"{where}.content[{i}]") for i, one in enumerate(blocks)]


def _add_assistant(turns: Turns, blocks: list[ContentBlock], where: str) -> None:
    """Text, then calls: so do chat templates show them."""
    calls = [(f"{where}.content[{i}]", block) for i, block in enumerate(blocks) if block.type == "tool_use"]
    text = _text([block for block in blocks if block.type not in (*_THOUGHTS, "tool_use")], where, "")
    if text or not calls:
        turns.reply(text, where)
    for place, block in calls:
        if block.name is None:
            raise InvalidRequest(f"{place}.name is missing.", param=f"{place}.name")
        turns.call(block.id, block.name, block.input or {}, place, "id")


def _text(content: str | list[ContentBlock], where: str, joint: str) -> str:
    if isinstance(content, str):
        return content
    other = next((block.type for block in content if block.type != "text" or block.text is None), None)
    if other is not None:
        raise InvalidRequest(f"{where}: a block of type {other[:100]!r} is no text; send text here.", param=where)
    return joint.join(block.text or "" for block in content)


def _part(block: ContentBlock, where: str) -> ContentPart:
    match block.type:
        case "text" if block.text is not None:
            return ContentPart("text", block.text)
        case "image" if block.source is not None:
            return shown(_url(block.source, f"{where}.source"))
        case "text" | "image":
            missing = "text" if block.type == "text" else "source"
            raise InvalidRequest(f"{where}.{missing} is missing.", param=f"{where}.{missing}")
    raise InvalidRequest(
        f"{where}: a block of type {block.type[:100]!r} is not supported here; send text, image or tool_result.",
        param=where,
    )


def _url(source: BlockSource, where: str) -> str:
    if source.type == "base64" and source.data is not None:
        return base64_url(source.data, source.media_type or "")
    if source.type == "url" and source.url is not None:
        return source.url
    raise InvalidRequest(f"{where}: want base64 with data, or url with url; there are no files here.", param=where)


# -- tools and form ----------------------------------------------------------------------------------------------------


def _tool(tool: MessagesTool, where: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise InvalidRequest(
            f"{where}.type: {tool.type[:100]!r} is not custom; no tools run on this server.", param=f"{where}.type"
        )
    for field in ("name", "input_schema"):
        if getattr(tool, field) is None:
            raise InvalidRequest(f"{where}.{field} is missing.", param=f"{where}.{field}")
    return Tool(FunctionDefinition(tool.name or "", tool.description, tool.input_schema, tool.strict))


def _tool_choice(choice: MessagesToolChoice | None, *, has_tools: bool) -> Any:
    if choice is None or (choice.type == "auto" and not has_tools):
        return None
    if choice.type == "tool" and choice.name is not None:
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type not in _CHOICES:
        raise InvalidRequest(
            "tool_choice: want the type auto, any or none, or tool with a name.", param="tool_choice.type"
        )
    return _CHOICES[choice.type]


def _format(request: CountTokensRequest) -> ResponseFormat | None:
    asked = request.output_config.format if request.output_config is not None else None
    return None if asked is None else ResponseFormat(asked.type, JSONSchemaFormat(asked.schema))


def _switches(request: CountTokensRequest) -> dict[str, Any] | None:
    if request.thinking is None:
        return None
    if request.thinking.type not in _THINKING:
        raise InvalidRequest(
            f"thinking.type: {request.thinking.type[:100]!r} is not one of {', '.join(_THINKING)}.",
            param="thinking.type",
        )
    return {"enable_thinking": request.thinking.type != "disabled"}
