"""Every struct that crosses a socket.

Encoding: msgpack maps, tagged by `type`, unknown fields ignored, so that a newer peer may add fields. The tensor or
image bytes of a message travel behind it as raw frames (see `epd.codec`). Durations travel, clock readings never.

    proxy → encoder    Hello, Peers, Ping, EncodeRequest (+ image bytes), Abort
    proxy → PD         Hello, Ping, GenerateRequest, Abort
    encoder → PD       Hello, Ping, Embeddings (+ tensor)
    encoder → proxy    Welcome | Refusal, Pong, EncodeResult
    PD → proxy         Welcome | Refusal, Pong, TokenBatch
    PD → encoder       Welcome | Refusal, Pong, EmbeddingsReply
    proxy → worker     Profile
    worker → proxy     ProfileReply, Pause
    worker → proxy     Announcement (to the proxy's own address)

A PD that leaves before a request is finished ends it with the error `handed_over`: the proxy goes on elsewhere, with
`resume_token_ids`.

Every `EncodeRequest` is answered by exactly one `EncodeResult`, every `Embeddings` by one `EmbeddingsReply`, and every
`GenerateRequest` by `TokenOutput`s of which exactly one, the last, has a `finish_reason`.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from epd.errors import ErrorInfo
from epd.types import FinishReason, Pooling, SamplingParams, TokenLogprobs, WorkerRole, WorkerState, WorkerTask

PROTOCOL_VERSION = 1
"""Raised when an old peer could misread a new message. Peers of different versions refuse each other."""


Name = Annotated[str, msgspec.Meta(max_length=512)]
"""Ids, addresses and keys, all of which our own processes make, and none as long as this. Receivers keep them."""
MAX_PD_ADDRESSES = 4096


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of all messages; the tag is the class name."""


# -- meeting each other ------------------------------------------------------------------------------------------


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself."""

    role: WorkerRole
    address: str
    """Where it can be reached, as a ZeroMQ endpoint."""
    incarnation: str
    """Random per start: the same address with another incarnation is another worker."""
    model: str
    """Fingerprint of the checkpoint (see `epd.checkpoint.fingerprint`); encoder, PD and proxy must agree."""
    dtype: str
    """Of the embeddings made or taken, such as `bfloat16`."""
    state: WorkerState = WorkerState.READY
    max_model_len: int = 0
    """Context in tokens (PD); 0 on encoders."""
    max_num_seqs: int = 0
    """Requests that run at once (PD), or images that queue at most (encoder)."""
    max_requests: int = 0
    """Requests that it takes at most, waiting ones included; more are refused as overloaded. 0: it does not say."""
    task: WorkerTask = WorkerTask.GENERATE
    """What a PD answers."""
    served_model_name: str = ""
    """What clients call the model; empty: what the proxy calls the checkpoint."""
    version: str = ""
    """Of this software."""
    uptime_s: float = 0.0
    """Seconds since the process started, as of the message that carries it."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a worker is, as of the message that carries it."""

    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    work_ms: float = 0.0
    """What the worker predicts that its requests at hand still take, in milliseconds, from rates that it learned."""
    ms_per_unit: float = 0.0
    """Predicted time of one more prompt token (PD) or of one more picture (encoder); 0: nothing learned yet."""
    cache_digest: str = ""
    """Which pictures' embeddings a PD holds, as `epd.key_digest` writes it; empty: none."""


class StageStats(msgspec.Struct, frozen=True, kw_only=True):
    """Sum of a stage's durations in milliseconds, how many there were, and how they are spread."""

    count: int = 0
    total_ms: float = 0.0
    buckets: Annotated[tuple[int, ...], msgspec.Meta(max_length=64)] = ()
    """How many were in each range of `epd.observability.BOUNDS_MS`, those above all of them last; empty: not told."""


class Hello(Message, frozen=True, kw_only=True):
    """First message on a connection to a worker."""

    protocol_version: int
    sender: Name
    """Name of the sender for logs, such as `proxy-5580` or an encoder's address."""
    model: str
    """Checkpoint fingerprint that the sender serves; empty: any, as proxies say, which learn it from the answer."""


