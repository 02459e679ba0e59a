"""One sample of a request: the PD that makes it, and what the consumer has not taken yet."""

from __future__ import annotations

from dataclasses import dataclass

from epd.messages import TokenOutput
from epd.types import FinishReason, SamplingParams
from proxy.work import Update
from proxy.worker_connection import WorkerConnection


@dataclass
class Sample:
    """A slow reader finds one update here, however many outputs there were."""

    index: int
    request_id: str
    pending: Update
    pd: WorkerConnection | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_prompt_logprobs: int = 0
    finished: bool = False
    taken: bool = False
    """The consumer has seen the end."""

    def add(self, output: TokenOutput) -> None:
        """Take what is new; the end is left to the caller."""
        if output.prompt_tokens:
            self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens
        self.num_prompt_logprobs += len(output.prompt_logprobs)
        self.pending.token_ids.extend(output.token_ids)
        self.pending.logprobs.extend(output.logprobs)
        self.pending.prompt_logprobs += output.prompt_logprobs

    def end(self, output: TokenOutput) -> None:
        """This was the last output."""
        self.finished = True
        self.pending.stop_token_id = output.stop_token_id
        self.pending.finish_reason = output.finish_reason
        self.pending.pooled = output.pooled

    def lacks_logprobs(self, output: TokenOutput, sampling: SamplingParams) -> bool:
        """Whether the output just added has fewer than were asked for: answers are put together on their strength."""
        if sampling.logprobs is not None and len(output.logprobs) != len(output.token_ids):
            return True
        is_over = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        return is_over and sampling.prompt_logprobs is not None and self.num_prompt_logprobs != self.prompt_tokens

    @property
    def has_news(self) -> bool:
        """Whether `take` would give anything."""
        news = self.pending
        return not self.taken and bool(news.token_ids or news.prompt_logprobs or news.finish_reason)

    def take(self) -> Update:
        """All since the last time."""
        update, self.pending = self.pending, Update(self.index)
        self.taken = self.finished
        return update
