"""`/v1/chat/completions` and `/v1/completions` as OpenAI clients speak them."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from proxy.api.answering import answer_chat, answer_text
from proxy.api.http import Exchange
from proxy.api.lmdeploy.chat_sessions import session_exchange
from proxy.api.openai.fields import CHAT_REFUSED, TEXT_REFUSED, table
from proxy.api.openai.objects import ChatCompletion, TextCompletion
from proxy.api.openai.schema import ChatRequest, CompletionRequest
from proxy.api.requests import EVENTS, decoded, documented, name_request, service_of
from proxy.request_context import check_share

router = APIRouter(tags=["OpenAI"])


DOCUMENTED = (ChatRequest, CompletionRequest, ChatCompletion, TextCompletion)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    openapi_extra=documented(ChatRequest, ChatCompletion, stream=EVENTS),
    description=f"Answer a conversation, which may show pictures.\n\n{table(CHAT_REFUSED)}",
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, which may show pictures."""
    arrived, service = time.perf_counter(), service_of(request)
    body = await decoded(request, ChatRequest)
    if body.stop is not True:
        check_share()
    name_request(body.request_id)
    model = service.model(body.model)
    with_session = session_exchange(request, service.sessions, model, body, arrived)
    return with_session or Exchange(lambda client: answer_chat(client, model, body, arrived))


@router.post(
    "/v1/completions",
    response_model=None,
    openapi_extra=documented(CompletionRequest, TextCompletion, stream=EVENTS),
    description=f"Continue a text.\n\n{table(TEXT_REFUSED)}",
)
async def completions(request: Request) -> Response:
    """Continue a text."""
    arrived, service = time.perf_counter(), service_of(request)
    body = await decoded(request, CompletionRequest)
    name_request(body.request_id)
    model = service.model(body.model)
    return Exchange(lambda client: answer_text(client, model, body, arrived))
