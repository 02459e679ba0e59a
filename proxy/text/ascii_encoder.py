"""A short way to the tokens of ASCII text, for byte-level BPE: the tokenizers of GPT-2, Llama 3, Qwen and many more.

The library normalises a text, cuts it where its expression says, writes each piece in letters for bytes and gives that
to the model; on the way it keeps account of where each letter came from, which takes most of its time. Of ASCII text
nothing changes on the way, and the same pieces come again and again: so cut here, and ask the model about each once.

    text → added tokens | texts between them → pieces → tokens as the model gave them before

Tokens are those of the library, or this class is not used: what it does not know by name it leaves alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain, product
from typing import Any

import tokenizers
from tokenizers import models

from proxy.text.byte_level import BYTES_OF

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How the library's `ByteLevel` cuts when it does so itself."""
_PROPERTIES = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "N": "0-9"}
"""Letters and digits of Unicode, as far as they are ASCII."""
_CLASS = r"\[\^?(?:\\p\{\w+\}|\\[srntd]|\\[^\w\s]|[^]\[\\&^])+\]"
_ANY_CLASS = re.compile(rf"{_CLASS}|\\p\{{\w+\}}")
_PROPERTY = re.compile(r"\\p\{(\w+)\}")
_KNOWN_SYNTAX = re.compile(
    rf"(?:{_CLASS}|\\p\{{\w+\}}|\\[srntdS]|\\[^\w\s]|\(\?(?:i?:|[!=])|\{{\d+(?:,\d*)?\}}(?!\+)|[^](\[\\{{}}.^$])+"
)
"""Expressions that mean the same to both libraries once they speak of ASCII alone."""
_LETTERS = {raw[0]: letter for letter, raw in BYTES_OF.items()}
_MOST_KEPT = 1 << 15
_LONGEST_KEPT = 24
"""Of pieces, that are kept: some 10 MB at most. Hardly any in real text are longer."""
_PROBE = (
    "".join(map("".join, product("aZ0 \n\r\t\v'.<_", repeat=3)))
    + " I'll they'RE it'd 'Ve we'm can'T 12345 \x00\f\x1c\x1f\x7f"
)


class AsciiEncoder:
    """Encodes like the library. Made by `of`.

    Args:
        backend: the library's tokenizer.
        cut: gives the pieces of an ASCII text that holds no added token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, cut: Callable[[str], list[str]]) -> None:
        self._backend = backend
        self._cut = cut
        self._added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        literals = sorted(self._added, key=len, reverse=True)  # of two that begin alike the longer one counts
        self._literals = re.compile(f"({'|'.join(map(re.escape, literals))})") if literals else None
        self._tokens = _Pieces(backend.model).__getitem__

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> AsciiEncoder | None:
        """The short way of a tokenizer; None where there is none."""
        pattern = _pattern(backend) if _is_plain(backend) else None
        if pattern is None:
            return None
        try:  # what the expression leaves out is a piece as well
            cut = re.compile(f"{pattern}|(?:(?!{pattern})[\\s\\S])+", re.ASCII).findall
        except (re.error, OverflowError):  # the library takes what Python does not, such as `a{2}{3}`
            return None
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(_PROBE)]
        return cls(backend, cut) if pieces == [piece.translate(_LETTERS) for piece in cut(_PROBE)] else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without what the tokenizer puts around it."""
        if self._literals is None:
            return self._between(text)
        token_ids: list[int] = []
        for index, part in enumerate(self._literals.split(text)):
            if index % 2:
                token_ids.append(self._added[part])
            elif part:
                token_ids += self._between(part)
        return token_ids

    def _between(self, text: str) -> list[int]:
        if text.isascii():
            return list(chain.from_iterable(map(self._tokens, self._cut(text))))
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)


class _Pieces(dict[str, tuple[int, ...]]):
    """The tokens of pieces that came before."""

    def __init__(self, model: models.Model) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, piece: str) -> tuple[int, ...]:
        token_ids = tuple(token.id for token in self._model.tokenize(piece.translate(_LETTERS)))
        if len(piece) <= _LONGEST_KEPT:
            if len(self) >= _MOST_KEPT:
                self.clear()
            self[piece] = token_ids
        return token_ids


def _is_plain(backend: tokenizers.Tokenizer) -> bool:
    """Whether ASCII text is normalised to itself, pieces have tokens of their own, and added tokens are literals."""
    added = backend.get_added_tokens_decoder().values()
    normalizer = _state(backend.normalizer)
    return (
        isinstance(backend.model, models.BPE)
        and not backend.model.dropout
        and normalizer.get("type") in (None, "NFC")
        and not backend.encode_special_tokens
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and len({token.normalized for token in added}) < 2  # else one kind is looked for before the other
        and (not normalizer or not any(token.normalized for token in added))
    )


def _pattern(backend: tokenizers.Tokenizer) -> str | None:
    """Python's expression for the pieces of ASCII text, as one group; None where they are not found by one."""
    state = _state(backend.pre_tokenizer)
    steps = state["pretokenizers"] if state.get("type") == "Sequence" else [state]
    if not steps:
        return None
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(splits) != (not last["use_regex"]):
        return None
    if last["use_regex"]:
        return _in_ascii(_GPT2)
    (split,) = splits
    if split.get("type") != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return _in_ascii(split["pattern"].get("Regex", ""))


def _in_ascii(pattern: str) -> str | None:
    if not _KNOWN_SYNTAX.fullmatch(pattern) or not set(_PROPERTY.findall(pattern)) <= _PROPERTIES.keys():
        return None
    return f"(?:{_ANY_CLASS.sub(_class_in_ascii, pattern)})"


def _class_in_ascii(match: re.Match[str]) -> str:
    """A class of characters, or a property, which is one."""
    found = match[0] if match[0].startswith("[") else f"[{match[0]}]"
    inner = _PROPERTY.sub(lambda name: _PROPERTIES[name[1]], found)
    return {"[]": "(?!)", "[^]": r"[\s\S]"}.get(inner, inner)


def _state(step: Any) -> dict[str, Any]:
    """What the library would save of a step of the tokenizer; empty: there is no such step."""
    state: dict[str, Any] = {} if step is None else json.loads(step.__getstate__())
    return state
