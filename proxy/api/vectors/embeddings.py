"""`/v1/embeddings` as OpenAI clients speak it, and `/pooling`, which is the same in the words of vLLM."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from itertools import starmap
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from msgspec import Meta, Raw, Struct
from starlette.responses import Response

from epd.errors import InvalidRequest
from epd.types import Pooling, PoolingKind, WorkerTask
from proxy.api.answering import prompt_alone
from proxy.api.dialect import Head
from proxy.api.http import Client
from proxy.api.openai.length import cut_of
from proxy.api.openai.prompt import token_prompts
from proxy.api.openai.schema import ChatMessage, ChatRequest
from proxy.api.requests import Deadline, documented, exchange
from proxy.api.vectors.common import MAX_INPUTS, Vectors, VectorUsage, one_by_one, pooled
from proxy.models.served_model import ServedModel

router = APIRouter()

_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class EmbeddingRequest(Struct, kw_only=True):
    """`POST /v1/embeddings`."""

    input: Annotated[
        str | list[str | _TokenId | list[_TokenId]] | None,
        Meta(description="a text, several texts, token ids, or several lists of token ids of this model"),
    ] = None
    messages: Annotated[
        list[ChatMessage] | None, Meta(description="in place of input: a conversation, of which one vector is made")
    ] = None
    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None, Meta(description="base64: little-endian 32-bit floats")
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="only the first so many, rescaled; of models that were trained for it"),
    ] = None
    pooling: Annotated[
        Literal["last", "mean"] | None,
        Meta(description="of the tokens' final states; default: what the checkpoint says, else last"),
    ] = None
    normalize: Annotated[bool | None, Meta(description="scale to length 1; default: true")] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1)] | None, Meta(description="cut longer inputs to so many tokens; -1: to the context")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, Meta(description="where they are cut; default: right, the end")
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="put the tokenizer's own tokens around each text; default: true, of messages false"),
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="of messages: end with the header of an answer; default: false")
    ] = None
    continue_final_message: Annotated[bool | None, Meta(description="of messages: leave the last one open")] = None
    chat_template: str | None = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="of messages: switches of the chat template")
    ] = None
    priority: Annotated[_Int64 | None, Meta(description="smaller goes first; default 0")] = None


class Embedding(Struct):
    """The vector of one text."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingList(Struct):
    """Answer of `POST /v1/embeddings`, in the order of the inputs."""

    data: list[Embedding]
    model: str
    usage: VectorUsage
    object: str = "list"


class Pooled(Struct):
    """What the model makes of one text: its vector, or of a reward model its score."""

    index: int
    data: list[float] | str
    object: str = "pooling"


class PooledList(Struct):
    """Answer of `POST /pooling`."""

    id: str
    created: int
    model: str
    data: list[Pooled]
    usage: VectorUsage
    object: str = "list"


DOCUMENTED = (EmbeddingRequest, EmbeddingList, PooledList)


@router.post(
    "/v1/embeddings", tags=["OpenAI"], response_model=None, openapi_extra=documented(EmbeddingRequest, EmbeddingList)
)
async def embeddings(request: Request) -> Response:
    """Vectors of texts, by an embedding model or from the last layer of a generating one."""
    return await exchange(request, EmbeddingRequest, _embed)


@router.post("/pooling", tags=["vLLM"], response_model=None, openapi_extra=documented(EmbeddingRequest, PooledList))
async def pooling(request: Request) -> Response:
    """What `/v1/embeddings` gives, or a reward model's score of each text, in a list of one number."""
    return await exchange(request, EmbeddingRequest, _pool)


async def _embed(client: Client, model: ServedModel, body: EmbeddingRequest, arrived: float) -> None:
    found = await _vectors(model, body, _pooling(model, body), Head.new("embd", "").id, arrived)
    words = await one_by_one(found.values, lambda vector: _encoded(vector, body.encoding_format))
    answers = list(starmap(Embedding, enumerate(words)))
    await client.reply(EmbeddingList(answers, model.name, VectorUsage.of(found.prompt_tokens)))


