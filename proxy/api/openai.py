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
from proxy.served_model import ServedModel
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
    model = service.model(body.model)
    return Exchange(lambda client: _chat(client, model, body, arrived))


@router.post("/v1/completions", response_model=None, openapi_extra=documented(CompletionRequest, TextCompletion))
async def completions(request: Request) -> Response:
    """Continue a text."""
    arrived, service = time.perf_counter(), service_of(request)
    body = await decoded(request, CompletionRequest)
    model = service.model(body.model)
    return Exchange(lambda client: _complete(client, model, body, arrived))


async def _chat(client: Client, model: ServedModel, body: ChatRequest, arrived: float) -> None:
    options = _check(body)
    sampling = sampling_of(body, model)
    model.check_context(count_parts(body), None)
    messages, sources = messages_of(body)
    if sources and model.image_token_id is None:
        raise InvalidRequest("This model reads text only; remove the images.", param=sources[0].param)
    model.require(images=bool(sources))
    model.require_task(None)
    with model.dispatcher.admit():
        async with deadline(model, arrived):
            sampling = await _with_grammar(model, body, sampling)
            prompt = await model.encode_chat(messages, template_variables(body))
            model.check_context(len(prompt.token_ids), sampling.max_tokens)
            check_prompt_logprobs(sampling, len(prompt.token_ids))
            images = await model.load_images(sources)
        head = Head.new("chatcmpl", model.name)
        work = Work(
            request_id=head.id,
            model=model.ref,
            prompts=(prompt.token_ids,),
            image_offsets=prompt.image_offsets,
            images=tuple(images),
            sampling=_within_context(model, sampling, len(prompt.token_ids)),
            n=body.n or 1,
            priority=body.priority or 0,
            arrived=arrived,
            timeout_s=model.config.request_timeout,
        )
        wanted = _wanted(model, body, sampling.logprobs)
        await _answer(client, model, body, work, ChatDialect(head, wanted), options)


async def _complete(client: Client, model: ServedModel, body: CompletionRequest, arrived: float) -> None:
    options = _check(body)
    sampling = sampling_of(body, model)
    model.require(images=False)
    model.require_task(None)
    with model.dispatcher.admit():
        async with deadline(model, arrived):
            sampling = await _with_grammar(model, body, sampling)
            prompts = await prompts_of(body, model, sampling.max_tokens)
            for prompt in prompts:
                check_prompt_logprobs(sampling, len(prompt))
            echoes = await _echoes(model, body, prompts)
        head, samples = Head.new("cmpl", model.name), samples_of(body)
        work = Work(
            request_id=head.id,
            model=model.ref,
            prompts=tuple(prompts),
            sampling=sampling,
            n=samples,
            priority=body.priority or 0,
            arrived=arrived,
            timeout_s=model.config.request_timeout,
        )
        wanted = _wanted(model, body, shown_logprobs(body))
        dialect = TextDialect(head, wanted, echoes=echoes, samples=samples, n=body.n or 1)
        await _answer(client, model, body, work, dialect, options)


async def _echoes(model: ServedModel, body: CompletionRequest, prompts: list[tuple[int, ...]]) -> list[Echo]:
    """The prompts as text, when they are to be given back."""
    if not body.echo:
        return []
    with_offsets = shown_logprobs(body) is not None
    return await model.off_loop_if_large(
        sum(map(len, prompts)),
        lambda: [Echo.of(prompt, model.tokenizer, with_offsets=with_offsets) for prompt in prompts],
    )


async def _with_grammar(model: ServedModel, body: SamplingRequest, sampling: SamplingParams) -> SamplingParams:
    asked = grammar_of(body)
    if asked is None:
        return sampling
    await model.check_grammar(*asked)
    return msgspec.structs.replace(sampling, grammar=asked[1])


def _wanted(model: ServedModel, body: SamplingRequest, logprobs: int | None) -> Wanted:
    return Wanted(model.token_texts, _include_usage(body), logprobs, body.prompt_logprobs)


def _check(body: ChatRequest | CompletionRequest) -> TextOptions:
    check_supported(body)
    return text_options_of(body)


def _within_context(model: ServedModel, sampling: SamplingParams, prompt_tokens: int) -> SamplingParams:
    """Bound an open-ended answer by the configured context; workers know only their own."""
    if sampling.max_tokens is not None or model.config.max_model_len is None:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=max(model.config.max_model_len - prompt_tokens, 1))


async def _answer(
    client: Client, model: ServedModel, body: SamplingRequest, work: Work, dialect: Dialect, options: TextOptions
) -> None:
    generation = await model.dispatcher.start(work)
    try:
        teller = Teller(generation, dialect, model.tokenizer, options, with_timings=bool(body.timings))
        if body.stream:
            await teller.tell_stream(client, include_usage=_include_usage(body))
        else:
            await teller.tell_whole(client)
    finally:
        await model.dispatcher.close(generation)


def _include_usage(body: SamplingRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)
