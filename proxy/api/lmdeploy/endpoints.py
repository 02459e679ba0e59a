"""LMDeploy's native dialect: `POST /generate` of 2023, with sessions, and its successor `/v1/chat/interactive`."""

from __future__ import annotations

import time
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from epd.errors import InvalidRequest
from proxy.api.dialect import Head
from proxy.api.http import Client, Exchange
from proxy.api.json_body import Body, decode_body
from proxy.api.lmdeploy.answer import INTERACTIVE, OLD, Framing, LMDeployDialect
from proxy.api.lmdeploy.schema import DEFAULT_OUTPUT_LEN, InteractiveRequest, LMDeployAnswer, LMDeployRequest
from proxy.api.lmdeploy.session_turns import Asked, Told, answer_turn, session_key, stop_turn
from proxy.api.openai.prompt import naming
from proxy.api.openai.schema import ContentPart
from proxy.api.requests import EVENTS, decoded, documented, service_of
from proxy.models.served_model import ServedModel
from proxy.request_context import check_share
from proxy.service import Service

router = APIRouter(tags=["LMDeploy"])

DOCUMENTED = (LMDeployRequest, InteractiveRequest, LMDeployAnswer)


async def answer(request: Request, body: Body, arrived: float) -> Response:
    """Answer `POST /generate` with a `prompt`.

    Args:
        request: of which the body was read already.
        body: as it came.
        arrived: `time.perf_counter()` when it did.

    Raises:
        EPDError: it can't be answered.
    """
    wanted = decode_body(body, LMDeployRequest)
    service = service_of(request)
    model = service.default_model()
    start = wanted.sequence_start is not False or bool(wanted.renew_session)
    asked = Asked(
        body=wanted.chat(max_tokens=wanted.request_output_len or DEFAULT_OUTPUT_LEN),
        session_id=wanted.session,
        key=session_key(request, wanted.session),
        start=start,
        end=bool(wanted.sequence_end),
        dialect_of=partial(_dialect, OLD),
    )
    if wanted.stop:
        return Exchange(lambda client: stop_turn(client, service.sessions, model, asked))
    check_share()
    return _turn(service, model, asked, arrived)


@router.post(
    "/v1/chat/interactive",
    response_model=None,
    openapi_extra=documented(InteractiveRequest, LMDeployAnswer, stream=EVENTS),
)
async def interactive(request: Request) -> Response:
    """Go on with a conversation that the server keeps, or begin one; without interactive_mode it is over then."""
    arrived, service = time.perf_counter(), service_of(request)
    wanted = await decoded(request, InteractiveRequest)
    model = service.default_model()
    if wanted.adapter_name:
        raise InvalidRequest("adapter_name: this server has no adapters; leave it out.", param="adapter_name")
    stops = None if isinstance(wanted.stop, bool) else wanted.stop
    asked = Asked(
        body=wanted.chat(max_tokens=wanted.request_output_len, stop=stops),
        session_id=wanted.session,
        key=session_key(request, wanted.session),
        start=True if wanted.renew_session else None,
        end=not wanted.interactive_mode,
        dialect_of=partial(_dialect, INTERACTIVE),
    )
    if wanted.cancel or wanted.stop is True:
        if not asked.is_named:
            field = "cancel" if wanted.cancel else "stop"
            raise InvalidRequest(f"{field} needs the session_id of what is to be stopped.", param="session_id")
        return Exchange(lambda client: stop_turn(client, service.sessions, model, asked))
    check_share()
    _show(wanted, asked)
    return _turn(service, model, asked, arrived)


def _turn(service: Service, model: ServedModel, asked: Asked, arrived: float) -> Exchange:
    async def answer(client: Client) -> None:
        with naming("prompt"):
            await answer_turn(client, service.sessions, model, asked, arrived)

    return Exchange(answer)


def _dialect(framing: Framing, _: Head, told: Told) -> LMDeployDialect:
    return LMDeployDialect(framing, told)


def _show(wanted: InteractiveRequest, asked: Asked) -> None:
    """Put pictures before the text of the last message."""
    if not wanted.images:
        return
    last = asked.body.messages[-1]
    said = [ContentPart("text", last.content)] if isinstance(last.content, str) else last.content or []
    last.content = [*wanted.images, *said]
