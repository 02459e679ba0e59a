"""Requests of the OpenAI dialect to prompts and pictures. Whatever can't be served is a 400."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from epd.errors import ContextLengthExceeded, InvalidRequest
from proxy.api.openai.history import CallHistory
from proxy.api.openai.length import cut_of
from proxy.api.openai.sampling import check_token_ids
from proxy.api.openai.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    ImageURL,
)
from proxy.media.loader import ImageSource
from proxy.models.served_model import ServedModel
from proxy.text.chat_template import Ending
from proxy.text.cutting import Cut
from proxy.text.user_text import Message

MAX_PROMPTS = 128
MAX_TEMPLATE_SWITCHES = 64
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_RESULTS = ("tool", "function")
_MEDIA_NOT_SUPPORTED = (
    "input_audio",
    "audio_url",
    "audio_embeds",
    "video_url",
    "file",
    "image_embeds",
    "image_pil",
)


def ending_of(request: ChatRequest) -> Ending:
    """What follows the last message in the prompt.

    Raises:
        InvalidRequest: two fields contradict each other.
    """
    if not request.continue_final_message:
        return Ending.NOTHING if request.add_generation_prompt is False else Ending.HEADER
    if request.add_generation_prompt:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message exclude each other; send one of them.",
            param="add_generation_prompt",
        )
    return Ending.OPEN


def echoed_text(request: ChatRequest) -> str:
    """What a chat's answer begins with: the assistant's own words, when they are to be given back."""
    last = request.messages[-1]
    if not request.echo or last.role != "assistant" or last.content is None:
        return ""
    return last.content if isinstance(last.content, str) else "".join(part.text or "" for part in last.content)


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """Switches for the chat template.

    Raises:
        InvalidRequest: there are too many, or one is not a plain switch. Text could smuggle control tokens in.
    """
    variables = request.chat_template_kwargs or {}
    if len(variables) > MAX_TEMPLATE_SWITCHES:
        raise InvalidRequest(
            f"chat_template_kwargs has {len(variables)} switches; at most {MAX_TEMPLATE_SWITCHES}.",
            param="chat_template_kwargs",
        )
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
    parts = 0
    for one in request.messages:
        parts += len(one.content) if isinstance(one.content, list) else 1
        parts += len(one.tool_calls or ())
    return parts


def messages_of(request: ChatRequest, *, has_short_ids: bool = False) -> tuple[list[Message], list[ImageSource]]:
    """Messages as chat templates expect them, and their pictures in order.

    Args:
        request: has the messages.
        has_short_ids: see `CallHistory`.

    Raises:
        InvalidRequest: there are none, an unknown role, content of a kind that can't be served, or a tool's message
            that answers none.
    """
    if not request.messages:
        raise InvalidRequest("messages is empty; send at least one.", param="messages")
    sources: list[ImageSource] = []
    history = CallHistory(has_short_ids=has_short_ids)
    messages = [_message(message, f"messages[{i}]", sources, history) for i, message in enumerate(request.messages)]
    return messages, sources


def _message(message: ChatMessage, where: str, sources: list[ImageSource], history: CallHistory) -> Message:
    if message.role in _RESULTS:
        return history.result(message, where)
    role = _ROLES.get(message.role)
    if role is None:
        known = ", ".join((*_ROLES, *_RESULTS))
        raise InvalidRequest(f"{where}.role: {message.role[:100]!r} is not one of {known}.", param=f"{where}.role")
    content: str | list[dict[str, str]] = ""
    if isinstance(message.content, str):
        content = message.content
    elif message.content is not None:
        content = [_part(part, f"{where}.content[{i}]", sources) for i, part in enumerate(message.content)]
    named = {"name": message.name} if message.name is not None else {}
    return {"role": role, "content": content, **named, **history.called(message, where)}


def _part(part: ContentPart, where: str, sources: list[ImageSource]) -> dict[str, str]:
    kinds = ("image_url", "text", "refusal", *_MEDIA_NOT_SUPPORTED)
    kind = part.type or next((name for name in kinds if getattr(part, name) is not None), "")
    if kind == "image_url":
        sources.append(_image(part.image_url, where))
        return {"type": "image"}
    if kind in ("text", "refusal"):
        text = part.text if kind == "text" else part.refusal
        if text is None:
            raise InvalidRequest(f"{where} has no text.", param=where)
        return {"type": "text", "text": text}
    problem = f"content of type {kind[:100]!r} is not supported" if kind else "the part has no type"
    raise InvalidRequest(f"{where}: {problem}; send text or image_url parts.", param=where)


def _image(image: ImageURL | str | None, where: str) -> ImageSource:
    if image is None:
        raise InvalidRequest(f"{where} has no image_url.", param=where)
    if isinstance(image, str):
        return ImageSource(image, where)
    return ImageSource(image.url, where, low_detail=image.detail == "low")


# -- completions -------------------------------------------------------------------------------------------------------


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Let the error of a text that is too long name the field that it came in."""
    try:
        yield
    except ContextLengthExceeded as error:
        error.param = field
        raise


