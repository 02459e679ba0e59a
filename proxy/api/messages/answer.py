"""Answers in the words of Anthropic's Messages API: whole, and as named events.

    message_start
    for each block in turn:  content_block_start, content_block_delta…, content_block_stop
    message_delta, message_stop | error

Blocks follow each other: text behind a call is a block of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct, UnsetType

from epd.errors import ClientError, ContextLengthExceeded, EPDError
from epd.types import FinishReason
from proxy.api.dialect import Head, News, ServerSent, TextEvents, Timings, named_event
from proxy.api.field_names import FieldNames
from proxy.api.messages.object import (
    AnswerBlock,
    BlockDelta,
    BlockStart,
    BlockStop,
    Ending,
    InputPiece,
    MessageDelta,
    MessageObject,
    MessagesError,
    MessagesErrorObject,
    MessageStart,
    MessageStop,
    MessageUsage,
    TextBlock,
    TextPiece,
    ToolUseBlock,
)
from proxy.api.openai.answer import Wanted
from proxy.api.openai.objects import Usage
from proxy.request_context import REQUEST_ID
from proxy.text.answer import Answer
from proxy.tools.calls import CallDelta

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_of(error: EPDError) -> MessagesError:
    """An error as clients of this API read it."""
    kind = _TYPES.get(error.status, "invalid_request_error" if isinstance(error, ClientError) else "api_error")
    # By these words clients of this API tell it from other errors, and shorten the conversation.
    prefix = "prompt is too long: " if isinstance(error, ContextLengthExceeded) else ""
    return MessagesError(
        MessagesErrorObject(kind, prefix + error.message, error.param, error.code), REQUEST_ID.get() or None
    )


def error_words(error: EPDError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error on these paths."""
    return error.status, msgspec.to_builtins(error_of(error))


class MessagesDialect(ServerSent):
    """`/v1/messages`.

    Args:
        head: of the answer.
        wanted: counts tokens under way.
        max_tokens: that the request asks for.
        names: what its fields are called, for errors.
    """

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, head: Head, wanted: Wanted, max_tokens: int, names: FieldNames) -> None:
        self._head = head
        self._wanted = wanted
        self._max_tokens = max_tokens
        self._names = names
        self._index = -1
        """Of the last block that was told."""
        self._open: type[AnswerBlock] | None = None
        """What is going on."""
        self._texts: TextEvents
        """Of the block, if it is text."""
        self._ending = Ending("end_turn", None)

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> MessageObject:
        """The answer in one piece."""
        (answer,) = answers
        ending = self._ending_of(answer)
        content: list[AnswerBlock] = [TextBlock(answer.text)] if answer.text else []
        content += [ToolUseBlock(call.id, call.name, _object(call.arguments)) for call in answer.tool_calls]
        message = self._message(usage)
        message.content = content
        message.stop_reason, message.stop_sequence = ending.stop_reason, ending.stop_sequence
        return message

    def _message(self, usage: Usage | None) -> MessageObject:
        return MessageObject(id=self._head.id, model=self._head.model, usage=MessageUsage.of(usage))

    def _ending_of(self, answer: Answer) -> Ending:
        if answer.finish_reason is FinishReason.LENGTH:
            is_asked = answer.completion_tokens >= self._max_tokens
            return Ending("max_tokens" if is_asked else "model_context_window_exceeded", None)
        if isinstance(answer.stop_reason, str):
            return Ending("stop_sequence", answer.stop_reason)
        return Ending("tool_use" if answer.tool_calls else "end_turn", None)

    # -- stream ------------------------------------------------------------------------------------------------------

    def opening(self, index: int) -> bytes:
        """The message without its content."""
        counts = self._wanted.usage_so_far
        return _event(MessageStart(self._message(None if counts is None else counts())))

    def chunk(self, index: int, news: News) -> bytes:
        """New text, and news of calls."""
        return b"".join(self._text(one) if isinstance(one, str) else self._call(one) for one in news.in_order())

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """The last block is over."""
        self._ending = self._ending_of(answer)
        return self._close()

    def end(self, usage: Usage) -> bytes:
        """Why it ended, and all counts."""
        return _event(MessageDelta(self._ending, MessageUsage.of(usage))) + _event(MessageStop())

    def failed(self, error: EPDError) -> bytes:
        """What went wrong."""
        return _event(error_of(self._names.rename(error)))

    def _text(self, text: str) -> bytes:
        told = b"" if self._open is TextBlock else self._begin_text()
        return told + self._texts.event(text)

    def _begin_text(self) -> bytes:
        told = self._begin(TextBlock(""))
        self._texts = TextEvents(lambda text: _event(BlockDelta(self._index, TextPiece(text))))
        return told

    def _call(self, delta: CallDelta) -> bytes:
        told = b"" if delta.id is None else self._begin(ToolUseBlock(delta.id, delta.name or "", Raw(b"{}")))
        if delta.arguments:
            told += _event(BlockDelta(self._index, InputPiece(delta.arguments)))
        return told

    def _begin(self, block: AnswerBlock) -> bytes:
        told = self._close()
        self._index += 1
        self._open = type(block)
        return told + _event(BlockStart(self._index, block))

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event(BlockStop(self._index))


def _event(event: Struct) -> bytes:
    return named_event(str(event.__struct_config__.tag), event)


def _object(arguments: str) -> Raw:
    """A call's arguments as the object that they should be. What is none is shown in one, so that the tool, not this
    proxy, finds out that the model wrote nonsense."""
    try:
        found = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        found = None
    return Raw(arguments if isinstance(found, dict) else msgspec.json.encode({"arguments": arguments}))
