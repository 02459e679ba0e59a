"""Requests of OpenAI's Responses API, as structs that decode and check types at once."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from proxy.api.openai.schema import CACHE_SALT, MAX_LOGPROBS
from proxy.request_context import REQUEST_ID_PATTERN

_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]

LOGPROBS = "message.output_text.logprobs"
"""What `include` says for log probabilities."""


class InputPart(Struct):
    """Part of a message, or of what a function gave back."""

    type: Annotated[str | None, Meta(description="input_text, input_image, output_text or refusal")] = None
    text: str | None = None
    image_url: Annotated[str | None, Meta(description="data:, http(s): or, when the server allows it, file: URL")] = (
        None
    )
    detail: Annotated[str | None, Meta(description="low: use fewer tokens; anything else: the model's own size")] = None
    file_id: str | None = None
    refusal: str | None = None


class InputItem(Struct):
    """A message, a call of a function or what it gave back, or a thought, which is passed over."""

    type: Annotated[
        str | None,
        Meta(description="message (the default where there is a role), function_call, function_call_output, reasoning"),
    ] = None
    role: Annotated[str | None, Meta(description="of a message: user, system, developer (the same), assistant")] = None
    content: str | list[InputPart] | None = None
    call_id: Annotated[str | None, Meta(description="names a call, for its output too")] = None
    name: Annotated[str | None, Meta(description="of the function")] = None
    arguments: Annotated[str | None, Meta(description="of the call: JSON text")] = None
    output: Annotated[str | list[InputPart] | None, Meta(description="of the call")] = None
    id: str | None = None
    status: str | None = None


class ResponsesTool(Struct):
    """A function that the model may call."""

    type: Annotated[str, Meta(description="function")]
    name: str | None = None
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Meta(description="a JSON schema; absent: it takes none")] = None
    strict: Annotated[
        bool | None, Meta(description="arguments follow the schema also where the model decides whether to call")
    ] = None


class TextFormat(Struct):
    """What the text must look like."""

    type: Annotated[str, Meta(description="text, json_object or json_schema")]
    name: str | None = None
    schema: Annotated[dict[str, Any] | bool | None, Meta(description="a JSON schema")] = None
    description: str | None = None
    strict: Annotated[bool | None, Meta(description="the schema is enforced either way")] = None


class TextConfig(Struct):
    """About the text of the answer."""

    format: TextFormat | None = None
    verbosity: Annotated[str | None, Meta(description="no effect")] = None


class ReasoningConfig(Struct):
    """About thoughts, which are not told apart from the answer here."""

    effort: Annotated[
        str | None, Meta(description="none: tell the chat template to leave thoughts out; else no effect")
    ] = None
    summary: Annotated[str | None, Meta(description="no effect")] = None
    generate_summary: Annotated[str | None, Meta(description="no effect")] = None


class ResponsesStreamOptions(Struct):
    """About the stream."""

    include_obfuscation: Annotated[bool | None, Meta(description="no effect: nothing is added to hide lengths")] = None


class ResponsesRequest(Struct, kw_only=True):
    """`POST /v1/responses`."""

    input: Annotated[
        str | list[InputItem], Meta(description="a user's text, or the conversation", examples=["Who are you?"])
    ]
    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None
    instructions: Annotated[str | None, Meta(description="what stands before the input, as the system")] = None
    max_output_tokens: Annotated[_Positive | None, Meta(description="tokens to generate at most")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 is greedy; default: the model's own, else 1")
    ] = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    tools: Annotated[list[ResponsesTool] | None, Meta(description="functions; no tools run here")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        Meta(
            description='none, auto (the default), required, {"type": "function", "name": …} or '
            '{"type": "allowed_tools", "mode": …, "tools": […]}; the last three are enforced'
        ),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="false: one call at most")] = None
    max_tool_calls: Annotated[int | None, Meta(description="no effect: it counts calls of tools that run here")] = None
    text: TextConfig | None = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None,
        Meta(description=f"log probabilities of so many most likely tokens too; as include: {LOGPROBS}"),
    ] = None
    include: Annotated[
        list[str] | None, Meta(description=f"{LOGPROBS}; others have no effect, for there is nothing of it")
    ] = None
    reasoning: ReasoningConfig | None = None
    stream: Annotated[bool | None, Meta(description="answer with named events")] = None
    stream_options: ResponsesStreamOptions | None = None
    truncation: Annotated[
        str | None, Meta(description="disabled, or auto: leave out the oldest turns of a conversation that is too long")
    ] = None
    metadata: Annotated[dict[str, str] | None, Meta(description="given back in the answer")] = None
    user: Annotated[str | None, Meta(description="given back in the answer")] = None
    safety_identifier: Annotated[str | None, Meta(description="given back in the answer")] = None
    prompt_cache_key: Annotated[str | None, Meta(description="no effect: prefixes are always cached")] = None
    service_tier: Annotated[str | None, Meta(description="no effect: there is one")] = None
    store: Annotated[bool | None, Meta(description="no effect: responses are not kept, and say store: false")] = None
    previous_response_id: Annotated[str | None, Meta(description="refused: send the whole conversation")] = None
    conversation: Annotated[Any, Meta(description="refused: send the whole conversation")] = None
    background: Annotated[bool | None, Meta(description="true is refused")] = None
    prompt: Annotated[Any, Meta(description="refused: there are no stored prompts")] = None
    context_management: Annotated[Any, Meta(description="refused: nothing is compacted here")] = None
    moderation: Annotated[Any, Meta(description="refused: there is no such model")] = None
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None, Meta(description="0 or -1: all")] = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[_Int64 | None, Meta(description="the same seed and request give the same answer")] = None
    stop: Annotated[str | list[str] | None, Meta(description="strings that end the answer")] = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="switches of the chat template, such as enable_thinking")
    ] = None
    priority: Annotated[_Int64 | None, Meta(description="smaller goes first; default 0")] = None
    cache_salt: Annotated[
        Annotated[str, Meta(extra_json_schema={"pattern": f"^{CACHE_SALT}$"})] | None,
        Meta(description="share cached prefixes only with requests that have the same one"),
    ] = None
    request_id: Annotated[
        Annotated[str, Meta(extra_json_schema={"pattern": f"^{REQUEST_ID_PATTERN}$"})] | None,
        Meta(description="a name for /abort and for logs; as the header X-Request-Id, and wins"),
    ] = None
