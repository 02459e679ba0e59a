"""LightLLM's native endpoints, and TGI's, which are nearly the same: raw prompts with pictures, token by token.

`/generate` itself is in `proxy.api.generate`, because other dialects share it.
"""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from epd.errors import InvalidRequest
from epd.types import SamplingParams, WorkerRole
from proxy.api.dialect import Head
from proxy.api.http import Client, Exchange
from proxy.api.json_body import Body, decode_body
from proxy.api.lightllm.answer import NativeAnswer, NativeDialect, StreamFrame, TGIAnswer, TGIDialect
from proxy.api.lightllm.docs import native_documentation
from proxy.api.lightllm.errors import naming_native_fields, use_native_errors
from proxy.api.lightllm.media import count_image_tokens, sources_of
from proxy.api.lightllm.raw_answer import RawRequest, answer_raw
from proxy.api.lightllm.raw_prompt import raw_prompt
from proxy.api.lightllm.sampling import grammar_of, sampling_of, text_options_of
from proxy.api.lightllm.schema import CountRequest, NativeParameters, NativeRequest
from proxy.api.operations.health import health
from proxy.api.requests import Deadline, documented, read_request, service_of
from proxy.models.served_model import ServedModel
from proxy.service import Service

router = APIRouter(tags=["LightLLM"])


class TokenCount(msgspec.Struct):
    """Answer of `/tokens`."""

    ntokens: int


DOCUMENTED = (NativeRequest, NativeAnswer, TGIAnswer, StreamFrame, CountRequest, TokenCount)

# -- generation --------------------------------------------------------------------------------------------------------


@router.post(
    "/generate_stream",
    response_model=None,
    openapi_extra=native_documentation(bodies=(NativeRequest,), stream="text/event-stream"),
)
async def generate_stream(request: Request) -> Response:
    """Continue a text, with an event `data:{…}` for each token; the last one is `finished`, and nothing follows it.

    What is in the braces is the schema `StreamFrame`.
    """
    arrived = time.perf_counter()
    body = await _native_body(request)
    return _answered(request, body, arrived, stream=True)


@router.post(
    "/",
    response_model=None,
    openapi_extra=native_documentation(
        bodies=(NativeRequest,), answers=(NativeAnswer,), lists_of=(TGIAnswer,), stream="text/event-stream"
    ),
)
async def generate_either(request: Request) -> Response:
    """`/generate`, or with `stream: true` `/generate_stream`.

    TGI's clients ask here, with bodies that are often LightLLM's too: what has neither `multimodal_params` nor a
    parameter that only LightLLM has is answered as TGI does, in a list, unless it streams.
    """
    arrived = time.perf_counter()
    body = await _native_body(request)
    return _answered(request, body, arrived, stream=bool(body.stream), is_root=True)


async def answer(request: Request, body: Body, arrived: float) -> Response:
    """Answer `POST /generate` with `inputs`.

    Args:
        request: of which the body was read already.
        body: as it came.
        arrived: `time.perf_counter()` when it did.

    Raises:
        EPDError: it can't be answered.
    """
    use_native_errors(request)
    return _answered(request, decode_body(body, NativeRequest), arrived, stream=False)


async def _native_body(request: Request) -> NativeRequest:
    use_native_errors(request)
    return decode_body(await read_request(request), NativeRequest)


def _answered(
    request: Request, body: NativeRequest, arrived: float, *, stream: bool, is_root: bool = False
) -> Response:
    service = service_of(request)
    model = service.default_model()
    return Exchange(lambda client: _Native(model, body, service, is_root).answer(client, arrived, stream=stream))


