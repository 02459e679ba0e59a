"""Answers of the OpenAI dialect, as structs. Their descriptions show up in `/docs`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType


class TopLogprob(msgspec.Struct):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]
    """Of the token: a character may take several tokens."""


class TokenLogprob(msgspec.Struct):
    """A token of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log probabilities of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    """Log probabilities of a text completion: one entry in each list for each token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct):
    """One token at a position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each position: token id → its figures; None for the first one."""


class PromptTokensDetails(msgspec.Struct):
    """Where the prompt's tokens came from."""

    cached_tokens: int = 0
    image_tokens: int = 0
    text_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """What the answer's tokens are. Thoughts are not told apart from the rest here."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """Token counts; pictures count with what they expand to."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = msgspec.field(default_factory=CompletionTokensDetails)


StopReason = str | int | None
"""The stop string or token of the request's that ended an answer."""


class FunctionCall(msgspec.Struct):
    """What a tool call calls."""

    name: str
    arguments: str
    """JSON text, as the model wrote it."""


class AnswerCall(msgspec.Struct):
    """A tool call of an answer."""

    id: str
    function: FunctionCall
    type: str = "function"


class AnswerMessage(msgspec.Struct):
    """The model's turn."""

    content: str | None
    """None where there are tool calls alone."""
    role: str = "assistant"
    refusal: str | None = None
    tool_calls: list[AnswerCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET
    """In its place, for requests with the deprecated `functions`."""


class ChatChoice(msgspec.Struct):
    """One sample."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    stop_reason: StopReason = None


class ChatCompletion(msgspec.Struct):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: str | None = None
    service_tier: str = "default"
    timings: dict[str, float] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class FunctionDelta(msgspec.Struct):
    """What a chunk adds to a call."""

    name: str | None
    """Once, and whole. Then null, not absent: there are clients that read it in each chunk."""
    arguments: str


class AnswerCallDelta(msgspec.Struct):
    """What a chunk adds to a tool call."""

    index: int
    """Which of the calls of the answer."""
    function: FunctionDelta
    id: str | UnsetType = UNSET
    """Once: accumulators would join it."""
    type: str | UnsetType = UNSET


class Delta(msgspec.Struct):
    """What a chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[AnswerCallDelta] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """What a chunk adds to one sample."""

    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    stop_reason: StopReason | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET
    timings: dict[str, float] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class TextChoice(msgspec.Struct):
    """One sample, or what a chunk adds to it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    stop_reason: StopReason | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class TextCompletion(msgspec.Struct):
    """Answer, or one event of the stream, of `POST /v1/completions`."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET
    timings: dict[str, float] | UnsetType = UNSET
