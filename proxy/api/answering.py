"""From a checked body to the told answer: what all endpoints that generate text go through.

Endpoints of other dialects translate their bodies into those of OpenAI, or into a `Work`, and bring a `Dialect` of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from epd.errors import InvalidRequest
from epd.limits import check_prompt_logprobs
from epd.types import SamplingParams
from proxy.api.dialect import Dialect, Head
from proxy.api.http import Client
from proxy.api.openai.answer import ChatDialect, TextDialect, UsageSoFar, Wanted
from proxy.api.openai.length import cut_chat, cut_of, with_special_tokens
from proxy.api.openai.logprobs import Echo
from proxy.api.openai.prompt import count_parts, echoed_text, ending_of, messages_of, prompts_of, template_variables
from proxy.api.openai.sampling import (
    check_answers,
    check_supported,
    samples_of,
    sampling_of,
    shown_logprobs,
    text_options_of,
)
from proxy.api.openai.schema import ChatRequest, CompletionRequest, SamplingRequest
from proxy.api.openai.structured import grammar_of
from proxy.api.openai.tools import ToolSide, tool_side_of
from proxy.api.requests import in_time
from proxy.api.teller import AtEnd, Teller
from proxy.dispatch.work import Work
from proxy.media.loader import LoadedImage
from proxy.models.served_model import ServedModel
from proxy.text.answer import Answer, TextOptions
from proxy.text.chat_template import Prompt
from proxy.text.user_text import Message

_NO_TOOLS = ToolSide()


async def answer_chat(
    client: Client,
    model: ServedModel,
    body: ChatRequest,
    arrived: float,
    dialect_of: Callable[[Head, Wanted], Dialect] = ChatDialect,
    id_prefix: str = "chatcmpl",
    fits_context: bool = False,
) -> Sequence[Answer]:
    """Answer a conversation.

    Args:
        client: to be answered.
        model: that `body` means.
        body: of the request.
        arrived: `time.perf_counter()` when it came.
        dialect_of: makes what words the answer.
        id_prefix: of the answer's id.
        fits_context: a limit of tokens that do not fit into the context is as good as none.

    Returns:
        The samples as they were told.

    Raises:
        EPDError: nothing was told.
    """
    check_supported(body)
    options, sampling = text_options_of(body, model), sampling_of(body, model)
    if fits_context:
        sampling = msgspec.structs.replace(sampling, fits_context=True)
    model.check_context(count_parts(body), None)
    messages, sources = messages_of(body, has_short_ids=model.has_short_call_ids)
    if sources and model.image_token_id is None:
        raise InvalidRequest("This model reads text only; remove the images.", param=sources[0].param)
    model.require(images=bool(sources))
    with model.dispatcher.admit():

        async def prepare() -> tuple[ToolSide, SamplingParams, Prompt, list[LoadedImage]]:
            side = await tool_side_of(body, model)
            formed = await _with_form(model, body, side, sampling)
            prompt = await _chat_prompt(model, body, messages, side, formed.max_tokens)
            model.check_context(len(prompt.token_ids), None if fits_context else formed.max_tokens)
            check_prompt_logprobs(formed, len(prompt.token_ids))
            return side, formed, prompt, await model.load_images(sources)

        side, sampling, prompt, images = await in_time(model, arrived, prepare())
        head, counts = Head.new(id_prefix, model.name, model.ref.fingerprint), UsageSoFar()
        sampling = _within_context(model, sampling, len(prompt.token_ids))
        offsets, n = prompt.image_offsets, body.n or 1
        work = work_of(model, body, head, arrived, sampling, [prompt.token_ids], offsets, images, n=n)
        wanted = _wanted(model, body, work, sampling.logprobs, counts, echoed_text(body), side)
        dialect = dialect_of(head, wanted)
        if side.calls is not None:
            options = msgspec.structs.replace(options, calls=side.calls)
        return await tell(
            client,
            model,
            work,
            dialect,
            options,
            stream=bool(body.stream),
            with_timings=bool(body.timings),
            counts=counts,
        )


async def answer_text(client: Client, model: ServedModel, body: CompletionRequest, arrived: float) -> Sequence[Answer]:
    """Continue texts. Arguments, result and errors are those of `answer_chat`."""
    check_supported(body)
    options, sampling = text_options_of(body, model), sampling_of(body, model)
    model.require()
    with model.dispatcher.admit():

        async def prepare() -> tuple[SamplingParams, list[tuple[int, ...]], list[Echo]]:
            formed = await with_grammar(model, body, sampling)
            prompts = await prompts_of(body, model, formed.max_tokens)
            check_answers(len(prompts), samples_of(body))
            for prompt in prompts:
                check_prompt_logprobs(formed, len(prompt))
            return formed, prompts, await _echoes(model, body, prompts)

        sampling, prompts, echoes = await in_time(model, arrived, prepare())
        head, samples, counts = Head.new("cmpl", model.name, model.ref.fingerprint), samples_of(body), UsageSoFar()
        work = work_of(model, body, head, arrived, sampling, prompts, n=samples)
        wanted = _wanted(model, body, work, shown_logprobs(body), counts)
        dialect = TextDialect(head, wanted, echoes=echoes, samples=samples, n=body.n or 1)
        return await tell(
            client,
            model,
            work,
            dialect,
            options,
            stream=bool(body.stream),
            with_timings=bool(body.timings),
            counts=counts,
        )


def work_of(
    model: ServedModel,
    body: SamplingRequest,
    head: Head,
    arrived: float,
    sampling: SamplingParams,
    prompts: Sequence[tuple[int, ...]],
    image_offsets: Sequence[int] = (),
    images: Sequence[LoadedImage] = (),
    *,
    n: int = 1,
) -> Work:
    """What a request asks of the workers. Arguments are those of `Work`, or where it finds them."""
    return Work(
        request_id=head.id,
        model=model.ref,
        prompts=tuple(prompts),
        image_offsets=tuple(image_offsets),
        images=tuple(images),
        sampling=sampling,
        n=n,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        arrived=arrived,
        timeout_s=model.config.request_timeout,
    )


async def tell(
    client: Client,
    model: ServedModel,
    work: Work,
    dialect: Dialect,
    options: TextOptions,
    *,
    stream: bool,
    with_timings: bool = False,
    counts: UsageSoFar | None = None,
    at_end: AtEnd | None = None,
) -> Sequence[Answer]:
    """Hand work to the workers and tell the client what comes. The caller holds a place among the requests in work.

    Args:
        client: to be answered.
        model: that the work is for.
        work: to be done.
        dialect: words the answer.
        options: how text is made of tokens.
        stream: tell as it comes.
        with_timings: tell where the time went.
        counts: by which the dialect can ask for token counts under way.
        at_end: see `Teller`.

    Returns:
        The samples as they were told.

    Raises:
        EPDError: nothing was told.
    """
    generation = await model.dispatcher.start(work)
    try:
        teller = Teller(generation, dialect, model.tokenizer, options, with_timings=with_timings, at_end=at_end)
        if counts is not None:
            counts.count = teller.usage
        return await teller.tell(client, stream=stream)
    finally:
        if counts is not None:
            counts.count = None
        await model.dispatcher.close(generation)


async def _chat_prompt(
    model: ServedModel, body: ChatRequest, messages: Sequence[Message], side: ToolSide, max_tokens: int | None
) -> Prompt:
    prompt = await model.encode_chat(messages, template_variables(body), ending_of(body), side.tools)
    if body.add_special_tokens:
        prompt = with_special_tokens(prompt, model.tokenizer)
    return cut_chat(prompt, cut_of(body, model, max_tokens))


async def prompt_alone(model: ServedModel, body: ChatRequest, max_tokens: int | None = None) -> Prompt:
    """The prompt that `answer_chat` would make, for endpoints that do something else with it.

    Raises:
        InvalidRequest, ContextLengthExceeded: as from `answer_chat`.
    """
    check_supported(body)
    model.check_context(count_parts(body), max_tokens)
    messages, sources = messages_of(body, has_short_ids=model.has_short_call_ids)
    if sources and model.image_token_id is None:
        raise InvalidRequest("This model reads text only; remove the images.", param=sources[0].param)
    return await _chat_prompt(model, body, messages, await tool_side_of(body, model), max_tokens)


async def _echoes(model: ServedModel, body: CompletionRequest, prompts: list[tuple[int, ...]]) -> list[Echo]:
    """The prompts as text, when they are to be given back."""
    if not body.echo:
        return []
    with_offsets = shown_logprobs(body) is not None
    return await model.off_loop_if_large(
        sum(map(len, prompts)),
        lambda: [Echo.of(prompt, model.tokenizer, with_offsets=with_offsets) for prompt in prompts],
    )


async def _with_form(model: ServedModel, body: ChatRequest, side: ToolSide, sampling: SamplingParams) -> SamplingParams:
    """With the grammar of tool calls, which has that of `response_format` in it where both may come."""
    if side.enforced is not None:
        return msgspec.structs.replace(sampling, grammar=side.enforced.grammar)
    return await with_grammar(model, body, sampling)


async def with_grammar(model: ServedModel, body: SamplingRequest, sampling: SamplingParams) -> SamplingParams:
    """Sampling parameters with what the answer must look like.

    Raises:
        InvalidRequest: workers can't follow it.
    """
    asked = grammar_of(body)
    if asked is None:
        return sampling
    await model.check_grammar(*asked)
    return msgspec.structs.replace(sampling, grammar=asked[1])


def _wanted(
    model: ServedModel,
    body: SamplingRequest,
    work: Work,
    logprobs: int | None,
    counts: UsageSoFar,
    begun: str = "",
    side: ToolSide = _NO_TOOLS,
) -> Wanted:
    options = body.stream_options
    has_usage = bool(options and options.include_usage)
    counts_along = has_usage and options is not None and bool(options.continuous_usage_stats)
    return Wanted(
        model.token_texts,
        has_usage,
        logprobs,
        body.prompt_logprobs,
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        prompt_token_ids=work.prompts if body.return_token_ids else (),
        begun=begun,
        function_call=side.is_deprecated,
        names_once=side.is_strict,
        usage_so_far=counts if counts_along else None,
    )


def _within_context(model: ServedModel, sampling: SamplingParams, prompt_tokens: int) -> SamplingParams:
    """Bound an open-ended answer by the configured context; workers know only their own."""
    limit, asked = model.config.max_model_len, sampling.max_tokens
    if limit is None or (asked is not None and not sampling.fits_context):
        return sampling
    left = max(limit - prompt_tokens, 1)
    return msgspec.structs.replace(sampling, max_tokens=left if asked is None else min(asked, left))
