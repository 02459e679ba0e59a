"""`/v1/responses` as OpenAI's clients speak it: text, pictures, functions, named events. Nothing is kept."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from proxy.api.answering import answer_chat
from proxy.api.dialect import Head
from proxy.api.field_names import FieldNames
from proxy.api.http import Client, Exchange
from proxy.api.openai.answer import Wanted
from proxy.api.openai.schema import ChatRequest
from proxy.api.requests import EVENTS, decoded, documented, name_request, service_of
from proxy.api.responses.answer import ResponsesDialect, response_of
from proxy.api.responses.input import chat_of
from proxy.api.responses.object import ResponseObject
from proxy.api.responses.schema import ResponsesRequest
from proxy.api.responses.truncation import answer_what_fits
from proxy.models.served_model import ServedModel

router = APIRouter(tags=["OpenAI"])

DOCUMENTED = (ResponsesRequest, ResponseObject)


@router.post(
    "/v1/responses", response_model=None, openapi_extra=documented(ResponsesRequest, ResponseObject, stream=EVENTS)
)
async def responses(request: Request) -> Response:
    """Answer a conversation, which may show pictures and call functions.

    The answer is not kept: it says `store: false`, and the next request brings the whole conversation.
    """
    arrived, service = time.perf_counter(), service_of(request)
    body = await decoded(request, ResponsesRequest)
    name_request(body.request_id)
    model = service.model(body.model)
    chat, names = chat_of(body)
    return Exchange(lambda client: _answer(client, model, body, chat, names, arrived))


async def _answer(
    client: Client, model: ServedModel, body: ResponsesRequest, chat: ChatRequest, names: FieldNames, arrived: float
) -> None:
    def dialect(head: Head, wanted: Wanted) -> ResponsesDialect:
        return ResponsesDialect(response_of(body, model, head), wanted, names)

    async def answer(chat: ChatRequest) -> None:
        await answer_chat(client, model, chat, arrived, dialect, id_prefix="resp_")

    with names.naming():
        if body.truncation == "auto":
            await answer_what_fits(client, model, chat, names, arrived, answer)
        else:
            await answer(chat)
