"""Tokens of one sample to what a client sees: text, tool calls, and the log probabilities that belong to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from epd.types import FinishReason, TokenLogprobs
from proxy.dispatch.work import Update
from proxy.text.tokenizer import Detokenizer, StopChecker, Tokenizer
from proxy.tools.calls import CallDelta, ToolCall
from proxy.tools.reader import CallOptions, CallReader


class TextOptions(msgspec.Struct, frozen=True):
    """How text is made of tokens."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    """Stop strings that are complete before so many tokens do not end the answer."""
    skip_special_tokens: bool = True
    include_stop: bool = False
    """Show the stop string or token that ended the answer."""
    hides_stop_token: bool = False
    """Never show a token that ended the answer, though a stop string may be shown."""
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Tokens that end the answer where they stand in a row. They are shown."""
    continues_prompt: bool = False
    """The answer goes on with the prompt's text, as opposed to a turn of its own."""
    tells_end: bool = False
    """Log probabilities of the token that ended the answer are told though it is not shown."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that the client wants the answer to end with, as opposed to the model's own."""
    with_token_ids: bool = False
    """Whether the client wants the tokens beside the text."""
    with_pieces: bool = False
    """Whether the client wants the text token by token. Unless `include_stop`, what could begin a stop string is held
    back, and then told with the token that comes after it."""
    calls: CallOptions | None = None
    """How tool calls are read from the text; None: it has none."""


@dataclass
class Piece:
    """A token of the answer and what it adds to the text."""

    token_id: int
    text: str
    """Nothing while a character is incomplete, and for a token that is not shown."""
    logprob: float | None
    """When log probabilities came with it."""


@dataclass(frozen=True)
class ShownToken:
    """A token of the answer with its log probabilities."""

    offset: int
    """Where its text begins in the answer. Tokens that make one character together share it."""
    logprobs: TokenLogprobs


class _Unshown:
    """Log probabilities of tokens whose text is held back: part of a character, or of what may be a stop string."""

    def __init__(self) -> None:
        self._tokens: deque[ShownToken] = deque()
        self._made = 0
        """Length of the text that tokens made so far, shown or not."""

    def add(self, logprobs: TokenLogprobs, text: str) -> None:
        """A token came, and completed `text`."""
        self._tokens.append(ShownToken(self._made, logprobs))
        self._made += len(text)

    def take(self, shown: int | None) -> list[ShownToken]:
        """Those whose text begins within the first `shown` characters; all of them for None."""
        taken = []
        while self._tokens and (shown is None or self._tokens[0].offset < shown):
            taken.append(self._tokens.popleft())
        return taken


