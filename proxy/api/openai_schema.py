"""Bodies of the OpenAI dialect, as structs that decode and check types at once.

Unknown fields are accepted, as all clients of this dialect expect. What is known and can't be served stands in
`unsupported` and is refused by name. Descriptions show up in `/docs`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from epd.errors import InvalidRequest

T = TypeVar("T")

MAX_STOPS = 16
MAX_SAMPLES = 16

_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class ImageURL(msgspec.Struct):
    """Where a picture is."""

    url: Annotated[str, Meta(description="data:, http(s): or, when the server allows it, file: URL")]
    detail: Annotated[str | None, Meta(description="low: use fewer tokens; anything else: the model's own size")] = None


class ContentPart(msgspec.Struct):
    """Part of a message: text or a picture."""

    type: Annotated[str | None, Meta(description="text or image_url; guessed from the other keys when absent")] = None
    text: str | None = None
    image_url: ImageURL | str | None = None
    refusal: str | None = None
    input_audio: Any = None
    audio_url: Any = None
    video_url: Any = None
    file: Any = None
    image_embeds: Any = None


class ChatMessage(msgspec.Struct):
    """One turn of the conversation."""

    role: Annotated[str, Meta(description="system, developer (the same), user or assistant")]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    refusal: str | None = None


class StreamOptions(msgspec.Struct):
    """What a stream holds besides the text."""

    include_usage: Annotated[bool | None, Meta(description="send a last chunk with token counts")] = None


class SamplingRequest(msgspec.Struct, kw_only=True):
    """What both completion endpoints share."""

    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None
    max_tokens: Annotated[_Positive | None, Meta(description="tokens to generate at most")] = None
    min_tokens: Annotated[Annotated[int, Meta(ge=0, le=2**31 - 1)] | None, Meta(description="no end before")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 is greedy; default: the model's own, else 1")
    ] = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None, Meta(description="0 or -1: all")] = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[_Int64 | None, Meta(description="the same seed and request give the same answer")] = None
    n: Annotated[Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None, Meta(description="answers to one prompt")] = None
    stop: Annotated[str | list[str] | None, Meta(description=f"up to {MAX_STOPS} strings that end the answer")] = None
    stop_token_ids: list[_TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings: Annotated[bool | None, Meta(description="tell in the answer where the time went, in ms")] = None
    return_token_ids: Annotated[bool | None, Meta(description="give the tokens beside the text")] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    bad_words: list[Any] | None = None
    allowed_token_ids: list[Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None

    def unsupported(self) -> dict[str, bool]:
        """Field → whether the request uses it in a way that can't be served."""
        return {
            "presence_penalty": bool(self.presence_penalty),
            "frequency_penalty": bool(self.frequency_penalty),
            "repetition_penalty": self.repetition_penalty not in (None, 1.0),
            "logit_bias": bool(self.logit_bias),
            "best_of": self.best_of not in (None, self.n or 1),
            "use_beam_search": bool(self.use_beam_search),
            "include_stop_str_in_output": bool(self.include_stop_str_in_output),
            "prompt_logprobs": self.prompt_logprobs is not None,
            "truncate_prompt_tokens": self.truncate_prompt_tokens is not None,
            "bad_words": bool(self.bad_words),
            "allowed_token_ids": bool(self.allowed_token_ids),
            "guided_json": self.guided_json is not None,
            "guided_regex": self.guided_regex is not None,
            "guided_choice": self.guided_choice is not None,
            "guided_grammar": self.guided_grammar is not None,
            "structured_outputs": self.structured_outputs is not None,
        }


class ChatRequest(SamplingRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[_Positive | None, Meta(description="the same as max_tokens, and wins")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="switches of the chat template, such as enable_thinking")
    ] = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    chat_template: str | None = None
    documents: list[Any] | None = None
    echo: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def unsupported(self) -> dict[str, bool]:
        """See `SamplingRequest.unsupported`."""
        return super().unsupported() | {
            "logprobs": bool(self.logprobs),
            "top_logprobs": bool(self.top_logprobs),
            "response_format": not _is_text_format(self.response_format),
            "tools": bool(self.tools),
            "tool_choice": self.tool_choice not in (None, "none", "auto"),
            "functions": bool(self.functions),
            "function_call": self.function_call not in (None, "none", "auto"),
            "modalities": any(kind != "text" for kind in self.modalities or ()),
            "audio": self.audio is not None,
            "chat_template": self.chat_template is not None,
            "documents": bool(self.documents),
            "echo": bool(self.echo),
            "continue_final_message": bool(self.continue_final_message),
            "add_generation_prompt": self.add_generation_prompt is False,
        }


class CompletionRequest(SamplingRequest, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str | list[str | _TokenId | list[_TokenId]],
        Meta(description="a text, several texts, token ids, or several lists of token ids"),
    ]
    echo: Annotated[bool | None, Meta(description="begin the answer with the prompt")] = None
    suffix: str | None = None
    logprobs: Any = None

    def unsupported(self) -> dict[str, bool]:
        """See `SamplingRequest.unsupported`."""
        return super().unsupported() | {
            "suffix": bool(self.suffix),
            "logprobs": self.logprobs is not None and self.logprobs is not False,  # 0 asks for some
        }


def _is_text_format(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and value.get("type") == "text")


# -- answers ---------------------------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct):
    """Where the prompt's tokens came from."""

    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """Token counts; pictures count with what they expand to."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(msgspec.Struct):
    """The model's turn."""

    content: str
    role: str = "assistant"
    refusal: str | None = None


class ChatChoice(msgspec.Struct):
    """One sample."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    timings: dict[str, float] | UnsetType = UNSET


class Delta(msgspec.Struct):
    """What a chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """What a chunk adds to one sample."""

    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    timings: dict[str, float] | UnsetType = UNSET


class TextChoice(msgspec.Struct):
    """One sample, or what a chunk adds to it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: None = None
    token_ids: list[int] | UnsetType = UNSET


class TextCompletion(msgspec.Struct):
    """Answer, or one event of the stream, of `POST /v1/completions`."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    timings: dict[str, float] | UnsetType = UNSET


# -- decoding --------------------------------------------------------------------------------------------------------

_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")
_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (ChatRequest, CompletionRequest)
}


def decode_body(body: bytes, kind: type[T]) -> T:
    """The request in `body`.

    Raises:
        InvalidRequest: not JSON (NaN and lone surrogates are none), or a field of the wrong type or range.
    """
    try:
        return _decoders[kind].decode(body)  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"The body is not valid JSON in UTF-8 ({error}); NaN, Infinity and lone surrogates are not JSON."
        ) from error


def _field_error(text: str) -> InvalidRequest:
    match = _AT.match(text)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    missing = _MISSING.search(what)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
    where = f"{path}: " if path else "The body: "
    return InvalidRequest(f"{where}{what[:1].lower()}{what[1:]}.", param=path or None)
