"""Streams through the front at an engine's pace: what a token costs, memory, and what a large body does to them."""

from __future__ import annotations

import asyncio
import base64
import random
import time
from dataclasses import dataclass

from epd.bench.fronts import Server, chat
from epd.bench.output import number
from epd.bench.process_usage import resident_bytes
from epd.bench.words import make_text
from epd.errors import ConfigError

_PROMPT_WORDS = 16
_TEXT, _END = b'"delta":{"content"', b"data: [DONE]"
_IMAGE_BYTES = 14 << 20
"""Below what one picture may have; several fill the body."""
_SETTLE_S = 1.0
_BESIDE_TOKENS = 1 << 16
"""More than come while the body does."""


@dataclass(frozen=True)
class StreamFigures:
    """Many streams at once."""

    streams: int
    step_ms: float
    tokens: int
    """Sent to all of them."""
    events: int
    """That carried them: fewer, where several tokens went as one because the front or the client lagged."""
    duration_s: float
    cpu_s: float
    """Of the front."""
    worker_cpu_s: float
    memory_bytes: tuple[int | None, ...]
    """Of the front: before, at the ends of the first and of the last quarter, and after."""


async def measure_streams(server: Server, streams: int, step_ms: float, seconds: float) -> StreamFigures:
    """Open all streams, and read them to their ends.

    Args:
        server: whose worker makes a token of each in `step_ms`.
        streams: at once.
        step_ms: see above.
        seconds: for which they stay open.

    Raises:
        ConfigError: an answer was not complete.
    """
    tokens = max(round(seconds * 1000 / step_ms), 1)
    rng = random.Random(streams)
    bodies = [chat(make_text(rng, _PROMPT_WORDS), tokens, stream=True) for _ in range(streams)]
    before = resident_bytes(server.pid)
    cpu_s, worker_cpu_s, start = server.cpu_s(), server.worker_cpu_s(), time.perf_counter()
    watch = asyncio.create_task(_watch_memory(server, seconds))
    events = sum(await asyncio.gather(*(_read(server, body) for body in bodies)))
    duration_s = time.perf_counter() - start
    cpu_s, worker_cpu_s = server.cpu_s() - cpu_s, server.worker_cpu_s() - worker_cpu_s
    within = await watch
    await asyncio.sleep(_SETTLE_S)
    memory = (before, *within, resident_bytes(server.pid))
    return StreamFigures(streams, step_ms, streams * tokens, events, duration_s, cpu_s, worker_cpu_s, memory)


async def _watch_memory(server: Server, seconds: float) -> list[int | None]:
    await asyncio.sleep(seconds / 4)
    first = resident_bytes(server.pid)
    await asyncio.sleep(seconds * 0.7)
    return [first, resident_bytes(server.pid)]


async def _read(server: Server, body: bytes) -> int:
    """Events with text of an answer."""
    events, end = 0, b""

    def on_body(piece: bytes) -> None:
        nonlocal events, end
        events += piece.count(_TEXT)
        end = piece

    await server.ask(body, on_body)
    if _END not in end:
        raise ConfigError("a stream of the comparison ended too early")
    return events


# -- beside a large body -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BodyFigures:
    """A request with a large body, beside a stream."""

    mib: float
    answer_ms: float
    """From its first byte to its answer."""
    quiet_gap_ms: float
    """Longest time between two pieces of the stream, with nothing beside."""
    gap_ms: float
    """While the body came in and was answered."""

    def describe(self) -> str:
        """One sentence."""
        return (
            f"A body of {number(self.mib)} MiB of pictures in base64 was answered in {number(self.answer_ms)} ms. The "
            f"longest gap of a stream beside it was {number(self.gap_ms)} ms; before, {number(self.quiet_gap_ms)} ms."
        )


class _Gaps:
    """The longest time between two calls."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.longest_ms = 0.0

    def note(self, _: bytes = b"") -> None:
        now = time.perf_counter()
        self.longest_ms, self._last = max(self.longest_ms, (now - self._last) * 1000), now

    def take_ms(self) -> float:
        """The longest one since the last time, that which goes on included."""
        self.note()
        longest, self.longest_ms = self.longest_ms, 0.0
        return longest


async def measure_large_body(server: Server, mib: int) -> BodyFigures:
    """Send pictures of so many MiB in base64 while another answer is streamed.

    Raises:
        ConfigError: the server does not do its part.
    """
    body = await asyncio.to_thread(_pictures, mib << 20)
    gaps = _Gaps()
    beside = asyncio.create_task(server.ask(chat("Tell me more.", _BESIDE_TOKENS, stream=True), gaps.note))
    try:
        await asyncio.sleep(_SETTLE_S / 2)
        gaps.take_ms()
        await asyncio.sleep(_SETTLE_S)
        quiet_ms, start = gaps.take_ms(), time.perf_counter()
        await asyncio.to_thread(server.ask_apart, body)  # else the stream would wait for its reader
        answer_ms, gap_ms = (time.perf_counter() - start) * 1000, gaps.take_ms()
    finally:
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
    return BodyFigures(len(body) / (1 << 20), answer_ms, quiet_ms, gap_ms)


def _pictures(num_bytes: int) -> bytes:
    """The body of a conversation with pictures: noise behind the header of a bitmap."""
    rng = random.Random(0)
    left, parts = num_bytes * 3 // 4, []
    while left > 0:
        size = max(min(left, _IMAGE_BYTES), 1024)
        data = base64.b64encode(_bitmap(rng.randbytes(size))).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/bmp;base64,{data}"}})
        left -= size
    return chat([*parts, {"type": "text", "text": "What is this?"}], 1, stream=False)


def _bitmap(pixels: bytes) -> bytes:
    """A picture in the format of Windows (https://en.wikipedia.org/wiki/BMP_file_format), 24 bits a pixel."""
    width = 256
    height = max(len(pixels) // (3 * width), 1)
    info = [(40, 4), (width, 4), (height, 4), (1, 2), (24, 2), (0, 4), (0, 4), (2835, 4), (2835, 4), (0, 4), (0, 4)]
    header = b"BM" + (54 + len(pixels)).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    return header + b"".join(value.to_bytes(size, "little") for value, size in info) + pixels
