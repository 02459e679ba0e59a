"""Prompts that are too long, cut to the length that their request names instead of being refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Cut:
    """How much of a prompt is kept, and which end of it."""

    tokens: int
    """At most so many."""
    keeps_end: bool = True
    """The beginning goes; else the end does."""

    def of_text(self, text: str, longest_token: int) -> str:
        """As much of a text as matters, whose tokens are then cut: no work is put into the rest.

        Args:
            text: of the prompt.
            longest_token: of the tokenizer, in characters.
        """
        size = self.tokens * longest_token
        if len(text) <= size:
            return text
        return text[-size:] if self.keeps_end else text[:size]

    def of_tokens(self, token_ids: Sequence[T], before: int = 0, behind: int = 0) -> list[T]:
        """The tokens that are kept.

        Args:
            token_ids: of the prompt.
            before: of its first tokens are the tokenizer's own, and stay.
            behind: of its last ones.
        """
        excess = len(token_ids) - self.tokens
        if excess <= 0:
            return list(token_ids)
        end = len(token_ids) - behind
        inner = token_ids[before:end]
        kept = inner[excess:] if self.keeps_end else inner[: max(len(inner) - excess, 0)]
        return [*token_ids[:before], *kept, *token_ids[end:]]
