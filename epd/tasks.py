"""Which requests a cluster answers, by what its prefill-decode workers were started for."""

from __future__ import annotations

from epd.errors import InvalidRequest
from epd.types import Pooling, PoolingKind, WorkerTask

_ENDPOINTS = {
    WorkerTask.GENERATE: "gives tokens, and embeddings by /v1/embeddings",
    WorkerTask.SCORE: "gives scores, by /v1/score and /get_score",
    WorkerTask.EMBED: "gives embeddings, by /v1/embeddings and /v1/score",
}


def check_task(task: WorkerTask, pooling: Pooling | None) -> None:
    """Refuse a request that a worker with `task` has no answer to, rather than invent one.

    Raises:
        InvalidRequest: says what the model is served for, and which workers could answer.
    """
    if task.takes(pooling):
        return
    if pooling is None:
        wanted = "to generate, prefill-decode workers need --task generate"
    elif pooling.kind is PoolingKind.SCORE:
        wanted = (
            "it is no reward model: to score, prefill-decode workers need --task score and a checkpoint with a head"
        )
    else:
        wanted = "for embeddings, prefill-decode workers need --task embed or generate"
    raise InvalidRequest(f"This model {_ENDPOINTS[task]}; {wanted}.", param="model")
