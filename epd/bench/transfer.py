"""`epd bench transfer`: embeddings from an encoder's own code to another process, against copying memory.

Both are done in turns in one run. A transfer crosses a socket, so the kernel copies twice at least: half of memcpy's
rate would be all that there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from epd.bench.children import fake_worker, free_port
from epd.bench.output import markdown_table, number
from epd.errors import ConfigError
from epd.transport import endpoint
from workers.embedding_cache import EncodedImage
from workers.embedding_transfer import MAX_IN_FLIGHT, EmbeddingTransfer

SIZES = tuple(64 << 10 << (2 * step) for step in range(6))
"""64 KiB to 64 MiB, in steps of four."""
_MODEL = "bench-transfer"
_ROW_BYTES = 4096
_DTYPE = "bfloat16"
_BYTES_A_ROUND = 256 << 20
_MAX_REPEATS = 200
_MIN_REPEATS = 8


@dataclass(frozen=True)
class TransferFigures:
    """One size over one kind of socket. Rates in GB/s (10⁹ bytes)."""

    transport: str
    size_bytes: int
    alone_ms: float
    """Median time from sending one picture to its acknowledgement, nothing else under way."""
    alone_gb_s: float
    pipelined_gb_s: float
    """With as many under way as an encoder allows."""
    memcpy_gb_s: float


async def run_transfer_bench(
    sizes: Sequence[int] = SIZES, notify: Callable[[str], None] = lambda _: None
) -> list[TransferFigures]:
    """Measure all sizes over IPC and over TCP on the loopback.

    Raises:
        ConfigError: a size is no multiple of a row, or the receiving process does not start.
    """
    for size in sizes:
        if size < _ROW_BYTES or size % _ROW_BYTES:
            raise ConfigError(f"--sizes {size}: want multiples of {_ROW_BYTES} bytes")
    figures = []
    with tempfile.TemporaryDirectory(prefix="epd-bench-") as folder:
        for transport, address in (("IPC", f"{folder}/sink"), ("TCP", f"127.0.0.1:{free_port()}")):
            async with fake_worker(address, _MODEL), _sender(endpoint(address)) as transfer:
                for size in sizes:
                    notify(f"{transport}, {size >> 10} KiB")
                    figures.append(await _measure(transfer, transport, endpoint(address), size))
    return figures


@contextlib.asynccontextmanager
async def _sender(address: str) -> AsyncIterator[EmbeddingTransfer]:
    transfer = EmbeddingTransfer(sender="bench", model=_MODEL)
    transfer.set_roster(b"bench", [address])
    try:
        yield transfer
    finally:
        await transfer.close()


async def _measure(transfer: EmbeddingTransfer, transport: str, address: str, size: int) -> TransferFigures:
    repeats = min(_MAX_REPEATS, max(_MIN_REPEATS, _BYTES_A_ROUND // size))
    image = _image(size)
    target = bytearray(size)
    keys = (f"{transport}-{size}-{index}" for index in range(10 * _MAX_REPEATS))
    for _ in range(3):  # connection, buffers
        await transfer.ship(address, next(keys), image)
    times, copies = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        await transfer.ship(address, next(keys), image)
        middle = time.perf_counter()
        memoryview(target)[:] = image.data
        copies.append(time.perf_counter() - middle)
        times.append(middle - start)
    start = time.perf_counter()
    await asyncio.gather(*(_ship_many(transfer, address, keys, image, repeats) for _ in range(MAX_IN_FLIGHT)))
    pipelined_s = (time.perf_counter() - start) / (MAX_IN_FLIGHT * max(1, repeats // MAX_IN_FLIGHT))
    alone_s = statistics.median(times)
    return TransferFigures(
        transport,
        size,
        alone_s * 1000,
        size / alone_s / 1e9,
        size / pipelined_s / 1e9,
        size / statistics.median(copies) / 1e9,
    )


async def _ship_many(
    transfer: EmbeddingTransfer, address: str, keys: Iterator[str], image: EncodedImage, repeats: int
) -> None:
    for _ in range(max(1, repeats // MAX_IN_FLIGHT)):
        await transfer.ship(address, next(keys), image)


def _image(size: int) -> EncodedImage:
    rows = size // _ROW_BYTES
    return EncodedImage(
        token_ids=(0,) * rows,
        grid_thw=(1, 2, 2 * rows),
        shape=(rows, _ROW_BYTES // 2),
        dtype=_DTYPE,
        data=memoryview(bytearray(os.urandom(size))),
    )


def format_transfer_figures(figures: Sequence[TransferFigures]) -> str:
    """A table in Markdown."""
    header = (
        "socket", "KiB", "alone, ms", "GB/s", f"{MAX_IN_FLIGHT} under way, GB/s", "memcpy, GB/s", "alone ÷ memcpy",
        "under way ÷ memcpy",
    )  # fmt: skip
    rows = [
        [
            one.transport,
            str(one.size_bytes >> 10),
            number(one.alone_ms, 2),
            number(one.alone_gb_s, 2),
            number(one.pipelined_gb_s, 2),
            number(one.memcpy_gb_s, 2),
            number(one.alone_gb_s / one.memcpy_gb_s, 2),
            number(one.pipelined_gb_s / one.memcpy_gb_s, 2),
        ]
        for one in figures
    ]
    return markdown_table(header, rows)
