"""Which models are served, in the keys of all dialects: `/v1/models`. Aliases are listed like models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from epd.types import WorkerTask
from proxy.api.requests import service_of
from proxy.models.served_model import ServedModel
from proxy.service import Service

router = APIRouter(tags=["OpenAI"])

DOCUMENTED = ()

_ENDPOINTS = {
    WorkerTask.GENERATE: "/v1/chat/completions",
    WorkerTask.SCORE: "/v1/score",
    WorkerTask.EMBED: "/v1/embeddings",
}


@router.get("/v1/models")
async def list_models(request: Request) -> JSONResponse:
    """The served models: OpenAI's cards in `data`, and in `models` what each can do and whether its workers are there.

    Names and aliases stand for themselves; `root` and `name` tell which model an alias means.
    """
    service = service_of(request)
    named = service.named_models()
    cards = [_card(service, name, model) for name, model in named.items()]
    entries = [_entry(name, model) for name, model in named.items()]
    return JSONResponse({"object": "list", "data": cards, "models": entries})


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> JSONResponse:
    """One model, by its name or an alias. A name may hold slashes."""
    service = service_of(request)
    if not model:  # /v1/models/ means the list
        return await list_models(request)
    return JSONResponse(_card(service, model, service.model(model)))


def supports(model: ServedModel) -> list[str]:
    """What a model is good for, in words."""
    if model.task is WorkerTask.SCORE:
        return ["score"]
    if model.task is WorkerTask.EMBED:
        return ["embedding"]
    instruct = ["instruct"] if model.template is not None else []
    pictures = ["image"] if model.image_token_id is not None else []
    return ["completion", *instruct, "text", *pictures]


def status(model: ServedModel) -> str:
    """`healthy`, or `degraded` while a role that the model needs has nobody."""
    return "degraded" if model.missing_roles else "healthy"


def _card(service: Service, name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "epd",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len or None,
        "permission": [_permission(service)],
    }


def _permission(service: Service) -> dict[str, Any]:
    """What cards of old had; some clients index it."""
    return {
        "id": "modelperm-epd",
        "object": "model_permission",
        "created": service.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": True,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def _entry(name: str, model: ServedModel) -> dict[str, Any]:
    """Where to send requests is a path: addresses of workers are nobody's business."""
    entry = {
        "id": name,
        "name": model.name,
        "status": status(model),
        "supports": supports(model),
        "endpoint": _ENDPOINTS[model.task or WorkerTask.GENERATE],
    }
    missing = [role.value for role in model.missing_roles]
    return entry | ({"missing": missing} if missing else {})
