"""`/v1/chat/completions` and `/v1/completions` as OpenAI clients speak them."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from epd.errors import InvalidRequest
from epd.limits import check_prompt_logprobs
from epd.types import SamplingParams
from proxy.answer import TextOptions
from proxy.api import embeddings, operations, score
from proxy.api.http import Client, Exchange
from proxy.api.openai_answer import ChatDialect, Dialect, Head, TextDialect, Wanted
from proxy.api.openai_logprobs import Echo
from proxy.api.openai_prompt import count_parts, messages_of, prompts_of, template_variables
from proxy.api.openai_responses import ChatCompletion, TextCompletion
from proxy.api.openai_sampling import (
    check_supported,
    samples_of,
    sampling_of,
    shown_logprobs,
    text_options_of,
)
from proxy.api.openai_schema import ChatRequest, CompletionRequest, SamplingRequest
from proxy.api.openai_structured import grammar_of
from proxy.api.openai_teller import Teller
from proxy.api.requests import REF, deadline, decoded, documented, service_of
from proxy.service import Service
from proxy.work import Work

router = APIRouter(tags=["OpenAI"])


def schema_components() -> dict[str, Any]:
    """JSON schemas of all bodies, for the OpenAPI document."""
    own = (ChatRequest, CompletionRequest, ChatCompletion, TextCompletion)
    kinds = (*own, *embeddings.DOCUMENTED, *score.DOCUMENTED, *operations.DOCUMENTED)
    _, components = msgspec.json.schema_components(kinds, ref_template=REF)
    return components


@router.post("/v1/chat/completions", response_model=None, openapi_extra=documented(ChatRequest, ChatCompletion))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, which may show pictures."""
    arrived, service = time.perf_counter(), service_of(request)
    body = await decoded(request, ChatRequest)
    return Exchange(lambda client: _chat(client, service, body, arrived))


@router.post("/v1/completions", response_model=None, openapi_extra=documented(CompletionRequest, TextCompletion))
async def completions(request: Request) -> Response:
    """Continue a text."""
    arrived, service = time.perf_counter(), service_of(request)
    body = await decoded(request, CompletionRequest)
    return Exchange(lambda client: _complete(client, service, body, arrived))


async def _chat(client: Client, service: Service, body: ChatRequest, arrived: float) -> None:
    options = _check(service, body)
    sampling = sampling_of(body, service)
    service.check_context(count_parts(body), None)
    messages, sources = messages_of(body)
    if sources and service.image_token_id is None:
        raise InvalidRequest("This model reads text only; remove the images.", param=sources[0].param)
    service.dispatcher.require(images=bool(sources))
    service.require_task(None)
    with service.dispatcher.admit():
        async with deadline(service, arrived):
            sampling = await _with_grammar(service, body, sampling)
            prompt = await service.encode_chat(messages, template_variables(body))
            service.check_context(len(prompt.token_ids), sampling.max_tokens)
            check_prompt_logprobs(sampling, len(prompt.token_ids))
            images = await service.media.load(sources)
        head = Head.new("chatcmpl", service.config.model_name)
        work = Work(
            request_id=head.id,
            prompts=(prompt.token_ids,),
            image_offsets=prompt.image_offsets,
            images=tuple(images),
            sampling=_within_context(service, sampling, len(prompt.token_ids)),
            n=body.n or 1,
            priority=body.priority or 0,
            arrived=arrived,
            timeout_s=service.config.request_timeout,
        )
        wanted = _wanted(service, body, sampling.logprobs)
        await _answer(client, service, body, work, ChatDialect(head, wanted), options)


async def _complete(client: Client, service: Service, body: CompletionRequest, arrived: float) -> None:
    options = _check(service, body)
    sampling = sampling_of(body, service)
    service.dispatcher.require(images=False)
    service.require_task(None)
    with service.dispatcher.admit():
        async with deadline(service, arrived):
            sampling = await _with_grammar(service, body, sampling)
            prompts = await prompts_of(body, service, sampling.max_tokens)
            for prompt in prompts:
                check_prompt_logprobs(sampling, len(prompt))
            echoes = await _echoes(service, body, prompts)
        head, samples = Head.new("cmpl", service.config.model_name), samples_of(body)
        work = Work(
            request_id=head.id,
            prompts=tuple(prompts),
            sampling=sampling,
            n=samples,
            priority=body.priority or 0,
            arrived=arrived,
            timeout_s=service.config.request_timeout,
        )
        wanted = _wanted(service, body, shown_logprobs(body))
        dialect = TextDialect(head, wanted, echoes=echoes, samples=samples, n=body.n or 1)
        await _answer(client, service, body, work, dialect, options)


async def _echoes(service: Service, body: CompletionRequest, prompts: list[tuple[int, ...]]) -> list[Echo]:
    """The prompts as text, when they are to be given back."""
    if not body.echo:
        return []
    with_offsets = shown_logprobs(body) is not None
    return await service.off_loop_if_large(
        sum(map(len, prompts)),
        lambda: [Echo.of(prompt, service.tokenizer, with_offsets=with_offsets) for prompt in prompts],
    )


async def _with_grammar(service: Service, body: SamplingRequest, sampling: SamplingParams) -> SamplingParams:
    asked = grammar_of(body)
    if asked is None:
        return sampling
    await service.check_grammar(*asked)
    return msgspec.structs.replace(sampling, grammar=asked[1])


def _wanted(service: Service, body: SamplingRequest, logprobs: int | None) -> Wanted:
    return Wanted(service.token_texts, _include_usage(body), logprobs, body.prompt_logprobs)


def _check(service: Service, body: ChatRequest | CompletionRequest) -> TextOptions:
    service.require_model(body.model)
    check_supported(body)
    return text_options_of(body)


def _within_context(service: Service, sampling: SamplingParams, prompt_tokens: int) -> SamplingParams:
    """Bound an open-ended answer by the configured context; workers know only their own."""
    if sampling.max_tokens is not None or service.config.max_model_len is None:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=max(service.config.max_model_len - prompt_tokens, 1))


async def _answer(
    client: Client, service: Service, body: SamplingRequest, work: Work, dialect: Dialect, options: TextOptions
) -> None:
    generation = await service.dispatcher.start(work)
    try:
        teller = Teller(generation, dialect, service.tokenizer, options, with_timings=bool(body.timings))
        if body.stream:
            await teller.tell_stream(client, include_usage=_include_usage(body))
        else:
            await teller.tell_whole(client)
    finally:
        await service.dispatcher.close(generation)


def _include_usage(body: SamplingRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)
