"""Text to tokens and back, on the `tokenizers` library alone.

`Tokenizer` is shared by all requests; `Detokenizer` and `StopChecker` belong to one answer each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from epd.errors import ConfigError
from proxy.text.ascii_encoder import AsciiEncoder
from proxy.text.byte_level import REPLACEMENT, ByteDetokenizer, ByteTable

_CONTEXT = 8
"""Tokens that decide how the next one is read: more than a character has bytes."""
_MOST_HELD = 32
"""Tokens that wait for the end of a character: so many have none."""
_LONG = 4096
"""Tokens from which the library's call for many texts is used: it lets other threads go on."""
_LONG_TEXT = 1 << 14
"""Characters from which the library encodes, for the same reason."""

# Texts come one by one, and to hand one to the library's own threads takes as long as to encode it here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: its tokenizer.json.

    Raises:
        ConfigError: the file is missing or not a tokenizer.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"{path} is missing: the proxy needs a checkpoint with a fast tokenizer")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} is no tokenizer: {error}") from error
        # A checkpoint may ship with these set for training; a prompt must never be cut or filled silently.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.longest_token = max(map(len, self.backend.get_vocab()), default=1)
        """Characters of the longest token, at least: a text has no fewer tokens than its length by this."""
        self.vocab_size = int(self.backend.get_vocab_size(with_added_tokens=True))
        """Number of token ids, added ones included."""
        self.bytes = ByteTable.of(self.backend)
        """For byte-level tokenizers, the short way to text."""
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.added_ids = {token.content: index for index, token in added.items()}
        """Tokens that stand for their literal in any text, special or not, by that literal."""
        self.around = self._find_around()
        """What the tokenizer itself puts before and behind a text."""
        self._has_around = self.around != ((), ())
        self._ascii = AsciiEncoder.of(self.backend)
        self._literals = _Literals(token.content for token in added.values())
        normalized = [token.content for token in added.values() if token.normalized]
        self._normalized = _Literals(normalized)
        self._after_normalization = _Literals(map(self._normalize, normalized))
        self._can_hide = self.backend.normalizer is not None and bool(self._normalized)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; literals of added tokens in it become those tokens."""
        if self._ascii is not None and len(text) < _LONG_TEXT and not (add_special_tokens and self._has_around):
            return self._ascii.encode(text)
        return self._encode(text, add_special_tokens)

    def _find_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        probe = self.backend.encode("a", add_special_tokens=True)
        own = probe.special_tokens_mask
        before = own.index(0) if 0 in own else len(own)
        behind = own[::-1].index(0) if 0 in own else 0
        return tuple(probe.ids[:before]), tuple(probe.ids[len(own) - behind :])

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Token ids of two texts in one sequence, with what the tokenizer puts around and between them."""
        return self._encode((first, second), True)

    def _encode(self, text: str | tuple[str, str], add_special_tokens: bool) -> list[int]:
        # The plain `encode` also finds out where each token stands in the text, which nobody asks for.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        if len(token_ids) < _LONG:
            return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        (text,) = self.backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_id(self, literal: str) -> int | None:
        """The id of a token by its exact text."""
        index = self.backend.token_to_id(literal)
        return None if index is None else int(index)

    def find_added_tokens(self, text: str) -> list[tuple[int, int]]:
        """Half-open spans of all literals of added tokens in `text`, overlapping ones too."""
        return self._literals.find(text)

    def could_hold_added_token(self, text: str) -> bool:
        """Whether `text` holds a literal, or one could arise where it touches its neighbours."""
        return self._literals.touches(text)

    def hides_added_token(self, text: str) -> bool:
        """Whether normalisation (NFKC, say) turns part of `text` into a literal that is not there verbatim."""
        if not self._can_hide:
            return False
        return len(self._after_normalization.find(self._normalize(text))) > len(self._normalized.find(text))

    def _normalize(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


class _Literals:
    """The texts of added tokens. Runs of blanks are no control tokens, and single characters can't be cut."""

    def __init__(self, contents: Iterable[str]) -> None:
        literals = sorted({text for text in contents if len(text) > 1 and not text.isspace()}, key=len, reverse=True)
        # A lookahead finds overlapping matches; the group says how long each is.
        self._pattern = re.compile(f"(?=({'|'.join(map(re.escape, literals))}))") if literals else None
        heads = {text[:length] for text in literals for length in range(1, len(text))}
        tails = {text[-length:] for text in literals for length in range(1, len(text))}
        self._heads = {end: tuple(head for head in heads if head[-1] == end) for end in {head[-1] for head in heads}}
        """By their last letters; and the tails by their first ones."""
        self._tails = {start: tuple(tail for tail in tails if tail[0] == start) for start in {one[0] for one in tails}}

    def __bool__(self) -> bool:
        return self._pattern is not None

    def find(self, text: str) -> list[tuple[int, int]]:
        if self._pattern is None:
            return []
        return [match.span(1) for match in self._pattern.finditer(text)]

    def touches(self, text: str) -> bool:
        if self._pattern is None:
            return False
        if self._pattern.search(text):
            return True
        trimmed = text.strip()  # as templates do
        return self._touches_border(text) or (len(trimmed) < len(text) and self._touches_border(trimmed))

    def _touches_border(self, text: str) -> bool:
        heads, tails = self._heads.get(text[-1:], ()), self._tails.get(text[:1], ())
        return (bool(heads) and text.endswith(heads)) or (bool(tails) and text.startswith(tails))


class Detokenizer:
    """Tokens of one answer to text, never a broken character before the end.

    Args:
        tokenizer: of the model.
        skip_special_tokens: leave special tokens out of the text.
        context: tokens that stand before the answer, when it goes on with their text: some decoders strip the blank
            at the beginning of a text.
        shown_ids: special tokens that are not left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        if shown_ids:
            hidden = hidden - shown_ids
        self._one: ByteDetokenizer | _StreamDetokenizer
        if tokenizer.bytes is not None:
            self._one = ByteDetokenizer(tokenizer.bytes, hidden)
        else:
            self._one = _StreamDetokenizer(tokenizer, hidden, context)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty while a character is incomplete."""
        if len(token_ids) == 1:
            return self._one.push(token_ids[0])
        return "".join(map(self._one.push, token_ids))

    def flush(self) -> str:
        """What is left at the end: a character that the model did not finish, as U+FFFD."""
        return self._one.flush()


class _StreamDetokenizer:
    """Any tokenizer's, by the library.

    Args:
        tokenizer: of the model.
        hidden: tokens that make no text.
        context: as for `Detokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], context: Sequence[int]) -> None:
        self._backend = tokenizer.backend
        self._hidden = hidden
        known = [token_id for token_id in context[-_CONTEXT:] if token_id not in hidden]
        if self._decode(known).endswith(REPLACEMENT):
            known = []  # a character that the answer may complete: its text would come twice
        # Special tokens are left out here: the library would go through a row of them again for each one.
        self._stream = DecodeStream(ids=known, skip_special_tokens=False)
        self._held: list[int] = []
        self._last = known[-1:]
        """The last token that ended in a whole character."""

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._held.append(token_id)
        piece = self._step(token_id)
        if piece is None:
            return self._without_end() if len(self._held) >= _MOST_HELD else ""
        self._held.clear()
        self._last = [token_id]
        return piece

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self._backend, token_id)
        except Exception:  # the library raises bare Exception
            # Broken bytes can change how a byte-fallback decoder reads the text before them, which was sent already.
            # So take what is new for itself, and go on from the last token, which ends in a whole character.
            self._stream = DecodeStream(skip_special_tokens=False)
            self._stream.step(self._backend, token_id)
            return self._decode(self._held)

    def _without_end(self) -> str:
        """The text of a row of broken bytes, which a model can make as long as it likes."""
        text = self._decode(self._held)
        if not text.endswith(REPLACEMENT):
            return ""
        self._held.clear()
        self._stream = DecodeStream(ids=self._last, skip_special_tokens=False)
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def flush(self) -> str:
        text = self._decode(self._held)
        self._held.clear()
        return text if REPLACEMENT in text else ""


class StopChecker:
    """Cuts an answer at the first stop string, also when it comes in pieces.

    Text that could be the beginning of a stop string is held back until it is decided, unless it is to be shown anyway.

    Args:
        stops: non-empty strings.
        include: cut behind the stop string instead of before it.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._pending = ""
        self._sent = 0
        """How much of it was given out already."""
        self.matched: str | None = None
        """The stop string that ended the answer."""

    def push(self, text: str) -> str:
        """The text that is safe to send now. After a match nothing comes any more."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._pending += text
        cut = self._earliest_match()
        if cut is not None:
            safe, self._pending = self._pending[self._sent : cut], ""
            self._sent = 0
            return safe
        start = len(self._pending) - self._held_length()
        safe = self._pending[self._sent : len(self._pending) if self._include else start]
        self._pending = self._pending[start:]
        self._sent = len(self._pending) if self._include else 0
        return safe

    def flush(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        text, self._pending, self._sent = self._pending[self._sent :], "", 0
        return text

    def _earliest_match(self) -> int | None:
        """The match that is complete first, the longest of several: the same however the text was cut in pieces."""
        found = [
            (self._pending.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in self._pending
        ]
        if not found:
            return None
        end, _, self.matched = min(found)
        return end if self._include else end - len(self.matched)

    def _held_length(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(self._pending))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stops):
                return length
        return 0
