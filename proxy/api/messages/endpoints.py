"""`/v1/messages` as Anthropic's clients speak it: text, pictures, tools, named events; and what a prompt counts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from epd.errors import InvalidRequest
from proxy.api.answering import answer_chat, prompt_alone
from proxy.api.dialect import Head
from proxy.api.documentation import REF
from proxy.api.http import Client
from proxy.api.messages.answer import MessagesDialect
from proxy.api.messages.input import chat_of
from proxy.api.messages.object import MessageObject, MessagesError, TokensCount
from proxy.api.messages.schema import CountTokensRequest, MessagesRequest
from proxy.api.openai.answer import Wanted
from proxy.api.openai.prompt import messages_of
from proxy.api.requests import EVENTS, Deadline, documented, exchange
from proxy.media.image_tokens import size_of
from proxy.models.served_model import ServedModel
from proxy.request_context import REQUEST_ID

router = APIRouter(tags=["Anthropic"])

PATHS = ("/v1/messages", "/v1/messages/count_tokens")
DOCUMENTED = (MessagesRequest, MessageObject, CountTokensRequest, TokensCount, MessagesError)


def _documented(body: type[Any], answer: type[Any], stream: str | None = None) -> dict[str, Any]:
    found = documented(body, answer, stream=stream)
    schema = {"schema": {"$ref": REF.format(name=MessagesError.__name__)}}
    error = {"description": "An error", "content": {"application/json": schema}}
    found["responses"] |= {str(status): error for status in (400, 401, 404, 413, 429, 500, 503, 504)}
    return found


@router.post(PATHS[0], response_model=None, openapi_extra=_documented(MessagesRequest, MessageObject, EVENTS))
async def messages(request: Request) -> Response:
    """Answer a conversation, which may show pictures and use tools."""
    return await exchange(request, MessagesRequest, _answer)


@router.post(PATHS[1], response_model=None, openapi_extra=_documented(CountTokensRequest, TokensCount))
async def count_tokens(request: Request) -> Response:
    """How many prompt tokens such a conversation has, pictures included. Nothing is computed for it."""
    return await exchange(request, CountTokensRequest, _count)


async def _answer(client: Client, model: ServedModel, body: MessagesRequest, arrived: float) -> None:
    chat, names = chat_of(body)

    def dialect(head: Head, wanted: Wanted) -> MessagesDialect:
        return MessagesDialect(head, wanted, body.max_tokens, names)

    client.headers["request-id"] = REQUEST_ID.get()  # where clients of this API look for it
    with names.naming():
        # Clients must send a limit here, and send what they would like best.
        await answer_chat(client, model, chat, arrived, dialect, id_prefix="msg_", fits_context=True)


async def _count(client: Client, model: ServedModel, body: CountTokensRequest, arrived: float) -> None:
    chat, names = chat_of(body)
    with names.naming(), model.dispatcher.admit(), Deadline(model, arrived):
        prompt = await prompt_alone(model, chat)
        _, sources = messages_of(chat, has_short_ids=model.has_short_call_ids)
        if sources and model.image_tokens is None:
            raise InvalidRequest(
                "The settings of this model do not tell how many tokens an image takes; ask /v1/messages with "
                "max_tokens: 1, whose usage counts them.",
                param=sources[0].param,
            )
        count = len(prompt.token_ids) - len(sources)
        for image in await model.load_images(sources):
            assert model.image_tokens is not None
            count += model.image_tokens(*size_of(image.data))
    await client.reply(TokensCount(count))