class _Native:
    """A request for text.

    Args:
        model: that it is for.
        body: of the request.
        service: of the process.
        is_root: it came to `POST /`.
    """

    def __init__(self, model: ServedModel, body: NativeRequest, service: Service, is_root: bool) -> None:
        self._model = model
        self._body = body
        self._asked = body.parameters or NativeParameters()
        is_lightllm = body.multimodal_params is not None or self._asked.is_lightllm
        self._is_tgi = service.config.use_tgi_api or self._asked.is_tgi or (is_root and not is_lightllm)
        self._is_root = is_root

    async def answer(self, client: Client, arrived: float, *, stream: bool) -> None:
        """Answer it.

        Raises:
            EPDError: nothing was told.
        """
        model, asked = self._model, self._asked
        asked.check()
        if stream and asked.samples > 1:
            raise InvalidRequest("best_of can't be streamed; want 1.", param="parameters.best_of")
        with_details = bool(asked.details) if self._is_tgi else bool(asked.return_details)
        with_pieces = stream or with_details
        # TGI gives the likeliest one of several.
        with_logprobs = with_pieces or (self._is_tgi and asked.samples > 1)
        sampling = sampling_of(asked, model, with_logprobs=with_logprobs)
        raw = RawRequest(
            id=Head.new("gen", model.name).id,
            inputs=self._body.inputs,
            field="inputs",
            sources=sources_of(self._body.multimodal_params, model),
            images_field="multimodal_params",
            sampling=sampling,
            options=text_options_of(asked, model, with_pieces=with_pieces),
            grammar=grammar_of(asked),
            n=asked.samples,
            add_special_tokens=asked.add_special_tokens is not False,
            keep_last=asked.truncate or None,
            keep_last_field="parameters.truncate",
        )
        dialect = self._dialect(sampling, with_details=with_details)
        await answer_raw(client, model, raw, dialect, arrived, stream=stream)

    def _dialect(self, sampling: SamplingParams, *, with_details: bool) -> NativeDialect:
        tokenizer, inputs = self._model.tokenizer, self._body.inputs
        if not self._is_tgi:
            return NativeDialect(tokenizer.special_ids, with_details=with_details)
        prefix = ""
        if self._asked.return_full_text:
            prefix = inputs if isinstance(inputs, str) else tokenizer.decode(inputs)
        seed = sampling.seed if sampling.temperature else None
        return TGIDialect(
            tokenizer.special_ids, with_details=with_details, prefix=prefix, seed=seed, in_list=self._is_root
        )


# -- counting ----------------------------------------------------------------------------------------------------------


@router.get("/tokens", response_model=None, openapi_extra=documented(CountRequest, TokenCount))
@router.post("/tokens", response_model=None, openapi_extra=documented(CountRequest, TokenCount))
async def tokens(request: Request) -> Response:
    """How many prompt tokens `/generate` would count, pictures included. Nothing is computed for it.

    Pictures may be given by their size, as `{"type": "image_size", "data": [width, height]}`. A text without any marker
    is counted as if it had one for each picture.
    """
    arrived = time.perf_counter()
    use_native_errors(request)
    body = decode_body(await read_request(request), CountRequest)
    model = service_of(request).default_model()
    return Exchange(lambda client: _count(client, model, body, arrived))


async def _count(client: Client, model: ServedModel, body: CountRequest, arrived: float) -> None:
    params = body.multimodal_params
    images = len(params.images or ()) if params is not None else 0
    add = body.parameters is None or body.parameters.add_special_tokens is not False
    with model.dispatcher.admit(), Deadline(model, arrived), naming_native_fields():
        prompt = await raw_prompt(model, body.text, images, field="text", add_special_tokens=add, adds_markers=True)
        of_images = await count_image_tokens(params, model) if params is not None else 0
    await client.reply(TokenCount(len(prompt.token_ids) - images + of_images))


# -- the server --------------------------------------------------------------------------------------------------------


@router.get("/token_load")
async def token_load(request: Request) -> JSONResponse:
    """How full the KV cache of all prefill-decode workers is, as ratios.

    `dynamic_max_load` is what the requests that wait now will make of it, if each needs as much as one that runs;
    `logical_max_load` is the same.
    """
    workers = service_of(request).pool.connections(WorkerRole.PREFILL_DECODE)
    loads = [worker.reported_load for worker in workers if worker.info is not None]
    total = sum(load.kv_total_blocks for load in loads)
    used = sum(load.kv_used_blocks for load in loads)
    expected = sum(load.kv_used_blocks * (load.running + load.waiting) / max(load.running, 1) for load in loads)
    current = used / total if total else 0.0
    dynamic = max(expected / total, current) if total else 0.0
    return JSONResponse({"current_load": current, "logical_max_load": dynamic, "dynamic_max_load": dynamic})


@router.get("/get_model_name")
@router.post("/get_model_name")
async def get_model_name(request: Request) -> JSONResponse:
    """Name of the model that answers `/generate`."""
    use_native_errors(request)
    return JSONResponse({"model_name": service_of(request).default_model().name})


@router.get("/liveness")
@router.post("/liveness")
async def liveness() -> JSONResponse:
    """Whether the HTTP server answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readiness")
@router.post("/readiness")
async def readiness(request: Request) -> JSONResponse:
    """As `/health`: 503 while no model can be served."""
    is_ready = (await health(request)).status_code == 200
    return JSONResponse({"status": "ok" if is_ready else "error"}, 200 if is_ready else 503)


@router.head("/", include_in_schema=False)
@router.get("/", response_model=None)
async def root(request: Request) -> Response:
    """The documentation for browsers; for all others, such as load balancers that ask here by default, `/health`."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")
    return await health(request)