class Answer:
    """Text of one sample as it grows; the first of model, limit and stop string ends it."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions, prompt: Sequence[int] = ()) -> None:
        self._text = ""
        self._added: list[str] = []
        self.call_deltas: list[CallDelta] = []
        """All news of tool calls so far."""
        self.token_ids: list[int] | UnsetType = [] if options.with_token_ids else UNSET
        """All tokens so far, that which ended the answer included."""
        self.logprobs: list[ShownToken] = []
        """Tokens of `text`, when log probabilities came with them: none behind a stop string. The token that ended an
        answer is among them if it is shown, or if `TextOptions.tells_end` says so."""
        self.pieces: list[Piece] = []
        """All tokens, that which ended the answer included, if they are wanted; their texts make `text`."""
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self.completion_tokens = 0
        self.total_logprob = 0.0
        """Of all tokens counted, when log probabilities came with them."""
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            context=prompt if options.continues_prompt else (),
            shown_ids=options.calls.shown_ids if options.calls is not None else frozenset(),
        )
        self._stops = StopChecker(options.stop, include=options.include_stop)
        self._options = options
        self._reader = CallReader(options.calls.new_parser()) if options.calls is not None else None
        self._unshown = _Unshown()
        self._made = 0
        """Length of the text so far, whether it became content or tool calls."""
        self._tail: deque[int] = deque(maxlen=max(map(len, options.stop_sequences), default=0))
        self._has_sequence = False
        """A stop sequence was found."""
        self.ended_by: int | None = None
        """The token that ended it; None when something else did, or nothing yet."""
        self.is_plain = not (
            options.stop or options.stop_sequences or options.calls or options.with_pieces or options.with_token_ids
        )
        """Text is all that comes of a token, and nothing in it ends the answer."""

    @property
    def text(self) -> str:
        """All that was given out so far; besides, the text of tool calls that never became whole."""
        if self._added:  # joined when somebody asks: each addition to a long text would copy it
            self._text += "".join(self._added)
            self._added.clear()
        return self._text

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Those that are whole."""
        return self._reader.calls if self._reader is not None else []

    @property
    def reason(self) -> str:
        """Why it ended, as OpenAI words it: `stop`, `length` or `tool_calls`."""
        assert self.finish_reason is not None
        calls = self._options.calls
        if self.finish_reason is FinishReason.STOP and calls is not None and calls.ends_with_calls and self.tool_calls:
            return "tool_calls"
        return self.finish_reason  # a string itself

    @property
    def mean_logprob(self) -> float:
        """Per token; 0 when there is none."""
        return self.total_logprob / max(self.completion_tokens, 1)

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or token of the client's that ended it; None when something else did, or nothing yet."""
        if self._stops.matched is not None:
            return self._stops.matched
        return self.ended_by if self.ended_by in self._options.stop_token_ids else None

    def push(self, update: Update) -> str:
        """The new content, which may be empty; sets `finish_reason` at the end. See `call_deltas` for the rest."""
        if self.finish_reason is not None:
            return ""
        if self.is_plain and not (update.logprobs or update.prompt_logprobs):
            return self._push_plain(update)
        self.prompt_logprobs = self.prompt_logprobs or update.prompt_logprobs
        shown = len(update.token_ids) - self._ends_with_hidden_token(update)
        content = self._push_tokens(update.token_ids[:shown], update.logprobs[:shown])
        is_cut = self._is_cut
        if is_cut:
            self.finish_reason = FinishReason.STOP
        else:
            self._hide_tokens(update.token_ids[shown:], update.logprobs[shown:])
            if update.finish_reason is not None:
                content += self._read(self._flush())
                self.finish_reason, self.ended_by = update.finish_reason, update.stop_token_id
        if self.finish_reason is not None:
            content += self._finish_reading()
        is_whole = self.finish_reason is not None and not is_cut
        self.logprobs += self._unshown.take(None if is_whole else self._made)
        return content

    def _push_plain(self, update: Update) -> str:
        """The short way of most updates: text is all that comes of them."""
        token_ids = update.token_ids
        self.completion_tokens += len(token_ids)
        if update.finish_reason is None:
            text = self._detokenizer.push(token_ids)
        else:
            shown = token_ids[:-1] if self._ends_with_hidden_token(update) else token_ids
            text = self._detokenizer.push(shown) + self._detokenizer.flush()
            self.finish_reason, self.ended_by = update.finish_reason, update.stop_token_id
            self.logprobs += self._unshown.take(None)  # an end that came alone
        self._made += len(text)
        self._added.append(text)
        return text

    def _push_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> str:
        """One by one, so that tokens after what ends the answer are neither shown nor counted."""
        pieces = []
        for index, token_id in enumerate(token_ids):
            known = logprobs[index : index + 1]
            self._count((token_id,), known)
            text = self._detokenizer.push((token_id,))
            for one in known:
                self._unshown.add(one, text)
            if self.completion_tokens >= self._options.min_tokens:
                text = self._stops.push(text)
            self._note_piece(token_id, text, known)
            if self._ends_in_sequence(token_id):
                text += self._flush()
            pieces.append(self._read(text))
            if self._is_cut:
                break
        return "".join(pieces)

    @property
    def _is_cut(self) -> bool:
        """Whether the answer has ended by what its text is."""
        return self.has_stop or (self._reader is not None and self._reader.is_over)

    @property
    def has_stop(self) -> bool:
        """Whether one of the client's stop strings or sequences ended the answer."""
        return self._stops.matched is not None or self._has_sequence

    def _read(self, text: str) -> str:
        """What of the text is content."""
        self._made += len(text)
        if self._reader is None:
            self._added.append(text)
            return text
        return self._note(*self._reader.push(text))

    def _finish_reading(self) -> str:
        return "" if self._reader is None else self._note(*self._reader.finish())

    def _note(self, told: str, whole: str, deltas: list[CallDelta]) -> str:
        self._added.append(whole)
        self.call_deltas += deltas
        return told

    def _hide_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """The token that ended the answer, where it is not shown."""
        self._count(token_ids, logprobs)
        self._tell_end(logprobs)
        for token_id in token_ids:
            self._note_piece(token_id, "", logprobs)

    def _ends_in_sequence(self, token_id: int) -> bool:
        if not self._options.stop_sequences:
            return False
        self._tail.append(token_id)
        tail, is_early = tuple(self._tail), self.completion_tokens < self._options.min_tokens
        self._has_sequence = not is_early and any(tail[-len(one) :] == one for one in self._options.stop_sequences)
        return self._has_sequence

    def _note_piece(self, token_id: int, text: str, logprobs: Sequence[TokenLogprobs]) -> None:
        if self._options.with_pieces:
            self.pieces.append(Piece(token_id, text, logprobs[0].logprob if logprobs else None))

    def _count(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        self.completion_tokens += len(token_ids)
        self.total_logprob += sum(one.logprob for one in logprobs)
        if self.token_ids is not UNSET:
            self.token_ids.extend(token_ids)

    def _tell_end(self, logprobs: Sequence[TokenLogprobs]) -> None:
        if self._options.tells_end:
            for one in logprobs:
                self._unshown.add(one, "")

    def _flush(self) -> str:
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        if text and self.pieces:
            self.pieces[-1].text += text
        return text

    def _ends_with_hidden_token(self, update: Update) -> bool:
        ended_by, options = update.stop_token_id, self._options
        is_shown = options.include_stop and not options.hides_stop_token
        return ended_by is not None and update.token_ids[-1:] == [ended_by] and not is_shown
