"""One sample of a request: where it is made, all its tokens so far, and what the consumer has not taken yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from epd.messages import TokenOutput
from epd.types import FinishReason, SamplingParams
from proxy.dispatch.retries import Retries
from proxy.dispatch.work import Update

if TYPE_CHECKING:
    from proxy.dispatch.attempt import Attempt


class Sample(msgspec.Struct, eq=False):
    """A slow reader finds one update here, however many outputs there were."""

    index: int
    name: str
    """What its request ids begin with."""
    pending: Update
    attempt: Attempt | None = None
    """Who makes it; None: nobody at the moment."""
    retries: Retries = msgspec.field(default_factory=Retries)
    num_attempts: int = 0
    token_ids: list[int] = []
    """All that were received, told or not: another PD goes on behind them."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_prompt_logprobs: int = 0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    """`time.perf_counter()`; 0: there is none yet."""
    finished: bool = False
    taken: bool = False
    """The consumer has seen the end."""

    @property
    def request_id(self) -> str:
        """Each attempt has an id of its own, so that nothing that was meant for another one is taken for it."""
        return self.name if self.num_attempts <= 1 else f"{self.name}-{self.num_attempts}"

    def sampling_left(self, sampling: SamplingParams) -> SamplingParams:
        """What to ask another PD for: log probabilities of the prompt are not made twice."""
        return msgspec.structs.replace(sampling, prompt_logprobs=None) if self.num_prompt_logprobs else sampling

    def add(self, output: TokenOutput) -> None:
        """Take what is new; the end is left to the caller."""
        if output.prompt_tokens:
            self._note_prompt(output)
        self.token_ids.extend(output.token_ids)
        self.pending.token_ids.extend(output.token_ids)
        if output.logprobs:
            self.pending.logprobs.extend(output.logprobs)
        if output.prompt_logprobs and not self.num_prompt_logprobs:
            self.pending.prompt_logprobs += output.prompt_logprobs
            self.num_prompt_logprobs = len(output.prompt_logprobs)

    def _note_prompt(self, output: TokenOutput) -> None:
        """What a PD that took over found in its cache, answers that came before included, is not the client's."""
        is_first_life = self.num_attempts <= 1 or not self.token_ids
        if (is_first_life and output.finish_reason is not FinishReason.ERROR) or not self.prompt_tokens:
            self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens

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

    @property
    def has_more(self) -> bool:
        """Whether there is news of a kind that comes again and again: not the prompt's, and not the end."""
        news = self.pending
        return bool(news.token_ids) and not (self.taken or news.finish_reason or news.prompt_logprobs)

    def take(self) -> Update:
        """All since the last time."""
        update, self.pending = self.pending, Update(self.index)
        self.taken = self.finished
        return update
