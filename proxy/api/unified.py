"""`POST /v1/generate`: one body for all models, with scenarios as prompt templates and error codes of its own.

The time that a request may take adapts to what it asks for: `--generate-timeout` covers 128 tokens, each further one
that `max_new_tokens` asks for adds `--generate-timeout-per-token`, and `--request-timeout` bounds all of it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from msgspec import Meta, Struct, UnsetType
from starlette.responses import Response

from epd.errors import (
    ClientError,
    DeadlineExceeded,
    EPDError,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    ServerError,
    ShuttingDown,
)
from epd.types import SamplingParams
from proxy.api.answering import tell
from proxy.api.dialect import Head, News, ServerSent, Timings
from proxy.api.documentation import REF
from proxy.api.http import Client, Exchange, error_body
from proxy.api.openai.objects import Usage
from proxy.api.openai.prompt import naming
from proxy.api.openai.sampling import stop_strings
from proxy.api.requests import Deadline, decoded, documented, service_of
from proxy.cluster.in_hand import WorkerGone
from proxy.dispatch.work import Work
from proxy.gateway_config import BASE, DEFAULTS, GenerateParameters, Scenario
from proxy.models.served_model import ServedModel
from proxy.service import Service
from proxy.text.answer import Answer, TextOptions
from proxy.text.chat_template import Prompt

router = APIRouter(tags=["Unified gateway"])

PATH = "/v1/generate"


class GenerateRequest(Struct, kw_only=True):
    """`POST /v1/generate`."""

    model_id: Annotated[str, Meta(description="name of a served model, or an alias", examples=["qwen2"])]
    inputs: Annotated[
        str, Meta(min_length=1, description="text without any markers of the model", examples=["Who are you?"])
    ]
    scenario: Annotated[
        str | None,
        Meta(
            description="prompt template: base (the default), qa, summarize, rewrite, or one of the operators'",
            examples=["qa"],
        ),
    ] = None
    parameters: GenerateParameters | None = None
    stream: Annotated[bool | None, Meta(description="true is refused")] = None


class Generated(Struct):
    """Answer of `POST /v1/generate`."""

    generated_text: Annotated[str, Meta(description="without the prompt")]
    model: Annotated[str, Meta(description="the model's own name, whichever the request gave")]
    tokens: Annotated[int, Meta(description="that were generated")]
    finish_reason: Annotated[str, Meta(description="stop or length")]
    prompt_tokens: int
    id: str
    scenario: str


class GatewayErrorObject(Struct):
    """An error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class GatewayErrorDetail(Struct):
    """An error as FastAPI's clients read it."""

    error_code: str
    message: str


class GatewayError(Struct):
    """Answer of `POST /v1/generate` where it has none."""

    error_code: Annotated[str, Meta(examples=["MODEL_NOT_FOUND"])]
    message: str
    detail: GatewayErrorDetail
    error: GatewayErrorObject
    object: str
    type: str
    code: Annotated[int, Meta(description="the status")]
    param: Annotated[str | None, Meta(description="the field that is wrong")]


DOCUMENTED = (GenerateRequest, Generated, GatewayError)
_STATUSES = (400, 413, 422, 429, 500, 503, 504)


# -- errors ----------------------------------------------------------------------------------------------------------


class PromptFormatFailed(ClientError):
    """There is no such scenario, or no prompt can be made of it and the text."""

    code = "prompt_format_failed"


