"""Fields by which prompts are cut to a length, or lengthened by the tokenizer's own tokens."""

from __future__ import annotations

from typing import Literal, Protocol

from epd.errors import InvalidRequest
from proxy.models.served_model import ServedModel
from proxy.text.chat_template import Prompt
from proxy.text.cutting import Cut
from proxy.text.tokenizer import Tokenizer


class CanBeCut(Protocol):
    """A request whose prompt may be cut."""

    truncate_prompt_tokens: int | None
    truncation_side: Literal["left", "right"] | None


def cut_of(
    request: CanBeCut, model: ServedModel, completion: int | None, side: Literal["left", "right"] = "left"
) -> Cut | None:
    """How a prompt that is too long is to be cut; None: it is not.

    Args:
        request: that says so.
        model: knows the context.
        completion: tokens that must fit behind the prompt; None: one.
        side: of the prompt that goes, where the request does not say.

    Raises:
        InvalidRequest: nothing would be left, or there is a side and no length.
    """
    length = request.truncate_prompt_tokens
    if length is None:
        if request.truncation_side is not None:
            raise InvalidRequest("truncation_side needs truncate_prompt_tokens.", param="truncation_side")
        return None
    if length == 0:
        raise InvalidRequest("truncate_prompt_tokens: 0 leaves no prompt.", param="truncate_prompt_tokens")
    if length < 0:
        length = model.max_model_len - (1 if completion is None else completion)
    keeps_end = (request.truncation_side or side) == "left"
    return Cut(length, keeps_end) if length > 0 else None  # no room, or none known: refused or not as without


def cut_chat(prompt: Prompt, cut: Cut | None) -> Prompt:
    """The prompt of a conversation, made to fit.

    Raises:
        InvalidRequest: it holds pictures, of which no half can be sent.
    """
    if cut is None or len(prompt.token_ids) <= cut.tokens:
        return prompt
    if prompt.image_offsets:
        raise InvalidRequest("truncate_prompt_tokens does not go with images.", param="truncate_prompt_tokens")
    return Prompt(tuple(cut.of_tokens(prompt.token_ids)), ())


def with_special_tokens(prompt: Prompt, tokenizer: Tokenizer) -> Prompt:
    """The prompt with what the tokenizer puts around texts."""
    before, behind = tokenizer.around
    offsets = tuple(offset + len(before) for offset in prompt.image_offsets)
    return Prompt((*before, *prompt.token_ids, *behind), offsets)
