"""Prompts that no template has made: text with markers where its pictures go, or token ids.

Whoever writes a raw prompt writes its control tokens too, so literals of added tokens mean those tokens here. Each
family has its own marker, the one placeholder that its chat template writes for a picture. What else clients write:

    Qwen-VL      <|vision_start|><|vision_end|>                 the placeholder between them may be left out
    InternVL     <image>, <img></img>, <img><IMG_CONTEXT></img>
    all          <image> or <img></img>, when there are pictures and none of the model's own markers

Pictures fill markers in order, and there must be as many of one as of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from epd.checkpoint import ImagePlaceholder
from epd.errors import InvalidRequest
from proxy.api.openai.prompt import naming
from proxy.api.openai.sampling import check_token_ids
from proxy.models.served_model import ServedModel
from proxy.text.chat_template import Prompt
from proxy.text.tokenizer import Tokenizer

_QWEN_VL = "<|image_pad|>"
_INTERN_VL = "<IMG_CONTEXT>"
_BEFORE, _BEHIND = "<|vision_start|>", "<|vision_end|>"
_OWN_FORMS = {
    _QWEN_VL: (_BEFORE + _BEHIND,),
    _INTERN_VL: ("<img><IMG_CONTEXT></img>", "<img></img>", "<image>"),
}
"""Placeholder → what else stands for a picture of that family."""
_WHOLE_FORMS = {_QWEN_VL: _BEFORE + _QWEN_VL + _BEHIND}
"""Placeholder → what the family's template writes for a picture, where that is more."""
_COMMON_FORMS = ("<image>", "<img></img>")


async def raw_prompt(
    model: ServedModel,
    inputs: str | Sequence[int],
    images: int,
    *,
    field: str,
    add_special_tokens: bool = True,
    adds_markers: bool = False,
) -> Prompt:
    """The prompt as tokens, with the place of each picture.

    Args:
        model: has the tokenizer.
        inputs: text or token ids.
        images: that come with it.
        field: what to call it in errors.
        add_special_tokens: let the tokenizer put around the text what it puts around texts.
        adds_markers: a text without markers gets them at its end: for counting tokens.

    Raises:
        InvalidRequest: no prompt, unknown tokens, or not one marker for each picture.
        ContextLengthExceeded: it is longer than the context.
    """
    if not inputs:
        raise InvalidRequest(f"{field} is empty; send at least one character or token.", param=field)
    with naming(field):
        if isinstance(inputs, str):
            model.check_size(inputs)  # markers may make it longer by far
            text = _with_placeholders(inputs, model, images, adds_markers=adds_markers)
            token_ids = await model.encode_text(text, add_special_tokens=add_special_tokens)
        else:
            model.check_context(len(inputs), None)
            check_token_ids(inputs, model.tokenizer, field)
            token_ids = _with_pads(inputs, model.tokenizer, model.image)
        model.check_context(len(token_ids), None)
    if not token_ids:
        raise InvalidRequest(f"{field} has no tokens.", param=field)
    return Prompt(tuple(token_ids), _offsets(token_ids, model, images, field))


def _with_placeholders(text: str, model: ServedModel, images: int, *, adds_markers: bool) -> str:
    """The text with the model's own placeholder wherever a picture goes."""
    if model.image is None:
        return text
    literal = str(model.tokenizer.backend.id_to_token(model.image.token_id))
    for form in _OWN_FORMS.get(literal, ()):
        text = text.replace(form, _WHOLE_FORMS.get(literal, literal))
    if images and literal not in text:
        for form in _COMMON_FORMS:
            text = text.replace(form, _WHOLE_FORMS.get(literal, literal))
        if adds_markers and literal not in text:
            text += images * _WHOLE_FORMS.get(literal, literal)
    border = model.image.border
    return text.replace(literal, border + literal + border) if border else text


def _with_pads(token_ids: Sequence[int], tokenizer: Tokenizer, image: ImagePlaceholder | None) -> list[int]:
    """As for texts: a placeholder between Qwen-VL's borders where it was left out."""
    if image is None or tokenizer.token_id(_QWEN_VL) != image.token_id:
        return list(token_ids)
    before, behind = tokenizer.token_id(_BEFORE), tokenizer.token_id(_BEHIND)
    result: list[int] = []
    for token in token_ids:
        if token == behind and result and result[-1] == before:
            result.append(image.token_id)
        result.append(token)
    return result


def _offsets(token_ids: Sequence[int], model: ServedModel, images: int, field: str) -> tuple[int, ...]:
    if model.image is None:
        if images:
            raise InvalidRequest("This model reads text only; remove the images.", param="multimodal_params")
        return ()
    offsets = tuple(index for index, token in enumerate(token_ids) if token == model.image.token_id)
    if len(offsets) != images:
        literal = str(model.tokenizer.backend.id_to_token(model.image.token_id))
        marker = _WHOLE_FORMS.get(literal, literal)
        raise InvalidRequest(
            f"{field} has {len(offsets)} image markers for {images} images; write {marker} once for each image.",
            param=field,
        )
    return offsets
