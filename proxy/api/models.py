"""Which models are served: `/v1/models`, in the keys of all dialects."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from proxy.api.requests import service_of
from proxy.served_model import ServedModel
from proxy.service import Service

router = APIRouter(tags=["OpenAI"])

DOCUMENTED = ()


@router.get("/v1/models")
async def list_models(request: Request) -> JSONResponse:
    """The served models, in the keys of all dialects."""
    service = service_of(request)
    models = service.models()
    entries = [
        {
            "id": model.name,
            "name": model.name,
            "status": _status(model),
            "supports": ["text", "image"] if model.image_token_id is not None else ["text"],
            "endpoint": "/v1/chat/completions",
        }
        | ({"missing": [role.value for role in model.missing_roles]} if model.missing_roles else {})
        for model in models
    ]
    return JSONResponse({"object": "list", "data": [_card(service, model) for model in models], "models": entries})


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> JSONResponse:
    """One model. Its id may hold slashes."""
    service = service_of(request)
    if not model:  # /v1/models/ means the list
        return await list_models(request)
    return JSONResponse(_card(service, service.model(model)))


def _card(service: Service, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": service.created,
        "owned_by": "epd",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len or None,
        "permission": [],
    }


def _status(model: ServedModel) -> str:
    return "degraded" if model.missing_roles else "healthy"