class Welcome(Message, frozen=True, kw_only=True):
    """Answer to a `Hello` of a matching peer."""

    protocol_version: int
    worker: WorkerInfo


class Refusal(Message, frozen=True, kw_only=True):
    """Answer to a `Hello` that does not match, in version or model, and to anything else before a `Hello`.

    A worker forgets a peer that was silent for long, and what it did for it; the peer learns of it in this way.
    """

    protocol_version: int
    reason: str


class Announcement(Message, frozen=True, kw_only=True):
    """A worker tells a proxy where it is; repeated every second as a heartbeat."""

    protocol_version: int
    worker: WorkerInfo


class Peers(Message, frozen=True, kw_only=True):
    """A proxy tells an encoder which PD addresses are in its roster; an encoder dials no others."""

    pd_addresses: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_PD_ADDRESSES)]


class Ping(Message, frozen=True, kw_only=True):
    """Are you there?"""

    sequence: int


class Pong(Message, frozen=True, kw_only=True):
    """Answer to a `Ping`, with what the roster and `/metrics` show."""

    sequence: int
    incarnation: str
    state: WorkerState
    load: Load
    stages: dict[str, StageStats] = msgspec.field(default_factory=dict)
    """Name of a stage → durations since start. Names: see `epd.observability.Stage`."""
    counters: dict[str, int] = msgspec.field(default_factory=dict)
    """Name → count since start, such as `embedding_cache_hits`."""
    stalled_s: float = 0.0
    """Seconds for which there has been work and no step or batch ended; 0 while idle or moving."""
    is_stuck: bool = False
    """`stalled_s` is far above what this worker's steps take: it must be treated as dead."""


class Profile(Message, frozen=True, kw_only=True):
    """Record what the worker computes, or end that and write it down; answered by one `ProfileReply`."""

    sequence: int
    start: bool
    seconds: float = 60.0
    """It ends by itself after so long, …"""
    steps: int = 100
    """… or after so many steps, or pictures and batches."""


class ProfileReply(Message, frozen=True, kw_only=True):
    """How a worker took a `Profile`."""

    sequence: int
    state: Annotated[str, msgspec.Meta(max_length=32)]
    """started, running (it was already), stopped, idle (nothing was recorded), off (no `--profile-dir`), failed."""
    files: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    """Names of what was written since the last reply, in the worker's own folder."""
    message: Name = ""
    """Of a failure."""


class Pause(Message, frozen=True, kw_only=True):
    """The worker may say nothing for a while, and is not dead."""

    seconds: float


# -- one request ---------------------------------------------------------------------------------------------------


class EncodeRequest(Message, frozen=True, kw_only=True):
    """Encode one picture and ship its embeddings to a PD. One raw frame follows: the original image bytes."""

    request_id: Name
    image_index: int
    """Which picture of the request; echoed in the result."""
    content_key: Name
    """Hash of bytes, processor settings and model; the cache key on every worker."""
    pd_address: Name
    """Where the embeddings go; must be one of the `Peers`."""
    max_pixels: int | None = None
    """Upper bound on the resized picture (`detail: low`); None: the processor's own."""
    timeout_s: float
    """What is left of the request's time when this is sent."""


class EncodeResult(Message, frozen=True, kw_only=True):
    """Terminal answer to an `EncodeRequest`, sent after the PD took the embeddings."""

    request_id: str
    image_index: int
    error: ErrorInfo | None = None
    num_tokens: int = 0
    """Prompt tokens that the picture takes."""
    cache_hit: bool = False
    timings_ms: dict[str, float] = msgspec.field(default_factory=dict)
    """Stage name → duration: `encode_queue`, `preprocess`, `encode`, `transfer`."""