async def prompts_of(request: CompletionRequest, model: ServedModel, completion: int | None) -> list[tuple[int, ...]]:
    """Token ids of each prompt. Arguments and errors are those of `token_prompts`."""
    prompt = [_document_start(model)] if request.prompt is None else request.prompt
    return await token_prompts(
        prompt,
        model,
        field="prompt",
        limit=MAX_PROMPTS,
        completion=completion,
        cut=cut_of(request, model, completion),
        add_special_tokens=request.add_special_tokens is not False,
    )


def _document_start(model: ServedModel) -> int:
    found = model.bos_token_id
    if found is None:
        raise InvalidRequest(
            "prompt: null begins a new document, for which this model has no token; send a text.", param="prompt"
        )
    return found


async def token_prompts(
    prompt: str | Sequence[str | int | list[int]],
    model: ServedModel,
    *,
    field: str,
    limit: int,
    completion: int | None,
    cut: Cut | None = None,
    add_special_tokens: bool = True,
) -> list[tuple[int, ...]]:
    """Token ids of each text, or lists of ids as they are.

    Args:
        prompt: a text, several, the ids of one, or of several.
        model: has the tokenizer and knows the context.
        field: what to call it in errors.
        limit: most texts.
        completion: tokens that must fit behind each, as for `Service.check_context`.
        cut: what to do with one that is too long; None: refuse it.
        add_special_tokens: put the tokenizer's own around texts.

    Raises:
        InvalidRequest: no prompt, an empty one, too many, or ids that do not exist.
        ContextLengthExceeded: one does not fit.
    """
    with naming(field):
        if cut is not None and not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
            prompt = cut.of_tokens(prompt)  # the ids of one prompt, perhaps very many
        elif not isinstance(prompt, str) and len(prompt) > limit:  # or too many prompts
            if not isinstance(prompt[0], int):
                raise InvalidRequest(f"{len(prompt)} texts; at most {limit}.", param=field)
            model.check_context(len(prompt), completion)
        entries = _entries([prompt] if isinstance(prompt, str) else prompt, field)
        among = sum(len(entry) for entry in entries if isinstance(entry, str))
        prompts: list[tuple[int, ...]] = []
        for entry in entries:
            if isinstance(entry, str):
                ids = await model.encode_text(entry, among=among, add_special_tokens=add_special_tokens, cut=cut)
            else:
                ids = entry if cut is None else cut.of_tokens(entry)
            prompts.append(_checked(tuple(ids), model, field, completion))
    if not all(prompts):
        raise InvalidRequest(f"{field} has no tokens.", param=field)
    return prompts


def _entries(prompt: Sequence[str | int | list[int]], field: str) -> Sequence[str | list[int]]:
    """Texts, or ids of each."""
    entries = [entry for entry in prompt if not isinstance(entry, int)]
    if prompt and not entries:
        entries = [[entry for entry in prompt if isinstance(entry, int)]]
    elif len(entries) < len(prompt):
        raise InvalidRequest(f"{field} mixes token ids with texts; send one kind.", param=field)
    if not entries or not all(entries):
        raise InvalidRequest(f"{field} is empty; send at least one character or token.", param=field)
    return entries


def _checked(token_ids: tuple[int, ...], model: ServedModel, field: str, completion: int | None) -> tuple[int, ...]:
    model.check_context(len(token_ids), completion)
    check_token_ids(token_ids, model.tokenizer, field)
    if model.image_token_id is not None and model.image_token_id in token_ids:
        raise InvalidRequest(
            f"{field} holds the placeholder of an image; send images to /v1/chat/completions.", param=field
        )
    return token_ids
