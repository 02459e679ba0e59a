"""Requests of Anthropic's Messages API, as structs that decode and check types at once."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class BlockSource(Struct):
    """Where a picture is."""

    type: Annotated[str, Meta(description="base64 or url")]
    media_type: str | None = None
    data: Annotated[str | None, Meta(description="the file in base64")] = None
    url: Annotated[str | None, Meta(description="http(s): or, when the server allows it, file: URL")] = None


class ContentBlock(Struct):
    """Part of a message."""

    type: Annotated[
        str,
        Meta(description="text, image, tool_use, tool_result; thinking and redacted_thinking are passed over"),
    ]
    text: str | None = None
    source: Annotated[BlockSource | None, Meta(description="of an image")] = None
    id: Annotated[str | None, Meta(description="of a tool_use")] = None
    name: Annotated[str | None, Meta(description="of the tool that is used")] = None
    input: Annotated[dict[str, Any] | None, Meta(description="of the tool that is used")] = None
    tool_use_id: Annotated[str | None, Meta(description="what a tool_result belongs to")] = None
    content: Annotated[str | list[ContentBlock] | None, Meta(description="of a tool_result: text and images")] = None
    is_error: Annotated[bool | None, Meta(description="no effect: the text says so")] = None


class MessagesTurn(Struct):
    """One turn of the conversation."""

    role: Annotated[str, Meta(description="user, assistant or system")]
    content: str | list[ContentBlock]


class MessagesTool(Struct):
    """A tool that the model may use."""

    name: str | None = None
    type: Annotated[str | None, Meta(description="custom, or absent: no tools run here")] = None
    description: str | None = None
    input_schema: Annotated[dict[str, Any] | None, Meta(description="a JSON schema")] = None
    strict: Annotated[
        bool | None, Meta(description="the input follows the schema also where the model decides whether to call")
    ] = None


class MessagesToolChoice(Struct):
    """Which tools the model may or must use."""

    type: Annotated[str, Meta(description="auto (the default), any, tool or none; any and tool are enforced")]
    name: Annotated[str | None, Meta(description="of the tool that must be used")] = None
    disable_parallel_tool_use: Annotated[bool | None, Meta(description="true: one at most")] = None


class ThinkingConfig(Struct):
    """About thoughts, which are not told apart from the answer here."""

    type: Annotated[str, Meta(description="what enable_thinking of the chat template will be: false for disabled")]
    budget_tokens: Annotated[int | None, Meta(description="no effect")] = None


class OutputFormat(Struct):
    """What the text must look like."""

    type: Annotated[str, Meta(description="json_schema")]
    schema: Annotated[dict[str, Any] | None, Meta(description="a JSON schema")] = None


class OutputConfig(Struct):
    """About the answer."""

    format: OutputFormat | None = None
    effort: Annotated[str | None, Meta(description="no effect")] = None


class CountTokensRequest(Struct, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    messages: Annotated[
        list[MessagesTurn],
        Meta(description="the conversation; where the assistant has the last word, the answer goes on with it"),
    ]
    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None
    system: Annotated[str | list[ContentBlock] | None, Meta(description="what stands before all: text")] = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: Annotated[
        _Positive, Meta(description="tokens to generate at most; more than the context has room for may be asked for")
    ]
    stop_sequences: Annotated[list[str] | None, Meta(description="strings that end the answer")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 is greedy; default: the model's own, else 1")
    ] = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None, Meta(description="0 or -1: all")] = None
    stream: Annotated[bool | None, Meta(description="answer with named events")] = None
    metadata: Annotated[dict[str, Any] | None, Meta(description="no effect: nothing is kept")] = None
    service_tier: Annotated[str | None, Meta(description="no effect: there is one")] = None
    container: Annotated[Any, Meta(description="refused: no code runs here")] = None
    mcp_servers: Annotated[Any, Meta(description="refused: no tools run here")] = None
