"""`/v1/embeddings` as OpenAI clients speak it."""

from __future__ import annotations

import base64
import math
import struct
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from msgspec import Meta, Struct
from starlette.responses import Response

from epd.errors import InvalidRequest
from epd.types import Pooling, PoolingKind
from proxy.api.dialect import Head
from proxy.api.http import Client, Exchange
from proxy.api.openai_length import cut_of
from proxy.api.openai_prompt import token_prompts
from proxy.api.requests import deadline, decoded, documented, service_of
from proxy.api.vectors import MAX_INPUTS, VectorUsage, pooled
from proxy.served_model import ServedModel

router = APIRouter(tags=["OpenAI"])

_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class EmbeddingRequest(Struct, kw_only=True):
    """`POST /v1/embeddings`."""

    input: Annotated[
        str | list[str | _TokenId | list[_TokenId]],
        Meta(description="a text, several texts, token ids, or several lists of token ids of this model"),
    ]
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
        bool | None, Meta(description="put the tokenizer's own tokens around each text; default: true")
    ] = None
    messages: Any = None

    def unsupported(self) -> dict[str, bool]:
        """Field → whether the request uses it in a way that can't be served."""
        return {"messages": self.messages is not None}


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


DOCUMENTED = (EmbeddingRequest, EmbeddingList)


@router.post("/v1/embeddings", response_model=None, openapi_extra=documented(EmbeddingRequest, EmbeddingList))
async def embeddings(request: Request) -> Response:
    """Vectors of texts, by an embedding model or from the last layer of a generating one."""
    arrived, service = time.perf_counter(), service_of(request)
    body = await decoded(request, EmbeddingRequest)
    model = service.model(body.model)
    return Exchange(lambda client: _embed(client, model, body, arrived))


async def _embed(client: Client, model: ServedModel, body: EmbeddingRequest, arrived: float) -> None:
    for field, is_used in body.unsupported().items():
        if is_used:
            raise InvalidRequest(f"{field} is not supported by this server with this value; leave it out.", param=field)
    _check_dimensions(model, body)
    kind = PoolingKind(body.pooling) if body.pooling else default_pooling(model)
    # What is cut short is rescaled here, if at all.
    pooling = Pooling(kind, normalize=body.normalize is not False and body.dimensions is None)
    model.require(images=False)
    model.require_task(pooling)
    with model.dispatcher.admit():
        async with deadline(model, arrived):
            prompts = await token_prompts(
                body.input,
                model,
                field="input",
                limit=MAX_INPUTS,
                completion=0,
                cut=cut_of(body, model, 0, side="right"),
                add_special_tokens=body.add_special_tokens is not False,
            )
        vectors = await pooled(model, Head.new("embd", "").id, prompts, pooling, arrived)
    answers = [
        Embedding(index, _encoded(_cut(vector, body), body.encoding_format))
        for index, vector in enumerate(vectors.values)
    ]
    await client.reply(EmbeddingList(answers, model.name, VectorUsage.of(vectors.prompt_tokens)))


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


def _encoded(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
