"""The nouns that every part shares. Imports nothing of ours."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class WorkerRole(StrEnum):
    """What a worker does. The value is the name used in addresses, logs and `--help`."""

    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    PREFILL_DECODE = "pd"

    @property
    def server_type(self) -> str:
        """The name that `/metrics` and `/check_health` print, such as `PD_INSTANCE`."""
        return _SERVER_TYPES[self]


_SERVER_TYPES = {
    WorkerRole.ENCODER: "E_INSTANCE",
    WorkerRole.PREFILL: "P_INSTANCE",
    WorkerRole.DECODE: "D_INSTANCE",
    WorkerRole.PREFILL_DECODE: "PD_INSTANCE",
}


class WorkerState(StrEnum):
    """Life of a worker as its peers see it; only `READY` workers get new requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class WorkerTask(StrEnum):
    """What a language model is served for; the checkpoint decides which are possible."""

    GENERATE = "generate"
    """Tokens; its hidden states as embeddings too."""
    SCORE = "score"
    """One number for a text, by the head of a reward model."""
    EMBED = "embed"
    """Embeddings only, from a checkpoint that need not have a head."""

    def takes(self, pooling: Pooling | None) -> bool:
        """Whether a worker with this task answers requests with such a `pooling`."""
        if pooling is None:
            return self is WorkerTask.GENERATE
        return (self is WorkerTask.SCORE) == (pooling.kind is PoolingKind.SCORE)


class PoolingKind(StrEnum):
    """How the final hidden states of a prompt become one vector."""

    SCORE = "score"
    """The score head's output for the last token: one number."""
    LAST = "last"
    """That of the last token."""
    MEAN = "mean"
    """Their average over all tokens."""


class Pooling(msgspec.Struct, frozen=True):
    """A request for one vector instead of tokens."""

    kind: PoolingKind
    normalize: bool = True
    """Scale the vector to length 1. A score is never scaled."""


class FinishReason(StrEnum):
    """Why a request ended. Every accepted request ends with exactly one of them."""

    STOP = "stop"
    """An end-of-sequence or stop token; the proxy also uses it for stop strings."""
    LENGTH = "length"
    """`max_tokens` or the model's context was used up."""
    ABORT = "abort"
    """The client went away or asked for it."""
    ERROR = "error"
    """Rejected or failed; the terminal message carries the error."""


class GrammarKind(StrEnum):
    """What `Grammar.text` holds."""

    JSON_OBJECT = "json_object"
    """Nothing: any JSON object."""
    JSON_SCHEMA = "json_schema"
    """A JSON schema as JSON."""
    REGEX = "regex"
    """A regular expression that the whole answer matches."""
    CHOICE = "choice"
    """A JSON list of strings, of which the answer is one."""
    EBNF = "ebnf"
    """A context-free grammar."""


class Grammar(msgspec.Struct, frozen=True):
    """What the answer must look like. Checked at the proxy: workers trust that it can be compiled."""

    kind: GrammarKind
    text: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when generation ends.

    Values are validated at the proxy; workers trust their ranges. Noise depends on `(seed, position)` alone, so
    that the same request gives the same tokens alone, batched, preempted or resumed elsewhere.
    """

    max_tokens: int | None = None
    """Tokens to generate at most; None: what is left of the context."""
    fits_context: bool = False
    """Where so many do not fit, generate what is left of the context, instead of refusing the request."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are masked out until so many tokens were generated."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    seed: int = 0
    """The proxy draws one when the client gave none."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end the answer, beside the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as the answer has it."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of a token that the answer has."""
    repetition_penalty: float = 1.0
    """Logits of tokens that prompt or answer have are divided by it, or multiplied when negative; 1 does nothing."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, added to its logit); each token at most once."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the answer must not contain: the last token of one is masked where the others precede."""
    allowed_token_ids: tuple[int, ...] = ()
    """Only these tokens may come, beside those that end the answer; empty: all."""
    logprobs: int | None = None
    """Give log probabilities of the chosen token and of so many most likely ones (0 to 20); None: give none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    grammar: Grammar | None = None
    """The answer follows it; None: free text."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the model's distribution before temperature, penalties and masks."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log probability) of the most likely ones, best first."""
