"""What a request asks of the workers, and what it hears from them."""

from __future__ import annotations

import msgspec

from epd.types import FinishReason, Pooling, SamplingParams, TokenLogprobs
from proxy.media.loader import LoadedImage
from proxy.models.catalog import ModelRef
from proxy.routing.prefix_affinity import Chain, prefix_chain


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What one request asks of the workers."""

    request_id: str
    model: ModelRef
    prompts: tuple[tuple[int, ...], ...]
    """Several are independent of each other. Pictures come with a single one, which has one placeholder for each."""
    image_offsets: tuple[int, ...] = ()
    images: tuple[LoadedImage, ...] = ()
    """One for each offset, in order."""
    sampling: SamplingParams
    n: int = 1
    """Samples of each prompt; the i-th has `seed + i`. Sample i of prompt p has the index `p * n + i`."""
    priority: int = 0
    """Smaller goes first."""
    cache_salt: str = ""
    """Cached prefixes are shared only with requests that have the same one."""
    pooling: Pooling | None = None
    """Asks for one vector of each prompt instead of tokens."""
    arrived: float
    """`time.perf_counter()` when the HTTP request came."""
    timeout_s: float
    """From arrival."""

    def prefix_chain(self, prompt: int) -> Chain:
        """What names the beginnings of a prompt."""
        keys = [image.content_key for image in self.images]
        salt = f"{self.model.fingerprint}\0{self.cache_salt}"
        return prefix_chain(self.prompts[prompt], list(zip(self.image_offsets, keys, strict=True)), salt=salt)


class Update(msgspec.Struct, gc=False):
    """News of one sample since the last time it was asked for."""

    index: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    """One for each of `token_ids`, when asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    """Once, one for each prompt token, when asked for."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    pooled: tuple[float, ...] = ()
    """With the end, when asked for."""
