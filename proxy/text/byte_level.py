"""Byte-level vocabularies, whose tokens are bytes written as letters: those of GPT-2, Llama 3, Qwen and many more."""

from __future__ import annotations

import json
from codecs import utf_8_decode
from typing import Any

import tokenizers

REPLACEMENT = "\ufffd"
"""What a decoder prints for bytes that are no whole character."""


def _alphabet() -> dict[str, bytes]:
    """The letters by which byte-level vocabularies write bytes: printable ones stand for themselves, the others follow
    from U+0100 on (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): bytes((byte,)) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes((byte,)) for index, byte in enumerate(others)}


BYTES_OF = _alphabet()


class ByteTable:
    """Bytes of each token as the library's byte-level decoder gives them, looked up once for each token of the
    vocabulary: the library itself decodes several tokens anew for each one that comes.

    Args:
        backend: the tokenizer; its decoder is byte-level and nothing else.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.texts: dict[int, str] = {}
        """Tokens of whole characters that were asked for before, and their text."""
        self._parts: dict[int, bytes] = {}
        """The others: their text depends on their neighbours."""

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> ByteTable | None:
        """The table of a tokenizer; None where its decoder does something else."""
        decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        return cls(backend) if [step.get("type") for step in steps] == ["ByteLevel"] else None

    def raw(self, token_id: int) -> bytes:
        """The token's bytes, perhaps part of a character; none for an id that has no token."""
        text = self.texts.get(token_id)
        if text is not None:
            return text.encode()
        part = self._parts.get(token_id)
        return self._look_up(token_id) if part is None else part

    def _look_up(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""  # not kept: there are more such ids than tokens
        # A piece with any other letter, as added tokens may have, is written as it is.
        is_written = all(letter in BYTES_OF for letter in piece)
        raw = b"".join(BYTES_OF[letter] for letter in piece) if is_written else str(piece).encode()
        text = raw.decode(errors="replace")
        if REPLACEMENT in text:
            self._parts[token_id] = raw
        else:
            self.texts[token_id] = text
        return raw


class ByteDetokenizer:
    """Tokens of one answer to text by their bytes; holds back what does not end in a whole character.

    Args:
        table: of the tokenizer.
        hidden: tokens that make no text.
    """

    def __init__(self, table: ByteTable, hidden: frozenset[int]) -> None:
        self._table = table
        self._texts = table.texts
        self._hidden = hidden
        self._held = b""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token_id in self._hidden:
            return ""
        if not self._held:
            text = self._texts.get(token_id)
            if text is not None:
                return text
        raw = self._held + self._table.raw(token_id)
        # Only what may yet become a character is held: a model can go on with broken bytes for ever.
        text, length = utf_8_decode(raw, "replace")
        self._held = raw[length:]
        return text

    def flush(self) -> str:
        """What is left at the end: a character that the model did not finish, as U+FFFD."""
        text, self._held = self._held.decode(errors="replace"), b""
        return text
