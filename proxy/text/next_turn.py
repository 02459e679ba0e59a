"""Tokens that lead from an answer to the next one, so that a conversation grows by its end alone.

    stored tokens, which end with an answer | end of its turn, new messages, header of the next answer

Tokens that have been computed once are never made again: the text of an answer often has other tokens than those that
the model chose, and another beginning finds nothing in the prefix cache. What follows an answer is what the
checkpoint's chat template writes behind one in a conversation of dummies. Whether that is the whole truth is tried once
for each model: there are templates that change what they wrote before, or that count turns.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

from epd.errors import InvalidRequest
from proxy.text.chat_template import ChatTemplate
from proxy.text.tokenizer import Tokenizer
from proxy.text.user_text import Message

log = logging.getLogger(__name__)

_ANCHOR = "b"
"""Some tokenizers treat the beginning of a text in a way of their own, so what is encoded begins behind this."""


class NextTurn:
    """Encodes what follows an answer.

    Args:
        template: of the model.
        tokenizer: of the same model.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self.works = self._try()
        """Whether the template writes conversations in a way that can be gone on with."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens from the end of an answer to the beginning of the next.

        The token that ended the answer is among them, as the template writes it.

        Args:
            messages: new ones, the user's and perhaps others.

        Raises:
            InvalidRequest: the template refused the messages, or can't be gone on with.
        """
        if not self.works:
            raise InvalidRequest(
                "The chat template of this model can't be gone on with turn by turn; send whole conversations to "
                "/v1/chat/completions."
            )
        pieces = self._template.pieces((messages, ()), lambda new: self._behind(_said("user", "hello"), new[0]))
        first, *others = pieces or [""]
        encoded = (self._behind_anchor(first), *map(self._tokenizer.encode, others))
        return tuple(token for token_ids in encoded for token in token_ids)

    def _behind(self, before: Sequence[Message], messages: Sequence[Message]) -> str:
        """What the template writes behind an answer to `before`."""
        answer = f"\ue000{secrets.token_hex(8)}\ue001"
        _, found, text = self._template.render([*before, *_said("assistant", answer), *messages]).rpartition(answer)
        if not found:
            raise InvalidRequest("The chat template of this model does not show answers.")
        return text

    def _behind_anchor(self, piece: str) -> list[int]:
        anchor, token_ids = self._tokenizer.encode(_ANCHOR), self._tokenizer.encode(_ANCHOR + piece)
        is_apart = token_ids[: len(anchor)] == anchor
        return token_ids[len(anchor) :] if is_apart else self._tokenizer.encode(piece)

    def _try(self) -> bool:
        """Whether a short conversation comes out as if it had been encoded as a whole."""
        question, answer = _said("user", "hello"), _said("assistant", _ANCHOR)
        try:
            text = self._template.render([*question, *answer, *question])
            tail = self._behind(question, question)
            is_constant = tail == self._behind([*question, *answer, *question], question)
            head = text.removesuffix(tail)
            whole = self._tokenizer.encode(text)
            grown = self._tokenizer.encode(head) + self._behind_anchor(tail)
        except InvalidRequest as error:
            log.info("sessions of this model have one turn: %s", error.message)
            return False
        if not (is_constant and head.endswith(_ANCHOR) and whole == grown):
            log.info("sessions of this model have one turn: its chat template does not only add to what it wrote")
            return False
        return True


def _said(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}]
