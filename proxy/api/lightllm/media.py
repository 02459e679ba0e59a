"""Pictures as LightLLM's requests name them: addresses, and bare base64."""

from __future__ import annotations

from epd.errors import InvalidRequest
from proxy.api.lightllm.schema import MultimodalParams, NativeMedium
from proxy.media.image_tokens import size_of
from proxy.media.inline import base64_url
from proxy.media.loader import ImageSource
from proxy.models.served_model import ServedModel

_FIELD = "multimodal_params"
_LONGEST_SIDE = 1 << 20


def sources_of(params: MultimodalParams | None, model: ServedModel) -> list[ImageSource]:
    """The pictures in order. Errors name their places, never their data.

    Raises:
        InvalidRequest: sound, an unknown type, data of the wrong kind, or the model reads text only.
    """
    if params is None:
        return []
    if params.audios:
        raise InvalidRequest("This server takes no audio; leave audios out.", param=f"{_FIELD}.audios")
    images = params.images or []
    if images and model.image is None:
        raise InvalidRequest("This model reads text only; remove the images.", param=f"{_FIELD}.images")
    return [_source(image, f"{_FIELD}.images[{index}]") for index, image in enumerate(images)]


def _source(image: NativeMedium, where: str) -> ImageSource:
    if image.type not in ("url", "base64"):
        raise InvalidRequest(f"{where}.type: {image.type[:100]!r} is not url or base64.", param=f"{where}.type")
    if not isinstance(image.data, str) or not image.data:
        raise InvalidRequest(f"{where}.data: want a text that is not empty.", param=f"{where}.data")
    if image.type == "base64":
        return ImageSource(base64_url(image.data), where)
    return ImageSource(image.data, where)


async def count_image_tokens(params: MultimodalParams, model: ServedModel) -> int:
    """Prompt tokens of all pictures together.

    Raises:
        InvalidRequest: see `sources_of`; or the model's settings do not tell.
        EPDError: see `MediaLoader.load`.
    """
    images = params.images or []
    sized = [image for image in images if image.type == "image_size"]
    sizes = [_given_size(image) for image in sized]
    others = [image for image in images if image.type != "image_size"]
    sources = sources_of(MultimodalParams(others, params.audios), model)
    if images and model.image_tokens is None:
        raise InvalidRequest(
            "The settings of this model do not tell how many tokens an image takes; ask /generate with "
            "max_new_tokens: 1, whose prompt_tokens counts them.",
            param=f"{_FIELD}.images",
        )
    sizes += [size_of(image.data) for image in await model.load_images(sources)]
    return sum(model.image_tokens(*size) for size in sizes) if model.image_tokens is not None else 0


def _given_size(image: NativeMedium) -> tuple[int, int]:
    match image.data:
        case [int(width), int(height)] if 0 < width < _LONGEST_SIDE and 0 < height < _LONGEST_SIDE:
            return width, height
    raise InvalidRequest("image_size: want [width, height] in pixels.", param=f"{_FIELD}.images")
