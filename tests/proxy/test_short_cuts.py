"""Endpoints that are reached without FastAPI's routing, and those that are not."""

from __future__ import annotations

from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from proxy.api.openai.endpoints import router as openai
from proxy.request_context import OUTCOME, Outcome
from proxy.short_cuts import ShortCuts

router = APIRouter()


@router.post("/short", response_model=None)
async def short(request: Request) -> Response:
    """Takes the request alone."""
    if await request.body() == b"wrong":
        raise KeyError("wrong")
    return PlainTextResponse("FastAPI" if "fastapi_inner_astack" in request.scope else "straight")


@router.post("/long", response_model=None)
async def long(request: Request, number: int = 0) -> Response:
    """Has a parameter, which FastAPI reads."""
    return PlainTextResponse(f"FastAPI {number}")


@router.post("/value")
async def value(request: Request) -> dict[str, Any]:
    """Returns what FastAPI makes a response of."""
    return {"by": "FastAPI"}


async def wrong(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{type(error).__name__}", 418)


def client() -> httpx.AsyncClient:
    app = FastAPI()
    app.include_router(router)
    app.add_exception_handler(LookupError, wrong)
    app.add_middleware(ShortCuts, routes=router.routes, handlers=app.exception_handlers)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://epd")


async def test_only_what_takes_the_request_alone_goes_the_short_way() -> None:
    async with client() as http:
        assert (await http.post("/short")).text == "straight"
        assert (await http.post("/long?number=3")).text == "FastAPI 3"
        assert (await http.post("/value")).json() == {"by": "FastAPI"}
        assert (await http.get("/short")).status_code == 405
        assert (await http.post("/nowhere")).status_code == 404


async def test_errors_become_what_they_do_elsewhere() -> None:
    OUTCOME.set(Outcome())
    async with client() as http:
        answer = await http.post("/short", content=b"wrong")
        assert (answer.status_code, answer.text) == (418, "KeyError")


def test_the_endpoints_with_most_of_the_work_are_among_them() -> None:
    found = ShortCuts(FastAPI(), openai.routes, {})
    assert found.paths >= {"/v1/chat/completions", "/v1/completions"}
