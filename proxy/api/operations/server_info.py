"""What this server is: `/server_info`, `/load`, and `/info` as TGI has it. No secrets, and no addresses for clients."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from epd import __version__
from proxy.api.openai.schema import MAX_SAMPLES
from proxy.api.operations.models import status, supports
from proxy.api.requests import is_admin, service_of
from proxy.api.vectors.common import MAX_INPUTS
from proxy.cluster.roster_view import cluster_view
from proxy.models.served_model import ServedModel
from proxy.service import Service

router = APIRouter(tags=["operations"])

DOCUMENTED = ()

_LIMITS = (
    *("max_body_bytes", "max_image_bytes", "max_image_pixels", "max_images_per_request", "max_media_bytes"),
    *("max_concurrent_requests", "max_requests_per_key", "max_stop_strings"),
)
_TIMES = (
    *("request_timeout", "queue_timeout", "encode_timeout", "media_timeout"),
    *("generate_timeout", "generate_timeout_per_token"),
)


@router.get("/load")
async def load(request: Request) -> JSONResponse:
    """How many requests this proxy has in work."""
    return JSONResponse({"server_load": service_of(request).dispatcher.in_work})


@router.get("/server_info")
async def server_info(request: Request) -> JSONResponse:
    """Version, models, limits (`_s`: in seconds). With the admin key, the workers with their addresses too."""
    service = service_of(request)
    config = service.config
    body: dict[str, Any] = {
        "version": __version__,
        "uptime_s": round(time.time() - service.created, 3),
        "server_load": service.dispatcher.in_work,
        "models": [_model(service, model) for name, model in service.named_models().items() if name == model.name],
        "scenarios": list(service.gateway.scenarios),
        "limits": {name: getattr(config, name) for name in _LIMITS}
        | {f"{name}_s": getattr(config, name) for name in _TIMES}
        | {"max_n": MAX_SAMPLES, "max_embedding_inputs": MAX_INPUTS},
    }
    if is_admin(request, config.admin_key):
        body["workers"] = msgspec.to_builtins(cluster_view(service).workers)
    return JSONResponse(body)


@router.get("/info")
async def info(request: Request) -> JSONResponse:
    """The default model and its limits, in TGI's words."""
    service = service_of(request)
    model = service.default_model()
    length = model.max_model_len or None
    return JSONResponse(
        {
            "model_id": model.name,
            "model_sha": model.ref.fingerprint,
            "model_pipeline_tag": "text-generation" if model.image_token_id is None else "image-text-to-text",
            "max_concurrent_requests": service.config.max_concurrent_requests,
            "max_best_of": MAX_SAMPLES,
            "max_stop_sequences": service.config.max_stop_strings,
            "max_input_tokens": None if length is None else length - 1,
            "max_total_tokens": length,
            "max_client_batch_size": MAX_INPUTS,
            "auto_truncate": False,
            "router": "epd",
            "version": __version__,
        }
    )


def _model(service: Service, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "aliases": [alias for alias, real in service.gateway.aliases.items() if real == model.name],
        "status": status(model),
        "task": model.task,
        "supports": supports(model),
        "max_model_len": model.max_model_len or None,
    }
