"""Answers of Anthropic's Messages API and the events of its streams, as structs."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct

from proxy.api.openai.objects import Usage


class TextBlock(Struct, tag_field="type", tag="text"):
    """What the model says."""

    text: str
    citations: None = None


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    """A tool that the model uses."""

    id: Annotated[str, Meta(description="by which the tool_result names it")]
    name: str
    input: Annotated[Raw, Meta(extra_json_schema={"type": "object"})]


AnswerBlock = TextBlock | ToolUseBlock


class MessageUsage(Struct):
    """Token counts; pictures count with what they expand to."""

    input_tokens: Annotated[int, Meta(description="of the prompt, without those below")]
    output_tokens: int
    cache_read_input_tokens: Annotated[int, Meta(description="of the prompt, whose KV was there")] = 0
    cache_creation_input_tokens: int = 0

    @classmethod
    def of(cls, usage: Usage | None) -> MessageUsage:
        """What `usage` counts; nothing for None."""
        if usage is None:
            return cls(0, 0)
        cached = usage.prompt_tokens_details.cached_tokens
        return cls(usage.prompt_tokens - cached, usage.completion_tokens, cached)


class MessageObject(Struct, tag_field="type", tag="message", kw_only=True):
    """Answer of `POST /v1/messages`."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock] = []
    stop_reason: Annotated[
        str | None,
        Meta(description="end_turn, max_tokens, stop_sequence, tool_use or model_context_window_exceeded"),
    ] = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokensCount(Struct):
    """Answer of `POST /v1/messages/count_tokens`."""

    input_tokens: int


class MessagesErrorObject(Struct):
    """What went wrong."""

    type: str
    message: str
    param: Annotated[str | None, Meta(description="the field that is wrong")]
    code: str


class MessagesError(Struct, tag_field="type", tag="error"):
    """Answer where there is none, and the last event of a stream that breaks off."""

    error: MessagesErrorObject
    request_id: str | None


# -- events, whose names are their types -------------------------------------------------------------------------------


class MessageStart(Struct, tag_field="type", tag="message_start"):
    """The first event."""

    message: MessageObject


class BlockStart(Struct, tag_field="type", tag="content_block_start"):
    """A block begins."""

    index: int
    content_block: AnswerBlock


class TextPiece(Struct, tag_field="type", tag="text_delta"):
    """New text."""

    text: str


class InputPiece(Struct, tag_field="type", tag="input_json_delta"):
    """More of a tool's input, which is JSON."""

    partial_json: str


class BlockDelta(Struct, tag_field="type", tag="content_block_delta"):
    """More of a block."""

    index: int
    delta: TextPiece | InputPiece


class BlockStop(Struct, tag_field="type", tag="content_block_stop"):
    """A block is over."""

    index: int


class Ending(Struct):
    """Why the answer ended."""

    stop_reason: str
    stop_sequence: str | None


class MessageDelta(Struct, tag_field="type", tag="message_delta"):
    """How the answer ended, and all counts."""

    delta: Ending
    usage: MessageUsage


class MessageStop(Struct, tag_field="type", tag="message_stop"):
    """The last event."""
