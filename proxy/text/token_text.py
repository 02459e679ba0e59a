"""Single tokens as bytes and text: what log probabilities are reported for.

A token is often no whole character, and its text in an answer depends on its neighbours. Here each stands for itself:
the bytes of an answer's tokens, joined, are the answer's bytes (up to a leading space that some decoders strip).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

from proxy.text.byte_level import BYTES_OF

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_Step = Callable[[str], str]


class TokenTexts:
    """Bytes and text of each token of a vocabulary.

    Args:
        backend: the tokenizer.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._literals = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
        decoders = list(_flat(json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}))
        self._steps = [step for one in decoders for step in _steps(one)]
        kinds = {one.get("type") for one in decoders}
        self._is_byte_level = "ByteLevel" in kinds
        self._falls_back_to_bytes = "ByteFallback" in kinds
        self._known: dict[int, tuple[bytes, str]] = {}
        """What was asked for before: no more than the vocabulary has."""

    def raw(self, token_id: int) -> bytes:
        """The token's bytes, perhaps part of a character; none for an id that has no token."""
        return self._both(token_id)[0]

    def text(self, token_id: int) -> str:
        """The token as text, with U+FFFD for bytes that are no whole character."""
        return self._both(token_id)[1]

    def _both(self, token_id: int) -> tuple[bytes, str]:
        known = self._known.get(token_id)
        if known is None:
            raw = self._make(token_id)
            known = raw, raw.decode(errors="replace")
            if raw:
                self._known[token_id] = known
        return known

    def _make(self, token_id: int) -> bytes:
        literal = self._literals.get(token_id)
        if literal is not None:
            return literal.encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level:
            return b"".join(BYTES_OF.get(letter, letter.encode()) for letter in piece)
        byte = _BYTE.fullmatch(piece) if self._falls_back_to_bytes else None
        if byte is not None:
            return bytes((int(byte[1], 16),))
        for step in self._steps:
            piece = step(piece)
        return piece.encode()


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for one in decoder["decoders"]:
            yield from _flat(one)
    else:
        yield decoder


def _steps(decoder: dict[str, Any]) -> Iterator[_Step]:
    """What a decoder does to a piece that stands alone."""
    match decoder:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            yield lambda piece: piece.replace(old, new)
        case {"type": "Metaspace", "replacement": str(blank)}:
            yield lambda piece: piece.replace(blank, " ")
        case {"type": "WordPiece", "prefix": str(prefix)}:
            yield lambda piece: piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}"
        case {"type": "BPEDecoder", "suffix": str(suffix)}:
            yield lambda piece: piece.replace(suffix, " ")
        case _:
            pass
