"""`/tokenize` and `/detokenize` as vLLM's clients know them: the tokens that the model would see, without asking it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from msgspec import Meta, Struct
from starlette.responses import Response

from epd.errors import InvalidRequest, RequestTooLarge
from proxy.api.answering import prompt_alone
from proxy.api.http import Client
from proxy.api.openai.sampling import check_token_ids
from proxy.api.openai.schema import ChatMessage, ChatRequest, Tool
from proxy.api.requests import Deadline, documented, exchange
from proxy.models.served_model import ServedModel

router = APIRouter(tags=["vLLM"])

T = TypeVar("T")

MAX_CHARACTERS = 1 << 20
"""Of one text, and tokens of one list: about a second of work. More than the context may be asked about."""

_TokenId = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class TokenizeRequest(Struct, kw_only=True):
    """`POST /tokenize`: a text, or a conversation."""

    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None
    prompt: Annotated[str | None, Meta(description="a text", examples=["Who are you?"])] = None
    messages: Annotated[
        list[ChatMessage] | None,
        Meta(description="a conversation; a picture in it counts one token here"),
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="put around the text what the tokenizer puts there; default: true, of messages false"),
    ] = None
    return_token_strs: Annotated[bool | None, Meta(description="give the tokens' names in the vocabulary too")] = None
    add_generation_prompt: Annotated[bool | None, Meta(description="as of /v1/chat/completions")] = None
    continue_final_message: Annotated[bool | None, Meta(description="as of /v1/chat/completions")] = None
    chat_template: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Meta(description="as of /v1/chat/completions")] = None
    tools: Annotated[list[Tool] | None, Meta(description="as of /v1/chat/completions")] = None


class Tokens(Struct):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: Annotated[int, Meta(description="context in tokens; 0 while no worker has told")]
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """`POST /detokenize`."""

    tokens: Annotated[list[_TokenId], Meta(description="ids", examples=[[283, 962]])]
    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None


class Detokenized(Struct):
    """Answer of `POST /detokenize`."""

    prompt: Annotated[str, Meta(description="special tokens included")]


DOCUMENTED = (TokenizeRequest, Tokens, DetokenizeRequest, Detokenized)


@router.post("/tokenize", response_model=None, openapi_extra=documented(TokenizeRequest, Tokens))
async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of the prompt that a conversation makes."""
    return await exchange(request, TokenizeRequest, _tokenize)


@router.post("/detokenize", response_model=None, openapi_extra=documented(DetokenizeRequest, Detokenized))
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    return await exchange(request, DetokenizeRequest, _detokenize)


async def _tokenize(client: Client, model: ServedModel, body: TokenizeRequest, arrived: float) -> None:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Send either prompt or messages.", param="prompt")
    # The threads that tokenise are shared with everybody.
    with model.dispatcher.admit(), Deadline(model, arrived):
        if body.messages is not None:
            tokens = await _of_messages(model, body, body.messages)
        else:
            tokens = await _of_text(model, body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        names = None
        if body.return_token_strs:
            names = await model.off_loop_if_large(len(tokens), lambda: _names(model, tokens))
    await client.reply(Tokens(len(tokens), model.max_model_len, tokens, names))


async def _of_text(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    _check_size("prompt", text)
    return await model.off_loop_if_large(
        len(text), lambda: model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    )


async def _of_messages(model: ServedModel, body: TokenizeRequest, messages: list[ChatMessage]) -> list[int]:
    """As `/v1/chat/completions` makes them, so that what fits here fits there."""
    chat = ChatRequest(
        messages=messages,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
    )
    return list((await prompt_alone(model, chat)).token_ids)


async def _detokenize(client: Client, model: ServedModel, body: DetokenizeRequest, arrived: float) -> None:
    _check_size("tokens", body.tokens)
    check_token_ids(body.tokens, model.tokenizer, "tokens")
    with model.dispatcher.admit(), Deadline(model, arrived):
        text = await model.off_loop_if_large(
            len(body.tokens), lambda: model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
    await client.reply(Detokenized(text))


def _names(model: ServedModel, tokens: Sequence[int]) -> list[str]:
    return [str(model.tokenizer.backend.id_to_token(token)) for token in tokens]


def _check_size(field: str, value: str | Sequence[int]) -> None:
    if len(value) > MAX_CHARACTERS:
        raise RequestTooLarge(f"{field}: {len(value)} are more than {MAX_CHARACTERS}; send it in parts.", param=field)