class ImageSlot(msgspec.Struct, frozen=True, kw_only=True):
    """Where a picture stands in a prompt."""

    content_key: Name
    offset: int
    """Index of its single placeholder in `prompt_token_ids`; offsets increase from slot to slot."""
    expect_cached: bool = False
    """The PD should hold the embeddings: no encoder was asked. If it does not, it says so in `missing_keys`."""


class GenerateRequest(Message, frozen=True, kw_only=True):
    """Generate from a prompt; pictures arrive as `Embeddings` with the same content keys."""

    request_id: Name
    prompt_token_ids: tuple[int, ...]
    """With one placeholder token for each picture; the PD expands it to what `Embeddings.token_ids` says."""
    images: tuple[ImageSlot, ...] = ()
    sampling: SamplingParams
    timeout_s: float
    priority: int = 0
    """Smaller goes first; requests of equal priority go by arrival."""
    cache_salt: Name = ""
    """Cached prefixes are shared only with requests that have the same one."""
    pooling: Pooling | None = None
    """Answer with one vector when the prompt is computed, and with no token; `sampling` is then not looked at."""
    resume_token_ids: tuple[int, ...] = ()
    """Tokens of the answer that the client has already, made by a worker that was lost. They count as generated (for
    positions, penalties, grammar, `max_tokens`); outputs carry only what follows them."""


class Embeddings(Message, frozen=True, kw_only=True):
    """The vision tower's output for one picture. One raw frame follows: `shape` × `dtype`, C order, little endian."""

    content_key: Name
    token_ids: tuple[int, ...]
    """What the placeholder expands to. Embedding row i replaces the i-th of them that is an image token."""
    grid_thw: tuple[int, int, int] | None = None
    """Patches of the picture (time, height, width) before merging: what multimodal positions need; None: they don't."""
    shape: tuple[int, ...]
    """(rows, hidden size), or (1 + levels, rows, hidden size): what replaces the image tokens' embeddings, then what
    each of the first layers of the language model adds to their hidden states (https://arxiv.org/abs/2406.04334)."""
    dtype: str


class EmbeddingsReply(Message, frozen=True, kw_only=True):
    """The PD took the embeddings, or says why not."""

    content_key: str
    error: ErrorInfo | None = None


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """New tokens of one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    """Those since the last output; a stop token that ended the answer is the last of them."""
    finish_reason: FinishReason | None = None
    """Set on the terminal output, and only there."""
    stop_token_id: int | None = None
    """The token that ended the answer, when one did."""
    error: ErrorInfo | None = None
    """Set if and only if `finish_reason` is `error`."""
    prompt_tokens: int = 0
    """Prompt length with pictures expanded; set on the first and on the terminal output."""
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids`, when asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One for each prompt token, pictures expanded, when asked for; on the first output. The first is always None."""
    missing_keys: tuple[str, ...] = ()
    """Pictures with `expect_cached` that the PD does not hold: it waits for their embeddings. Never terminal."""
    pooled: tuple[float, ...] = ()
    """The vector that `GenerateRequest.pooling` asked for; on the terminal output, whose finish reason is `stop`."""
    timings_ms: dict[str, float] = msgspec.field(default_factory=dict)
    """On the terminal output: stage name → duration: `queue`, `embeddings_wait`, `prefill`, `decode`."""


class TokenBatch(Message, frozen=True, kw_only=True):
    """What one engine step made for one proxy."""

    outputs: tuple[TokenOutput, ...]


class Abort(Message, frozen=True, kw_only=True):
    """Stop these requests and free what they hold. Unknown ids are ignored; known ones end with `abort`."""

    request_ids: tuple[str, ...]


AnyMessage = (
    Hello
    | Welcome
    | Refusal
    | Announcement
    | Peers
    | Ping
    | Pong
    | Profile
    | ProfileReply
    | Pause
    | EncodeRequest
    | EncodeResult
    | GenerateRequest
    | Embeddings
    | EmbeddingsReply
    | TokenBatch
    | Abort
)


def schema() -> dict[str, Any]:
    """JSON schema of all messages, for documentation and tests."""
    return msgspec.json.schema(AnyMessage)
