"""From a raw prompt with its pictures to the told answer: what `/generate` does in all dialects without sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from epd.errors import EPDError, InvalidRequest
from epd.types import Grammar, SamplingParams
from proxy.api.answering import tell
from proxy.api.dialect import Dialect
from proxy.api.http import Client
from proxy.api.lightllm.raw_prompt import raw_prompt
from proxy.api.requests import Deadline
from proxy.dispatch.work import Work
from proxy.media.loader import ImageSource
from proxy.models.served_model import ServedModel
from proxy.text.answer import TextOptions
from proxy.text.chat_template import Prompt


@dataclass(frozen=True, kw_only=True)
class RawRequest:
    """A prompt that no template has made, and what is wanted of it. Names of fields are for errors."""

    id: str
    inputs: str | Sequence[int]
    field: str
    sources: Sequence[ImageSource]
    images_field: str
    sampling: SamplingParams
    options: TextOptions
    grammar: tuple[str, Grammar] | None = None
    """The field that asks for it, and the form of the answer."""
    n: int = 1
    add_special_tokens: bool = True
    keep_last: int | None = None
    """Tokens of the prompt to keep: those before are cut off. None: all."""
    keep_last_field: str = ""


async def answer_raw(
    client: Client, model: ServedModel, raw: RawRequest, dialect: Dialect, arrived: float, *, stream: bool
) -> None:
    """Answer it.

    Args:
        client: to be answered.
        model: that does it.
        raw: prompt and wishes.
        dialect: words the answer.
        arrived: `time.perf_counter()` when it came.
        stream: tell as it comes.

    Raises:
        EPDError: nothing was told.
    """
    try:
        await _answer(client, model, raw, dialect, arrived, stream=stream)
    except EPDError as error:
        if error.param == "messages":  # as parts that all dialects share call it
            error.param = raw.images_field if error.code == "request_too_large" else raw.field
        raise


async def _answer(
    client: Client, model: ServedModel, raw: RawRequest, dialect: Dialect, arrived: float, *, stream: bool
) -> None:
    model.require(images=bool(raw.sources))
    with model.dispatcher.admit():
        with Deadline(model, arrived):
            sampling = raw.sampling
            if raw.grammar is not None:
                await model.check_grammar(*raw.grammar)
                sampling = msgspec.structs.replace(sampling, grammar=raw.grammar[1])
            prompt = _cut(
                await raw_prompt(
                    model, raw.inputs, len(raw.sources), field=raw.field, add_special_tokens=raw.add_special_tokens
                ),
                raw,
            )
            model.check_context(len(prompt.token_ids), sampling.max_tokens)
            images = await model.load_images(raw.sources)
        work = Work(
            request_id=raw.id,
            model=model.ref,
            prompts=(prompt.token_ids,),
            image_offsets=prompt.image_offsets,
            images=tuple(images),
            sampling=sampling,
            n=raw.n,
            arrived=arrived,
            timeout_s=model.config.request_timeout,
        )
        await tell(client, model, work, dialect, raw.options, stream=stream)


def _cut(prompt: Prompt, raw: RawRequest) -> Prompt:
    if raw.keep_last is None or raw.keep_last >= len(prompt.token_ids):
        return prompt
    if raw.sources:
        raise InvalidRequest(
            f"{raw.keep_last_field} does not go with images; their markers could be cut off.",
            param=raw.keep_last_field,
        )
    return Prompt(prompt.token_ids[-raw.keep_last :], ())
