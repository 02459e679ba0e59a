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


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when generation ends.

    Values are validated at the proxy; workers trust their ranges. Noise depends on `(seed, position)` alone, so
    that the same request gives the same tokens alone, batched, preempted or resumed elsewhere.
    """

    max_tokens: int | None = None
    """Tokens to generate at most; None: what is left of the context."""
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
