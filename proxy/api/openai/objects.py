"""Answers of the OpenAI dialect, as structs. Their descriptions show up in `/docs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType


class TopLogprob(msgspec.Struct):
    """One of the most likely tokens at a position."""

    token: Annotated[str, Meta(description="as text, U+FFFD for what is no whole character")]
    logprob: Annotated[float, Meta(description="-9999 stands for minus infinity")]
    bytes: Annotated[list[int], Meta(description="of the token; a character may take several")]


class TokenLogprob(msgspec.Struct):
    """A token of a chat answer."""

    token: Annotated[str, Meta(description="as text, U+FFFD for what is no whole character")]
    logprob: Annotated[
        float, Meta(description="before temperature, penalties and masks; -9999 stands for minus infinity")
    ]
    bytes: Annotated[list[int], Meta(description="of the token; joined they are the text")]
    top_logprobs: Annotated[list[TopLogprob], Meta(description="the likeliest tokens here, as many as were asked for")]


class ChatLogprobs(msgspec.Struct):
    """Log probabilities of a chat answer."""

    content: Annotated[list[TokenLogprob], Meta(description="one for each token of the text")]
    refusal: Annotated[None, Meta(description="always null")] = None


class TextLogprobs(msgspec.Struct):
    """Log probabilities of a text completion: one entry in each list for each token."""

    text_offset: Annotated[list[int], Meta(description="where each token begins in the text")]
    token_logprobs: Annotated[
        list[float | None], Meta(description="of each token; null for the first of an echoed prompt")
    ]
    tokens: Annotated[list[str], Meta(description="as text, bytes:… for what is no whole character")]
    top_logprobs: Annotated[
        list[dict[str, float] | None],
        Meta(description="token → log probability of the likeliest, the token itself among them"),
    ]


class PromptLogprob(msgspec.Struct):
    """One token at a position of the prompt."""

    logprob: Annotated[float, Meta(description="-9999 stands for minus infinity")]
    rank: Annotated[int, Meta(description="1 for the likeliest")]
    decoded_token: Annotated[str, Meta(description="as text")]


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each position: token id → its figures; None for the first one."""


class PromptTokensDetails(msgspec.Struct):
    """Where the prompt's tokens came from."""

    cached_tokens: Annotated[int, Meta(description="that were in the prefix cache")] = 0
    image_tokens: Annotated[int, Meta(description="that pictures took")] = 0
    text_tokens: Annotated[int, Meta(description="all others")] = 0


class CompletionTokensDetails(msgspec.Struct):
    """What the answer's tokens are. Thoughts are not told apart from the rest here."""

    reasoning_tokens: Annotated[int, Meta(description="always 0")] = 0


class Usage(msgspec.Struct):
    """Token counts; pictures count with what they expand to."""

    prompt_tokens: Annotated[int, Meta(description="of all prompts, each once")]
    completion_tokens: Annotated[int, Meta(description="of all samples")]
    total_tokens: Annotated[int, Meta(description="both")]
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = msgspec.field(default_factory=CompletionTokensDetails)


StopReason = str | int | None
"""The stop string or token of the request's that ended an answer."""


class FunctionCall(msgspec.Struct):
    """What a tool call calls."""

    name: Annotated[str, Meta(description="of the function")]
    arguments: Annotated[str, Meta(description="JSON text, as the model wrote it")]


class AnswerCall(msgspec.Struct):
    """A tool call of an answer."""

    id: Annotated[str, Meta(description="for the tool_call_id of the result")]
    function: FunctionCall
    type: Annotated[str, Meta(description="function")] = "function"


class AnswerMessage(msgspec.Struct):
    """The model's turn."""

    content: Annotated[str | None, Meta(description="null where there are tool calls alone")]
    role: Annotated[str, Meta(description="assistant")] = "assistant"
    refusal: Annotated[str | None, Meta(description="always null")] = None
    tool_calls: Annotated[list[AnswerCall] | UnsetType, Meta(description="absent where there is none")] = UNSET
    function_call: Annotated[
        FunctionCall | UnsetType, Meta(description="in its place, for requests with the deprecated functions")
    ] = UNSET


