"""Requests of the OpenAI dialect to prompts, pictures and sampling parameters. Whatever can't be served is a 400."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from epd.errors import InvalidRequest
from epd.types import SamplingParams
from proxy.answer import TextOptions
from proxy.api.openai_schema import (
    MAX_STOPS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    ImageURL,
    SamplingRequest,
)
from proxy.chat_template import Message
from proxy.media import ImageSource
from proxy.service import SamplingDefaults, Service

MAX_PROMPTS = 128
DEFAULT_COMPLETION_TOKENS = 16
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MEDIA_NOT_SUPPORTED = ("input_audio", "audio_url", "video_url", "file", "image_embeds")


def check_supported(request: SamplingRequest) -> None:
    """Refuse the first field that can't be served.

    Raises:
        InvalidRequest: there is one.
    """
    for field, is_used in request.unsupported().items():
        if is_used:
            raise InvalidRequest(f"{field} is not supported by this server with this value; leave it out.", param=field)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream: true.", param="stream_options")


def max_tokens_of(request: ChatRequest | CompletionRequest) -> int | None:
    """The limit that the request sets; None: what is left of the context."""
    if isinstance(request, ChatRequest):
        return request.max_completion_tokens or request.max_tokens
    return request.max_tokens or DEFAULT_COMPLETION_TOKENS


def sampling_of(request: ChatRequest | CompletionRequest, service: Service) -> SamplingParams:
    """Sampling parameters, with the model's defaults and a seed drawn where none is given.

    Raises:
        InvalidRequest: two fields contradict each other, or a token id does not exist.
    """
    defaults: SamplingDefaults = service.sampling_defaults
    max_tokens, min_tokens = max_tokens_of(request), request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens ({min_tokens}) is larger than max_tokens ({max_tokens}).", param="min_tokens")
    stop_ids = tuple(request.stop_token_ids or ())
    _check_token_ids(stop_ids, service, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_first(request.temperature, defaults.temperature),
        top_k=max(_first(request.top_k, defaults.top_k), 0),
        top_p=_first(request.top_p, defaults.top_p),
        min_p=_first(request.min_p, 0.0),
        seed=secrets.randbits(62) if request.seed is None else request.seed % (1 << 63),
        stop_token_ids=stop_ids,
        ignore_eos=bool(request.ignore_eos),
    )


def text_options_of(request: SamplingRequest) -> TextOptions:
    """How the answer's text is made.

    Raises:
        InvalidRequest: too many stop strings, or an empty one.
    """
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"{len(stops)} stop strings; at most {MAX_STOPS}.", param="stop")
    if "" in stops:
        raise InvalidRequest("A stop string is empty; remove it.", param="stop")
    return TextOptions(
        stop=stops,
        min_tokens=request.min_tokens or 0,
        skip_special_tokens=request.skip_special_tokens is not False,
        with_token_ids=bool(request.return_token_ids),
    )


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """Switches for the chat template.

    Raises:
        InvalidRequest: one is not a plain switch. Text could smuggle control tokens in.
    """
    variables = request.chat_template_kwargs or {}
    for name, value in variables.items():
        is_switch = value is None or isinstance(value, bool | int | float)
        if not is_switch:
            raise InvalidRequest(
                f"chat_template_kwargs.{name} is not supported; only booleans and numbers are passed on.",
                param="chat_template_kwargs",
            )
    return variables


# -- chat --------------------------------------------------------------------------------------------------------------


def count_parts(request: ChatRequest) -> int:
    """Messages and parts of messages. More of them than the context has tokens are refused before they cost time."""
    return sum(len(one.content) if isinstance(one.content, list) else 1 for one in request.messages)


def messages_of(request: ChatRequest) -> tuple[list[Message], list[ImageSource]]:
    """Messages as chat templates expect them, and their pictures in order.

    Raises:
        InvalidRequest: an unknown role, or content of a kind that can't be served.
    """
    sources: list[ImageSource] = []
    messages = [_message(message, f"messages[{i}]", sources) for i, message in enumerate(request.messages)]
    return messages, sources


def _message(message: ChatMessage, where: str, sources: list[ImageSource]) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{where}.role: {message.role[:100]!r} is not one of {', '.join(_ROLES)}.", param=f"{where}.role"
        )
    for field in ("tool_calls", "function_call"):
        if getattr(message, field):
            raise InvalidRequest(f"{where}.{field} is not supported by this server.", param=f"{where}.{field}")
    content: str | list[dict[str, str]] = ""
    if isinstance(message.content, str):
        content = message.content
    elif message.content is not None:
        content = [_part(part, f"{where}.content[{i}]", sources) for i, part in enumerate(message.content)]
    named = {"name": message.name} if message.name is not None else {}
    return {"role": role, "content": content, **named}


def _part(part: ContentPart, where: str, sources: list[ImageSource]) -> dict[str, str]:
    kind = part.type or next((name for name in ("image_url", "text", "refusal") if getattr(part, name) is not None), "")
    if kind == "image_url":
        sources.append(_image(part.image_url, where))
        return {"type": "image"}
    if kind in ("text", "refusal"):
        text = part.text if kind == "text" else part.refusal
        if text is None:
            raise InvalidRequest(f"{where} has no text.", param=where)
        return {"type": "text", "text": text}
    known = kind in _MEDIA_NOT_SUPPORTED
    problem = f"content of type {kind[:100]!r} is not supported" if kind or known else "the part has no type"
    raise InvalidRequest(f"{where}: {problem}; send text or image_url parts.", param=where)


def _image(image: ImageURL | str | None, where: str) -> ImageSource:
    if image is None:
        raise InvalidRequest(f"{where} has no image_url.", param=where)
    if isinstance(image, str):
        return ImageSource(image, where)
    return ImageSource(image.url, where, low_detail=image.detail == "low")


# -- completions -------------------------------------------------------------------------------------------------------


async def prompts_of(request: CompletionRequest, service: Service) -> list[tuple[int, ...]]:
    """Token ids of each prompt.

    Raises:
        InvalidRequest: no prompt, an empty one, too many, or ids that do not exist.
    """
    prompt = request.prompt
    if not isinstance(prompt, str) and len(prompt) > MAX_PROMPTS:  # ids of one prompt, or too many prompts
        if not isinstance(prompt[0], int):
            raise InvalidRequest(f"{len(prompt)} prompts; at most {MAX_PROMPTS}.", param="prompt")
        service.check_context(len(prompt), None)
    entries: Sequence[str | int | list[int]] = [prompt] if isinstance(prompt, str) else prompt
    if entries and all(isinstance(entry, int) for entry in entries):
        entries = [[entry for entry in entries if isinstance(entry, int)]]
    if any(isinstance(entry, int) for entry in entries):
        raise InvalidRequest("prompt mixes token ids with texts; send one kind.", param="prompt")
    if not entries or not all(entries):
        raise InvalidRequest("prompt is empty; send at least one character or token.", param="prompt")
    prompts = [await _prompt_ids(entry, service) for entry in entries if not isinstance(entry, int)]
    if not all(prompts):
        raise InvalidRequest("prompt has no tokens.", param="prompt")
    return prompts


async def _prompt_ids(entry: str | list[int], service: Service) -> tuple[int, ...]:
    if not isinstance(entry, str):
        service.check_context(len(entry), None)
    token_ids = tuple(await service.encode_text(entry) if isinstance(entry, str) else entry)
    _check_token_ids(token_ids, service, "prompt")
    if service.image_token_id is not None and service.image_token_id in token_ids:
        raise InvalidRequest(
            "prompt holds the placeholder of an image; send images to /v1/chat/completions.", param="prompt"
        )
    return token_ids


def _check_token_ids(token_ids: Sequence[int], service: Service, field: str) -> None:
    bad = next((token for token in token_ids if not 0 <= token < service.tokenizer.vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"{field}: the model has no token {bad}.", param=field)


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
