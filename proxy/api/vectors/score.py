"""Scores of texts by a reward model, in the dialects of vLLM (`/v1/score`, `/v1/rerank`) and LightLLM (`/get_score`).

The score that an embedding model gives a pair is the cosine of their vectors. A generating model gives none at all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from msgspec import Meta, Struct
from starlette.responses import Response

from epd.errors import InvalidRequest
from epd.types import Pooling, PoolingKind, WorkerTask
from proxy.api.dialect import Head
from proxy.api.http import Client, Exchange
from proxy.api.lightllm.errors import use_native_errors
from proxy.api.openai.length import cut_of
from proxy.api.openai.prompt import naming, token_prompts
from proxy.api.requests import Deadline, decoded, documented, exchange, service_of
from proxy.api.vectors.common import MAX_INPUTS, Vectors, VectorUsage, one_by_one, pooled
from proxy.api.vectors.embeddings import default_pooling
from proxy.models.served_model import ServedModel
from proxy.text.cutting import Cut

router = APIRouter()

_SCORE = Pooling(PoolingKind.SCORE)
_Texts = str | list[str]
Truncation = Annotated[
    Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None,
    Meta(description="cut longer texts, or pairs, to so many tokens; -1: to the context"),
]
Side = Annotated[Literal["left", "right"] | None, Meta(description="where they are cut; default: right, the end")]
Priority = Annotated[
    Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None, Meta(description="smaller goes first; default 0")
]


class ScoreRequest(Struct, kw_only=True):
    """`POST /v1/score`: one text with many, or each with its partner."""

    text_1: _Texts
    text_2: _Texts
    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None
    truncate_prompt_tokens: Truncation = None
    truncation_side: Side = None
    priority: Priority = None


class Score(Struct):
    """Of one pair."""

    index: int
    score: float
    object: str = "score"


class ScoreList(Struct):
    """Answer of `POST /v1/score`."""

    id: str
    created: int
    model: str
    data: list[Score]
    usage: VectorUsage
    object: str = "list"


class Document(Struct):
    """A text to rank."""

    text: Annotated[str, Meta(min_length=1)]


class RerankRequest(Struct, kw_only=True):
    """`POST /v1/rerank`."""

    query: Annotated[str, Meta(min_length=1)]
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[Annotated[int, Meta(ge=0)] | None, Meta(description="how many to give; 0: all")] = None
    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None
    truncate_prompt_tokens: Truncation = None
    truncation_side: Side = None
    priority: Priority = None


class Ranked(Struct):
    """A document and its place in the request."""

    index: int
    document: Document
    relevance_score: float


class Ranking(Struct):
    """Answer of `POST /v1/rerank`, the best first."""

    id: str
    model: str
    usage: VectorUsage
    results: list[Ranked]


class RewardRequest(Struct, kw_only=True):
    """`POST /get_score`."""

    chat: Annotated[str, Meta(description="a conversation as its template has rendered it", min_length=1)]
    parameters: Annotated[Any, Meta(description="of generation; they have no effect on a score")] = None
    multimodal_params: Any = None


class Reward(Struct):
    """Answer of `POST /get_score`."""

    score: float
    prompt_tokens: int
    finish_reason: str = "stop"


DOCUMENTED = (ScoreRequest, ScoreList, RerankRequest, Ranking, RewardRequest, Reward)


@router.post("/score", tags=["vLLM"], response_model=None, include_in_schema=False)
@router.post("/v1/score", tags=["vLLM"], response_model=None, openapi_extra=documented(ScoreRequest, ScoreList))
async def score(request: Request) -> Response:
    """How well pairs of texts go together, as the model sees it."""
    return await exchange(request, ScoreRequest, _score)


@router.post("/rerank", tags=["vLLM"], response_model=None, include_in_schema=False)
@router.post("/v2/rerank", tags=["vLLM"], response_model=None, include_in_schema=False)
@router.post("/v1/rerank", tags=["vLLM"], response_model=None, openapi_extra=documented(RerankRequest, Ranking))
async def rerank(request: Request) -> Response:
    """Documents in the order of their scores with a query."""
    return await exchange(request, RerankRequest, _rerank)


@router.post("/get_score", tags=["LightLLM"], response_model=None, openapi_extra=documented(RewardRequest, Reward))
async def get_score(request: Request) -> Response:
    """The reward of one conversation."""
    arrived, service = time.perf_counter(), service_of(request)
    use_native_errors(request)
    body = await decoded(request, RewardRequest)
    model = service.default_model()
    return Exchange(lambda client: _get_score(client, model, body, arrived))


async def _score(client: Client, model: ServedModel, body: ScoreRequest, arrived: float) -> None:
    head = Head.new("score", model.name)
    found = await _scores(_Job.of(model, body, head.id, "text_2", arrived), _pairs(body))
    data = [Score(index, value) for index, (value, *_) in enumerate(found.values)]
    await client.reply(ScoreList(head.id, head.created, head.model, data, VectorUsage.of(found.prompt_tokens)))


async def _rerank(client: Client, model: ServedModel, body: RerankRequest, arrived: float) -> None:
    head = Head.new("rerank", model.name)
    documents = [one if isinstance(one, Document) else Document(one) for one in body.documents]
    if not all(one.text for one in documents):
        raise InvalidRequest("documents: one of them is empty.", param="documents")
    pairs = [(body.query, one.text) for one in documents]
    found = await _scores(_Job.of(model, body, head.id, "documents", arrived), pairs)
    results = [Ranked(index, documents[index], value) for index, (value, *_) in enumerate(found.values)]
    results.sort(key=lambda one: -one.relevance_score)  # stable: equals stay in the order of the request
    shown = results[: body.top_n or None]
    await client.reply(Ranking(head.id, head.model, VectorUsage.of(found.prompt_tokens), shown))


@dataclass(frozen=True)
class _Job:
    """What is the same for all pairs of a request."""

    model: ServedModel
    request_id: str
    field: str
    """To blame for a text that is too long."""
    arrived: float
    cut: Cut | None
    priority: int

    @classmethod
    def of(
        cls, model: ServedModel, body: ScoreRequest | RerankRequest, request_id: str, field: str, arrived: float
    ) -> _Job:
        cut = cut_of(body, model, 0, side="right")
        return cls(model, request_id, field, arrived, cut, body.priority or 0)

    async def pooled(self, prompts: Sequence[tuple[int, ...]], pooling: Pooling) -> Vectors:
        return await pooled(self.model, self.request_id, prompts, pooling, self.arrived, self.priority)


async def _scores(job: _Job, pairs: Sequence[tuple[str, str]]) -> Vectors:
    """One number for each pair, in whichever way the model has."""
    model = job.model
    is_embedding = model.task is WorkerTask.EMBED
    model.require(pooling=Pooling(default_pooling(model)) if is_embedding else _SCORE)
    with model.dispatcher.admit():
        return await (_cosines if is_embedding else _rewards)(job, pairs)


async def _get_score(client: Client, model: ServedModel, body: RewardRequest, arrived: float) -> None:
    if isinstance(body.multimodal_params, dict) and any(body.multimodal_params.values()):
        raise InvalidRequest("multimodal_params: reward models here read text only.", param="multimodal_params")
    model.require(pooling=_SCORE)
    with model.dispatcher.admit():
        with Deadline(model, arrived), naming("chat"):
            # The template has put all special tokens there already.
            prompt = tuple(await model.encode_text(body.chat, add_special_tokens=False))
            model.check_context(len(prompt), 0)
        found = await pooled(model, Head.new("reward", "").id, [prompt], _SCORE, arrived)
    await client.reply(Reward(found.values[0][0], found.prompt_tokens))


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    first, second = _listed(body.text_1), _listed(body.text_2)
    if max(len(first), len(second)) > MAX_INPUTS:
        raise InvalidRequest(f"{max(len(first), len(second))} pairs; at most {MAX_INPUTS}.", param="text_2")
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        counts = f"text_1 has {len(first)} texts and text_2 {len(second)}"
        raise InvalidRequest(f"{counts}; want one, or as many.", param="text_1")
    for field, texts in (("text_1", first), ("text_2", second)):
        if not texts or not all(texts):
            raise InvalidRequest(f"{field} is empty, or one of its texts is.", param=field)
    return list(zip(first, second, strict=True))


def _listed(texts: _Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


async def _rewards(job: _Job, pairs: Sequence[tuple[str, str]]) -> Vectors:
    """Each pair is one sequence, joined as the tokenizer joins pairs."""
    among = sum(len(first) + len(second) for first, second in pairs)
    with Deadline(job.model, job.arrived), naming(job.field):
        prompts = [await _joined(job, *pair, among) for pair in pairs]
    return await job.pooled(prompts, _SCORE)


async def _joined(job: _Job, first: str, second: str, among: int) -> tuple[int, ...]:
    """Tokens of a pair; where it is cut, the tokenizer's own at its ends stay."""
    model, cut = job.model, job.cut
    if cut is not None:
        longest = model.tokenizer.longest_token
        first, second = cut.of_text(first, longest), cut.of_text(second, longest)
    token_ids = await model.encode_pair(first, second, among=among)
    if cut is not None:
        token_ids = cut.of_tokens(token_ids, *map(len, model.tokenizer.around))
    model.check_context(len(token_ids), 0)
    return tuple(token_ids)


async def _cosines(job: _Job, pairs: Sequence[tuple[str, str]]) -> Vectors:
    """A text that stands in several pairs is computed once."""
    model = job.model
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    with Deadline(model, job.arrived):
        prompts = await token_prompts(list(texts), model, field=job.field, limit=len(texts), completion=0, cut=job.cut)
    found = await job.pooled(prompts, Pooling(default_pooling(model)))
    vectors = dict(zip(texts, found.values, strict=True))

    def cosine(pair: tuple[str, str]) -> tuple[float]:
        return (sum(a * b for a, b in zip(vectors[pair[0]], vectors[pair[1]], strict=True)),)

    return Vectors(list(await one_by_one(pairs, cosine)), found.prompt_tokens)
