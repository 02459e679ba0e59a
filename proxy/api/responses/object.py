"""Answers of OpenAI's Responses API and the events of its streams, as structs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from proxy.api.openai.objects import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Struct, kw_only=True):
    """Text of a message."""

    text: str
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(Struct, tag_field="type", tag="message", kw_only=True):
    """What the model says."""

    id: str
    status: ItemStatus
    content: list[OutputText] = []
    role: Literal["assistant"] = "assistant"


class OutputCall(Struct, tag_field="type", tag="function_call", kw_only=True):
    """A function that the model calls."""

    id: str
    call_id: Annotated[str, Meta(description="by which the function's output names the call")]
    name: str
    arguments: Annotated[str, Meta(description="JSON text, as the model wrote it")] = ""
    status: ItemStatus


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(Struct):
    """Where the input's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    """What the output's tokens are. Thoughts are not told apart from the rest here."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct):
    """Token counts; pictures count with what they expand to."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int
    output_tokens_details: OutputTokensDetails = field(default_factory=OutputTokensDetails)


class ResponseError(Struct):
    """Why there is no answer."""

    code: str
    message: str


class IncompleteDetails(Struct):
    """Why the answer ends early."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(Struct, kw_only=True):
    """Answer of `POST /v1/responses`, and what its events show of it. Most fields repeat the request's."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float
    top_p: float
    top_logprobs: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    text: dict[str, Any]
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any]
    truncation: str = "disabled"
    metadata: dict[str, str] = {}
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    previous_response_id: str | None = None
    background: bool = False
    service_tier: str = "default"
    store: Annotated[bool, Meta(description="false: it can't be asked for again")] = False


# -- events ------------------------------------------------------------------------------------------------------------


class Event(Struct, tag_field="type", kw_only=True):
    """What all events have. Their names are their types, too."""

    sequence_number: int


class Created(Event, tag="response.created", kw_only=True):
    """The first event."""

    response: ResponseObject


class InProgress(Event, tag="response.in_progress", kw_only=True):
    """The second."""

    response: ResponseObject


class Completed(Event, tag="response.completed", kw_only=True):
    """The last event of an answer that is whole."""

    response: ResponseObject


class Incomplete(Event, tag="response.incomplete", kw_only=True):
    """The last event of an answer that reached its limit."""

    response: ResponseObject


class Failed(Event, tag="response.failed", kw_only=True):
    """The last event of an answer that broke off."""

    response: ResponseObject


class ItemAdded(Event, tag="response.output_item.added", kw_only=True):
    """An item begins."""

    output_index: int
    item: OutputItem


class ItemDone(Event, tag="response.output_item.done", kw_only=True):
    """An item is over."""

    output_index: int
    item: OutputItem


class PartAdded(Event, tag="response.content_part.added", kw_only=True):
    """The text of a message begins."""

    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText


class PartDone(Event, tag="response.content_part.done", kw_only=True):
    """The text of a message is over."""

    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText


class TextDelta(Event, tag="response.output_text.delta", kw_only=True):
    """New text."""

    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[TokenLogprob] = []


class TextDone(Event, tag="response.output_text.done", kw_only=True):
    """All of the text."""

    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[TokenLogprob] = []


class ArgumentsDelta(Event, tag="response.function_call_arguments.delta", kw_only=True):
    """More of a call's arguments."""

    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, tag="response.function_call_arguments.done", kw_only=True):
    """All of them."""

    item_id: str
    output_index: int
    name: str
    arguments: str


class ErrorEvent(Event, tag="error", kw_only=True):
    """The answer broke off. Flat, and for readers that look for it, nested."""

    code: str | None
    message: str
    param: str | None
    error: dict[str, Any]