class ChatChoice(msgspec.Struct):
    """One sample."""

    index: Annotated[int, Meta(description="of the sample")]
    message: AnswerMessage
    finish_reason: Annotated[str, Meta(description="stop, length, tool_calls or function_call")]
    logprobs: ChatLogprobs | None = None
    token_ids: Annotated[list[int] | UnsetType, Meta(description="with return_token_ids")] = UNSET
    stop_reason: Annotated[StopReason, Meta(description="the stop string or stop_token_ids token that ended it")] = None


class ChatCompletion(msgspec.Struct):
    """Answer of `POST /v1/chat/completions`."""

    id: Annotated[str, Meta(description="of the answer; /abort takes it")]
    created: Annotated[int, Meta(description="Unix time in seconds")]
    model: Annotated[str, Meta(description="that answered")]
    choices: Annotated[list[ChatChoice], Meta(description="the samples")]
    usage: Usage
    object: Annotated[str, Meta(description="chat.completion")] = "chat.completion"
    system_fingerprint: Annotated[
        str | None, Meta(description="of the checkpoint: while it stays, equal seeds give equal answers")
    ] = None
    service_tier: Annotated[str, Meta(description="always default")] = "default"
    timings: Annotated[dict[str, float] | UnsetType, Meta(description="with timings: stage → milliseconds")] = UNSET
    prompt_logprobs: Annotated[
        PromptLogprobs | UnsetType,
        Meta(description="with prompt_logprobs: for each token, id → figures; null for the first"),
    ] = UNSET
    prompt_token_ids: Annotated[
        Sequence[int] | UnsetType, Meta(description="with return_token_ids; a picture is one placeholder")
    ] = UNSET


class FunctionDelta(msgspec.Struct):
    """What a chunk adds to a call."""

    name: str | UnsetType | None
    """Once, and whole. Then null: there are clients that read it in each chunk. Then absent where a function of the
    request is `strict`: openai-node takes whatever is there for another name in that case."""
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

    index: Annotated[int, Meta(description="prompt × n + sample")]
    text: Annotated[str, Meta(description="of the sample; what a chunk adds")]
    finish_reason: Annotated[str | None, Meta(description="stop or length; null in a chunk that is not the last")] = (
        None
    )
    logprobs: TextLogprobs | None = None
    token_ids: Annotated[list[int] | UnsetType, Meta(description="with return_token_ids")] = UNSET
    prompt_logprobs: Annotated[
        PromptLogprobs | UnsetType,
        Meta(description="with prompt_logprobs: for each token, id → figures; null for the first"),
    ] = UNSET
    stop_reason: Annotated[
        StopReason | UnsetType, Meta(description="the stop string or stop_token_ids token that ended it")
    ] = UNSET
    prompt_token_ids: Annotated[Sequence[int] | UnsetType, Meta(description="with return_token_ids")] = UNSET


class TextCompletion(msgspec.Struct):
    """Answer, or one event of the stream, of `POST /v1/completions`."""

    id: Annotated[str, Meta(description="of the answer; /abort takes it")]
    created: Annotated[int, Meta(description="Unix time in seconds")]
    model: Annotated[str, Meta(description="that answered")]
    choices: Annotated[list[TextChoice], Meta(description="the samples")]
    object: Annotated[str, Meta(description="text_completion")] = "text_completion"
    system_fingerprint: Annotated[
        str | None, Meta(description="of the checkpoint: while it stays, equal seeds give equal answers")
    ] = None
    usage: Usage | UnsetType | None = UNSET
    timings: Annotated[dict[str, float] | UnsetType, Meta(description="with timings: stage → milliseconds")] = UNSET
