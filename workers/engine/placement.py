"""Prompts with pictures: which ones a request still waits for, and its prompt expanded as far as they are here."""

from __future__ import annotations

from collections.abc import Collection, Set

from epd.limits import check_prompt_logprobs
from workers.engine import admission, logits_state
from workers.engine.embeddings import EmbeddingStore, ImageEmbeddings, expand_prompt
from workers.engine.logits_state import LogitsState
from workers.engine.model_loader import ModelInfo
from workers.engine.model_runner import Runner
from workers.engine.request import EngineRequest, RequestStatus
from workers.engine.scheduler import Scheduler


class Placement:
    """Leads requests from their arrival to the queue of those that can be computed.

    Args:
        info: what the model takes.
        store: where embeddings are kept, and claimed for requests.
        scheduler: learns how much of a prompt can be computed.
        runner: learns the expanded prompts.
    """

    def __init__(self, info: ModelInfo, store: EmbeddingStore, scheduler: Scheduler, runner: Runner) -> None:
        self._info = info
        self._store = store
        self._scheduler = scheduler
        self._runner = runner
        self._missing: dict[str, set[str]] = {}
        """Request id → content keys that it still waits for."""

    def add(self, request: EngineRequest) -> None:
        """Claim the pictures of a new request that are here, and wait for the others."""
        keys = {image.content_key for image in request.images}
        missing = self._missing[request.request_id] = {key for key in keys if key not in self._store}
        for key in keys - missing:
            self._store.claim(key, request.request_id)

    def take(self, content_key: str, embeddings: ImageEmbeddings) -> list[str]:
        """Keep a picture that was not here; returns the ids of those who waited for it, each of which wants `place`.

        Raises:
            WorkerFailed: it is larger than the whole store.
            Overloaded: the store is full of embeddings in use.
        """
        self._store.put(content_key, embeddings)
        waiting = [request_id for request_id, missing in self._missing.items() if content_key in missing]
        for request_id in waiting:
            self._missing[request_id].remove(content_key)
            self._store.claim(content_key, request_id)
        return waiting

    def place(self, request: EngineRequest) -> bool:
        """Expand the prompt as far as pictures are here, and let the request compete for steps with that.

        Returns:
            Whether all of it is placed.

        Raises:
            EPDError: the prompt is too long with its pictures, or can't be positioned.
            Exception: the model's own code fails on the pictures.
        """
        missing = self._missing[request.request_id]
        if missing and not self._scheduler.computes_early(request):
            return False
        self._expand(request, missing)
        if missing:
            self._scheduler.embeddings_arrived(request)
        elif request.status is RequestStatus.WAITING_FOR_EMBEDDINGS:
            self._scheduler.embeddings_complete(request)
        return not missing

    def remove(self, request: EngineRequest) -> None:
        """Forget a request that has ended, and let go of its pictures."""
        self._runner.remove(request.request_id)
        for image in request.images:
            self._store.release(image.content_key, request.request_id)
        del self._missing[request.request_id]

    def check_integrity(self, known: Set[str]) -> None:
        """Recount embeddings and requests, of which `known` are the ids; raises AssertionError on a leak."""
        self._store.check_integrity()
        if known != set(self._missing):
            raise AssertionError(f"known {known}, missing of {set(self._missing)}")
        if not self._store.users() <= known:
            raise AssertionError(f"embeddings are held for {self._store.users() - known}, which are gone")

    def _expand(self, request: EngineRequest, missing: Collection[str]) -> None:
        embeddings = {image.content_key: self._store.claim(image.content_key, request.request_id)
                      for image in request.images if image.content_key not in missing}  # fmt: skip
        spans = expand_prompt(request, embeddings)
        placed = [(span.offset, embeddings[span.content_key]) for span in spans]
        request.atomic_spans = self._info.adapter.atomic_spans(placed)
        self._scheduler.check_atomic_spans(request)
        request.max_tokens = admission.tokens_to_generate(
            self._info.max_model_len, request.num_prompt_tokens, request.sampling, request.pooling
        )
        check_prompt_logprobs(request.sampling, request.num_prompt_tokens)
        if not missing:
            self._add_logits_state(request)
        num_known = request.num_known_tokens if missing else request.num_prompt_tokens
        self._runner.add(request.request_id, request.token_ids[:num_known], placed)

    def _add_logits_state(self, request: EngineRequest) -> None:
        if request.pooling is None and logits_state.is_needed(request.sampling):
            request.logits_state = LogitsState(
                request.sampling,
                request.token_ids,
                request.num_prompt_tokens,
                ending=request.ending_token_ids,
                vocab_size=self._info.vocab_size,
                matcher=request.matcher,
            )
