"""Reads the stream of one chat answer and notes when what came."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import msgspec

from epd.bench.statistics import Record


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode
_MAX_ERROR_BYTES = 64 << 10


class AnswerReader:
    """Takes the bytes of one answer (server-sent events, or an error's JSON) as they arrive.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._rest = b""
        self._last = math.nan
        self._gaps_ms: list[float] = []
        self._ttft_ms: float | None = None
        self._chunks = 0
        self._usage: _Usage | None = None
        self._has_finished = False
        self._error: str | None = None
        self.body = b""
        """Everything that is no event, for messages about errors."""

    def feed(self, data: bytes) -> None:
        """Take some bytes, cut anywhere."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take_line(line)

    def _take_line(self, line: bytes) -> None:
        if not line.startswith(b"data:"):
            if len(self.body) < _MAX_ERROR_BYTES:
                self.body += line
            return
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        try:
            self._take_chunk(_decode(payload))
        except msgspec.DecodeError:
            self._error = "malformed event"

    def _take_chunk(self, chunk: _Chunk) -> None:
        if chunk.error is not None:
            self._error = "error in the stream"
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                self._has_finished = True
            delta = choice.delta
            if choice.text or (delta is not None and (delta.content or delta.reasoning_content)):
                self._note_text()

    def _note_text(self) -> None:
        now = self._clock()
        self._chunks += 1
        if self._chunks == 1:
            self._ttft_ms = (now - self._start) * 1000
        else:
            self._gaps_ms.append((now - self._last) * 1000)
        self._last = now

    def record(self, kind: str, start_ms: float, *, status: int | None = None, error: str | None = None) -> Record:
        """What has come of the request: call it when the answer is complete or has failed.

        Args:
            kind: of the request.
            start_ms: when it began, since the run began.
            status: HTTP status, if there was an answer.
            error: kind of failure that the caller saw.
        """
        if self._rest:
            self._take_line(self._rest)
            self._rest = b""
        usage = self._usage or _Usage()
        return Record(
            kind=kind,
            start_ms=start_ms,
            error=error or self._failure(status),
            ttft_ms=self._ttft_ms,
            e2e_ms=(self._clock() - self._start) * 1000,
            gaps_ms=tuple(self._gaps_ms),
            output_tokens=self._chunks if usage.completion_tokens is None else usage.completion_tokens,
            prompt_tokens=usage.prompt_tokens,
        )

    def _failure(self, status: int | None) -> str | None:
        if status is not None and status != 200:
            return f"http {status}"
        if self._error is not None:
            return self._error
        if not self._chunks:
            return "no text"
        return None if self._has_finished else "cut off"