def error_words(error: EPDError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error on this path: what all paths have, with `error_code` and `detail` besides."""
    status, code = _status_and_code(error)
    named = {"error_code": code, "message": error.message}
    body = error_body(error) | {"code": status, **named, "detail": named}
    if isinstance(error, ModelNotFound):  # which other paths name by another field
        body["param"] = body["error"]["param"] = "model_id"
    return status, body


def _status_and_code(error: EPDError) -> tuple[int, str]:
    match error:
        case ModelNotFound():
            return 400, "MODEL_NOT_FOUND"
        case InvalidRequest():
            return 422, "VALIDATION_ERROR"
        case DeadlineExceeded():
            return 504, "INFERENCE_TIMEOUT"
        case NoWorker() | ShuttingDown() | WorkerGone():
            return 503, "DOWNSTREAM_REQUEST_FAILED"
        case ServerError() if error.status in (500, 502):  # what is full (429) is not broken
            return 500, "TGI_SERVER_ERROR"
    return error.status, error.code.upper()


def _documented() -> dict[str, Any]:
    found = documented(GenerateRequest, Generated)
    schema = {"schema": {"$ref": REF.format(name=GatewayError.__name__)}}
    error = {"description": "An error with its code", "content": {"application/json": schema}}
    found["responses"] |= {str(status): error for status in _STATUSES}
    return found


# -- the endpoint ----------------------------------------------------------------------------------------------------


@router.post(PATH, response_model=None, openapi_extra=_documented())
async def generate(request: Request) -> Response:
    """Generate text by any of the models, with the prompt template of a scenario.

    Errors have an `error_code`: `MODEL_NOT_FOUND` and `PROMPT_FORMAT_FAILED` (400), `VALIDATION_ERROR` (422),
    `TGI_SERVER_ERROR` (500), `DOWNSTREAM_REQUEST_FAILED` (503), `INFERENCE_TIMEOUT` (504).
    """
    arrived, service = time.perf_counter(), service_of(request)
    body = await decoded(request, GenerateRequest)
    model = service.model(body.model_id)
    return Exchange(lambda client: _generate(client, service, model, body, arrived))


async def _generate(
    client: Client, service: Service, model: ServedModel, body: GenerateRequest, arrived: float
) -> None:
    if body.stream:
        raise InvalidRequest("stream: this endpoint does not stream; use /v1/chat/completions.", param="stream")
    name = body.scenario or BASE
    scenario = _scenario(service, name)
    asked = (body.parameters or GenerateParameters()).or_else(scenario.parameters).or_else(DEFAULTS)
    options, sampling = _options(asked, model), _sampling(asked, model)
    assert sampling.max_tokens is not None  # by DEFAULTS
    limit_s = min(service.config.generate_timeout_s(sampling.max_tokens), service.config.request_timeout)
    model.require()
    with model.dispatcher.admit():
        with Deadline(model, arrived, limit_s), naming("inputs"):
            prompt = await _prompt(model, scenario, body.inputs)
            model.check_context(len(prompt.token_ids), sampling.max_tokens)
        head = Head.new("gen", model.name)
        work = Work(
            request_id=head.id,
            model=model.ref,
            prompts=(prompt.token_ids,),
            sampling=sampling,
            arrived=arrived,
            timeout_s=limit_s,
        )
        await tell(client, model, work, _Words(head, name), options, stream=False)


def _scenario(service: Service, name: str) -> Scenario:
    found = service.gateway.scenarios.get(name)
    if found is None:
        known = ", ".join(service.gateway.scenarios)
        raise PromptFormatFailed(f"scenario: there is no {name[:100]!r}; choose one of {known}.", param="scenario")
    return found


async def _prompt(model: ServedModel, scenario: Scenario, inputs: str) -> Prompt:
    """Tokens of the scenario's conversation. Models that know no instructions find them in the user's turn.

    Raises:
        PromptFormatFailed: the model's chat template takes neither, or there is none.
        ContextLengthExceeded: it can't fit.
    """
    try:
        try:
            return await model.encode_chat(scenario.messages(inputs), {})
        except InvalidRequest:
            if not scenario.system:
                raise
            return await model.encode_chat(scenario.in_one_turn(inputs), {})
    except InvalidRequest as error:
        raise PromptFormatFailed(error.message, param="inputs") from error


def _options(asked: GenerateParameters, model: ServedModel) -> TextOptions:
    return TextOptions(stop=stop_strings(asked.stop, model, "parameters.stop"))


def _sampling(asked: GenerateParameters, model: ServedModel) -> SamplingParams:
    """What is not asked for is the model's own default. Greedy is a temperature of 0."""
    given = {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    defaults = model.sampling_defaults
    chosen = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
    if not asked.do_sample:
        chosen["temperature"] = 0.0
    chosen["top_k"] = max(chosen["top_k"], 0)
    seed = secrets.randbits(62) if asked.seed is None else asked.seed % (1 << 63)
    return SamplingParams(max_tokens=asked.max_new_tokens, seed=seed, **chosen)


class _Words(ServerSent):
    """The answer in one piece. It is never streamed.

    Args:
        head: of the answer.
        scenario: its name.
    """

    def __init__(self, head: Head, scenario: str) -> None:
        self._head = head
        self._scenario = scenario

    def opening(self, index: int) -> bytes:
        """Nothing."""
        return b""

    def chunk(self, index: int, news: News) -> bytes:
        """Nothing."""
        return b""

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """Nothing."""
        return b""

    def end(self, usage: Usage) -> bytes:
        """Nothing."""
        return b""

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> Generated:
        """The answer."""
        (answer,) = answers
        assert answer.finish_reason is not None
        return Generated(
            answer.text,
            self._head.model,
            usage.completion_tokens,
            answer.finish_reason.value,
            usage.prompt_tokens,
            self._head.id,
            self._scenario,
        )
