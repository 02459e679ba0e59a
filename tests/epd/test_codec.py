from __future__ import annotations

import random

import msgspec
import pytest

from epd import codec
from epd.errors import ErrorInfo, ProtocolError
from epd.messages import (
    Abort,
    AnyMessage,
    Embeddings,
    EncodeRequest,
    GenerateRequest,
    Hello,
    ImageSlot,
    Peers,
    Ping,
    TokenBatch,
    TokenOutput,
)
from epd.types import FinishReason, SamplingParams

ENCODE = EncodeRequest(request_id="r", image_index=0, content_key="k", pd_address="ipc:///tmp/pd", timeout_s=1.0)
EMBEDDINGS = Embeddings(content_key="k", token_ids=(7, 7), grid_thw=(1, 2, 4), shape=(2, 3), dtype="bfloat16")
MESSAGES: list[tuple[AnyMessage, tuple[bytes, ...]]] = [
    (Ping(sequence=3), ()),
    (Hello(protocol_version=1, sender="proxy", model="m"), ()),
    (Abort(request_ids=("a", "b")), ()),
    (ENCODE, (b"\x89PNG",)),
    (EMBEDDINGS, (bytes(12),)),
    (
        GenerateRequest(
            request_id="r",
            prompt_token_ids=(1, 2, 3),
            images=(ImageSlot(content_key="k", offset=1),),
            sampling=SamplingParams(max_tokens=5, stop_token_ids=(9,)),
            timeout_s=2.5,
        ),
        (),
    ),
    (
        TokenBatch(
            outputs=(
                TokenOutput(request_id="r", token_ids=(4,)),
                TokenOutput(
                    request_id="s", finish_reason=FinishReason.ERROR, error=ErrorInfo(code="timeout", message="late")
                ),
            )
        ),
        (),
    ),
]


@pytest.mark.parametrize(("message", "buffers"), MESSAGES, ids=lambda value: type(value).__name__)
def test_what_is_encoded_is_decoded(message: AnyMessage, buffers: tuple[bytes, ...]) -> None:
    decoded, raw = codec.decode([bytes(frame) for frame in codec.encode(message, *buffers)])
    assert decoded == message
    assert [bytes(buffer) for buffer in raw] == list(buffers)


def test_buffers_are_not_copied() -> None:
    picture = b"picture"
    assert codec.encode(ENCODE, picture)[1] is picture


def test_unknown_fields_are_ignored() -> None:
    header = msgspec.msgpack.encode({"type": "Ping", "sequence": 1, "from_a_newer_version": [1, 2]})
    assert codec.decode([header]) == (Ping(sequence=1), [])


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [b"random bytes"],
        [msgspec.msgpack.encode({"type": "Pickle", "data": b"x"})],
        [msgspec.msgpack.encode({"type": "Ping"})],
        [msgspec.msgpack.encode({"type": "Ping", "sequence": "one"})],
        [msgspec.msgpack.encode(Ping(sequence=1)), b"a buffer that does not belong"],
        [msgspec.msgpack.encode(ENCODE)],
        [msgspec.msgpack.encode(EMBEDDINGS), bytes(11)],
        [msgspec.msgpack.encode(msgspec.structs.replace(EMBEDDINGS, dtype="object")), bytes(12)],
        [msgspec.msgpack.encode(msgspec.structs.replace(EMBEDDINGS, shape=(12,))), bytes(24)],
        [msgspec.msgpack.encode(msgspec.structs.replace(EMBEDDINGS, shape=(-2, -3))), bytes(12)],
    ],
    ids=[
        "no frames",
        "empty header",
        "invalid msgpack",
        "text",
        "unknown type",
        "missing field",
        "wrong type of field",
        "surplus buffer",
        "missing buffer",
        "tensor too short",
        "unknown dtype",
        "tensor of one dimension",
        "negative shape",
    ],
)
def test_malformed_messages_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        codec.decode(frames)


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_HEADER_BYTES", 64)
    monkeypatch.setattr(codec, "MAX_BUFFER_BYTES", 8)
    with pytest.raises(ProtocolError, match="header of"):
        codec.decode([msgspec.msgpack.encode(Abort(request_ids=("x" * 100,)))])
    with pytest.raises(ProtocolError, match="buffer over"):
        codec.decode([b"", bytes(9)])


def test_random_bytes_never_raise_anything_else() -> None:
    rng = random.Random(0)
    seeds = [bytes(codec.encode(message)[0]) for message, _ in MESSAGES]
    for _ in range(3000):
        header = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            header[rng.randrange(len(header))] = rng.randrange(256)
        frames = [bytes(header), *(rng.randbytes(rng.randint(0, 16)) for _ in range(rng.randint(0, 2)))]
        try:
            codec.decode(frames)
        except ProtocolError:
            continue


def test_a_header_nested_without_end_is_malformed() -> None:
    fields = msgspec.msgpack.encode({"type": "Ping", "sequence": 1, "of a newer peer": 0})
    with pytest.raises(ProtocolError):
        codec.decode([fields[:-1] + b"\x91" * 100_000 + b"\x00"])


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Abort(request_ids=("x" * 600,)), None),
        (Hello(protocol_version=1, sender="x" * 600, model="m"), "sender"),
        (Peers(pd_addresses=("x" * 600,)), "pd_addresses"),
        (Peers(pd_addresses=("x",) * 5000), "pd_addresses"),
        (
            Embeddings(content_key="x" * 600, token_ids=(1,), grid_thw=None, shape=(1, 1), dtype="float32"),
            "content_key",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_names_that_receivers_keep_are_short(message: AnyMessage, field: str | None) -> None:
    buffers = [bytes(4)] if isinstance(message, Embeddings) else []
    if field is None:  # only looked up
        assert codec.decode(codec.encode(message))[0] == message
        return
    with pytest.raises(ProtocolError, match=field):
        codec.decode(codec.encode(message, *buffers))
