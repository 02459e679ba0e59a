"""What a step computes of each request. Integers only."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from workers.engine.request import EngineRequest


class ScheduledChunk(msgspec.Struct, frozen=True):
    """Tokens [start, start + length) of a request are computed in this step."""

    request: EngineRequest
    start: int
    length: int
    block_table: tuple[int, ...]
    """Blocks that cover tokens [0, start + length), and perhaps some more."""
    is_last: bool
    """Whether the chunk reaches the last token that the request has."""
    is_decode: bool = False
    """Whether it is the one token behind those that the request has made so far, and no part of a prompt."""

    @property
    def end(self) -> int:
        """One past the last token of the chunk."""
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether its output gives the request's next token."""
        return self.is_last and self.request.pooling is None


def in_batch_order(chunks: Iterable[ScheduledChunk]) -> list[ScheduledChunk]:
    """The order of a step's rows: chunks of one token first, short contexts before long ones, as attention wants."""
    return sorted(chunks, key=_batch_order)


def _batch_order(chunk: ScheduledChunk) -> tuple[bool, int]:
    return chunk.length > 1, chunk.start + chunk.length