async def _pool(client: Client, model: ServedModel, body: EmbeddingRequest, arrived: float) -> None:
    head = Head.new("pool", model.name)
    is_score = model.task is WorkerTask.SCORE
    found = await _vectors(
        model, body, Pooling(PoolingKind.SCORE) if is_score else _pooling(model, body), head.id, arrived
    )
    words = await one_by_one(found.values, lambda vector: _encoded(vector, body.encoding_format))
    data = list(starmap(Pooled, enumerate(words)))
    await client.reply(PooledList(head.id, head.created, head.model, data, VectorUsage.of(found.prompt_tokens)))


def _pooling(model: ServedModel, body: EmbeddingRequest) -> Pooling:
    kind = PoolingKind(body.pooling) if body.pooling else default_pooling(model)
    # What is cut short is rescaled here, if at all.
    return Pooling(kind, normalize=body.normalize is not False and body.dimensions is None)


async def _vectors(
    model: ServedModel, body: EmbeddingRequest, pooling: Pooling, request_id: str, arrived: float
) -> Vectors:
    """Of each text, or of the conversation, as long as the request wants them."""
    if (body.input is None) == (body.messages is None):
        raise InvalidRequest("Send either input or messages.", param="input")
    _check_dimensions(model, body)
    model.require(pooling=pooling)
    with model.dispatcher.admit():
        with Deadline(model, arrived):
            prompts = await _prompts(model, body)
        found = await pooled(model, request_id, prompts, pooling, arrived, body.priority or 0)
    return Vectors(await one_by_one(found.values, lambda vector: tuple(_cut(vector, body))), found.prompt_tokens)


async def _prompts(model: ServedModel, body: EmbeddingRequest) -> list[tuple[int, ...]]:
    if body.input is not None:
        return await token_prompts(
            body.input,
            model,
            field="input",
            limit=MAX_INPUTS,
            completion=0,
            cut=cut_of(body, model, 0, side="right"),
            add_special_tokens=body.add_special_tokens is not False,
        )
    is_cut = body.truncate_prompt_tokens is not None
    chat = ChatRequest(
        messages=body.messages or [],
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=bool(body.add_generation_prompt),
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        truncation_side=(body.truncation_side or "right") if is_cut else body.truncation_side,
    )
    prompt = await prompt_alone(model, chat, 0)
    if prompt.image_offsets:
        raise InvalidRequest("messages: vectors are made of texts here; remove the images.", param="messages")
    model.check_context(len(prompt.token_ids), 0)
    return [prompt.token_ids]


def default_pooling(model: ServedModel) -> PoolingKind:
    """What the checkpoint was trained with, as sentence-transformers writes it down; else the last token.

    Raises:
        InvalidRequest: it is a kind that there is not here.
    """
    config = model.pooling_config
    if config.get("pooling_mode_lasttoken", not config):
        return PoolingKind.LAST
    if config.get("pooling_mode_mean_tokens"):
        return PoolingKind.MEAN
    asked = ", ".join(name for name, value in config.items() if value is True)
    raise InvalidRequest(f"This model pools by {asked}, which is not supported; set pooling to last or mean.")


def _check_dimensions(model: ServedModel, body: EmbeddingRequest) -> None:
    if body.dimensions is None:
        return
    allowed = model.model_config.get("matryoshka_dimensions")
    if not model.model_config.get("is_matryoshka") and not allowed:
        raise InvalidRequest(
            "dimensions: this model's vectors mean nothing when cut short; leave it out.", param="dimensions"
        )
    if allowed and body.dimensions not in allowed:
        raise InvalidRequest(f"dimensions: this model was trained for {allowed}.", param="dimensions")


def _cut(vector: Sequence[float], body: EmbeddingRequest) -> Sequence[float]:
    if body.dimensions is None:
        return vector
    if body.dimensions > len(vector):
        raise InvalidRequest(f"dimensions: this model's vectors have {len(vector)}.", param="dimensions")
    short = vector[: body.dimensions]
    length = math.hypot(*short)
    return [value / length for value in short] if length and body.normalize is not False else short


def _encoded(vector: Sequence[float], encoding: str | None) -> Any:
    """As it stands in the answer: text, or JSON already."""
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return Raw(msgspec.json.encode(vector))
