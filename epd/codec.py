"""Messages to frames and back.

A message is `[header]` or `[header, buffer…]`: the header is msgpack of one struct of `epd.messages`, each buffer is
raw bytes (an image file, a tensor). Nothing is copied on the way out, nothing but the header is parsed on the way in,
and nothing is unpickled anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import msgspec

from epd.errors import ProtocolError
from epd.messages import AnyMessage, Embeddings, EncodeRequest

MAX_HEADER_BYTES = 16 << 20
"""A prompt of a million tokens fits; more is an attack or a bug."""
MAX_BUFFER_BYTES = 512 << 20
"""Largest raw frame: 16k embedding rows of 4096 × float32, or with three levels of deepstack × bfloat16."""

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)

Buffer = bytes | bytearray | memoryview


def encode(message: AnyMessage, *buffers: Buffer) -> list[Buffer]:
    """Frames of `message`, ready for `send_multipart`. The buffers are not copied: do not modify them afterwards."""
    return [_encoder.encode(message), *buffers]


def decode(frames: Sequence[Buffer]) -> tuple[AnyMessage, list[memoryview]]:
    """The message in `frames` and its buffers, as views of the frames.

    Raises:
        ProtocolError: no such message, a field of the wrong type, too large, or buffers that do not fit to the header.
    """
    if not frames:
        raise ProtocolError("a message without frames")
    header, *raw = [memoryview(frame) for frame in frames]
    if header.nbytes > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {header.nbytes} bytes, at most {MAX_HEADER_BYTES} are read")
    if raw and max(buffer.nbytes for buffer in raw) > MAX_BUFFER_BYTES:
        raise ProtocolError(f"buffer over {MAX_BUFFER_BYTES} bytes")
    try:
        message = _decoder.decode(header)
    # msgspec does not count a header nested too deep among its decoding errors.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"header is no known message: {error}") from error
    _check_buffers(message, raw)
    return message, raw


def _check_buffers(message: AnyMessage, buffers: list[memoryview]) -> None:
    expected = 1 if isinstance(message, EncodeRequest | Embeddings) else 0
    if len(buffers) != expected:
        raise ProtocolError(f"{type(message).__name__} with {len(buffers)} buffers instead of {expected}")
    if isinstance(message, Embeddings):
        _check_tensor(message, buffers[0])


def _check_tensor(message: Embeddings, buffer: memoryview) -> None:
    if message.dtype not in _DTYPE_BYTES:
        raise ProtocolError(f"dtype {message.dtype!r} is not one of {', '.join(_DTYPE_BYTES)}")
    if len(message.shape) not in (2, 3) or min(message.shape) < 1:
        raise ProtocolError(f"embeddings of shape {message.shape}, want (rows, hidden size) or (levels, rows, …)")
    expected = prod(message.shape) * _DTYPE_BYTES[message.dtype]
    if buffer.nbytes != expected:
        raise ProtocolError(
            f"{buffer.nbytes} bytes of embeddings, shape {message.shape} × {message.dtype} is {expected}"
        )
