"""One sample's content and tool calls, as they grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.tools.calls import CallBroken, CallClosed, CallDelta, Piece, ToolCall
from proxy.tools.parsers import CallParser


@dataclass(frozen=True)
class CallOptions:
    """How calls are read from answers of one request."""

    new_parser: Callable[[], CallParser]
    """Makes one for each sample."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens that the parser needs to see, whether or not the client does."""
    ends_with_calls: bool = True
    """Whether calls are the reason to finish. They are not where the client named the function to call."""


class CallReader:
    """Reads one sample.

    Args:
        parser: new.
    """

    def __init__(self, parser: CallParser) -> None:
        self.calls: list[ToolCall] = []
        """Those that are whole."""
        self._parser = parser
        self._open: list[CallDelta] = []
        """What was told of the call that is being read."""

    @property
    def is_over(self) -> bool:
        """Whether the last call that is wanted has ended."""
        return self._parser.is_over

    def push(self, text: str) -> tuple[str, str, list[CallDelta]]:
        """Read on.

        Returns:
            What is new: content as streams tell it; content of the whole answer, which also has the text of calls that
            never became whole ones; and news of calls.
        """
        return self._sort(self._parser.push(text))

    def finish(self) -> tuple[str, str, list[CallDelta]]:
        """What was held back, at the end of the answer; see `push`."""
        return self._sort(self._parser.finish())

    def _sort(self, pieces: list[Piece]) -> tuple[str, str, list[CallDelta]]:
        told, whole, deltas = "", "", []
        for piece in pieces:
            match piece:
                case str():
                    told += piece
                    whole += piece
                case CallDelta():
                    deltas.append(piece)
                    self._open.append(piece)
                case CallClosed():
                    self._close()
                case CallBroken():
                    self._open.clear()
                    whole += piece.text
        return told, whole, deltas

    def _close(self) -> None:
        first, arguments = self._open[0], "".join(delta.arguments for delta in self._open)
        self.calls.append(ToolCall(first.id or "", first.name or "", arguments))
        self._open.clear()
