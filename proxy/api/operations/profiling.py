"""`POST /start_profile` and `/stop_profile`: traces of what the workers compute."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request
from msgspec import Meta
from starlette.responses import Response

from epd.errors import NoWorker
from epd.messages import ProfileReply
from proxy.api.http import JSON, read_body
from proxy.api.json_body import decode_body
from proxy.api.operations.control import require_admin
from proxy.api.requests import documented, service_of
from proxy.cluster.worker_connection import WorkerConnection
from proxy.request_context import KEY_ID

router = APIRouter(tags=["operations"])

_MAX_BODY_BYTES = 64 << 10
_HOW = "No worker writes traces: start workers with --profile-dir DIR (`epd up` takes it too) and ask again."


class ProfileRequest(msgspec.Struct):
    """The body of `/start_profile` and `/stop_profile`; all of it may be left out."""

    model: Annotated[str | None, Meta(description="Whose workers; default: all.")] = None
    seconds: Annotated[float, Meta(gt=0, le=600, description="A recording ends by itself after so long, …")] = 60.0
    steps: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000,
            description="… or after so many steps of a prefill-decode worker, or pictures and batches of an encoder. "
            "A hundred steps take about a second to write, during which the worker computes nothing.",
        ),
    ] = 100


class WorkerProfile(msgspec.Struct, omit_defaults=True):
    """How one worker took it."""

    state: Annotated[str, Meta(description="started, running (it was already), stopped, idle, off or failed")]
    files: Annotated[
        tuple[str, ...], Meta(description="Traces written since it was asked last, in its own folder")
    ] = ()
    message: Annotated[str, Meta(description="Why it failed")] = ""


class ProfileAnswer(msgspec.Struct, omit_defaults=True):
    """What both answer."""

    status: Annotated[str, Meta(description="ok; off: no worker has a folder for traces")]
    workers: dict[str, WorkerProfile]
    message: str = ""


DOCUMENTED = (ProfileRequest, ProfileAnswer)
_DOCUMENTED = documented(ProfileRequest, ProfileAnswer)
_DOCUMENTED["requestBody"]["required"] = False


@router.post("/start_profile", response_model=None, openapi_extra=_DOCUMENTED)
async def start_profile(request: Request) -> Response:
    """Have workers record what they compute, on all threads and GPUs, with torch.profiler.

    A recording ends by itself after `seconds` or `steps`, whichever comes first. Workers are slower meanwhile, and
    compute nothing while they write. Needs the admin key where there is one, or where clients need keys.
    """
    wanted, workers = await _asked(request)
    return await _answer(workers, lambda one: one.profiles.start(wanted.seconds, wanted.steps))


@router.post("/stop_profile", response_model=None, openapi_extra=_DOCUMENTED)
async def stop_profile(request: Request) -> Response:
    """End recordings, and name the traces that workers wrote below their `--profile-dir` since they were asked last.

    Chrome's trace format, compressed, as https://ui.perfetto.dev reads it. Needs the admin key as
    `/start_profile` does.
    """
    _, workers = await _asked(request)
    return await _answer(workers, lambda one: one.profiles.stop())


async def _asked(request: Request) -> tuple[ProfileRequest, list[WorkerConnection]]:
    service = service_of(request)
    if service.config.admin_key is not None or KEY_ID.get():  # clients with keys are not the operators
        require_admin(request, "Profiling")
    body = await read_body(request, _MAX_BODY_BYTES, service.config.request_timeout)
    wanted = decode_body(body or b"{}", ProfileRequest)
    workers = [one for one in service.pool.connections() if one.info is not None]
    if wanted.model is not None:
        fingerprint = service.model(wanted.model).ref.fingerprint
        workers = [one for one in workers if one.model == fingerprint]
    if not workers:
        raise NoWorker("No worker is there that could be profiled. Try again in a moment.")
    return wanted, workers


async def _answer(
    workers: list[WorkerConnection], ask: Callable[[WorkerConnection], Awaitable[ProfileReply]]
) -> Response:
    replies = await asyncio.gather(*(ask(one) for one in workers))
    told = {
        f"{one.member.role.server_type}-{one.member.address}": WorkerProfile(reply.state, reply.files, reply.message)
        for one, reply in zip(workers, replies, strict=True)
    }
    is_off = all(reply.state == "off" for reply in replies)
    answer = ProfileAnswer("off", told, _HOW) if is_off else ProfileAnswer("ok", told)
    return Response(msgspec.json.encode(answer), media_type=JSON)
