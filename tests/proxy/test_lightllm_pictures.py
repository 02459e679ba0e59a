"""Pictures of LightLLM's requests, and what they count."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.proxy.conftest import Cluster, ClusterFactory, data_url, png
from tests.proxy.model_files import write_model
from tests.proxy.test_lightllm import post, refused

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def image(data: bytes) -> dict[str, str]:
    return {"type": "base64", "data": base64.b64encode(data).decode()}


async def test_pictures_fill_markers_in_order(cluster: Cluster) -> None:
    red, blue = png("red"), png("blue")
    params = {"images": [image(red), image(blue)], "audios": []}
    pad = cluster.model.image_token_id
    keys: dict[str, bytes] = {}
    for marker in (PICTURE, "<|vision_start|><|vision_end|>", "<|image_pad|>", "<image>", "<img></img>"):
        text = f"<|im_start|>user\n{marker} and {marker}?<|im_end|>\n"
        response = await post(cluster, inputs=text, multimodal_params=params)
        assert response.status_code == 200, response.text
        request = cluster.pd.requests[-1]
        keys |= {picture.request.content_key: picture.data for picture in cluster.encoder.pictures}
        assert [keys[slot.content_key] for slot in request.images] == [red, blue]
        whole = PICTURE if marker != "<|image_pad|>" else marker
        wanted = cluster.model.tokenizer.encode(f"<|im_start|>user\n{whole} and {whole}?<|im_end|>\n")
        assert list(request.prompt_token_ids) == wanted
        assert [slot.offset for slot in request.images] == [i for i, token in enumerate(wanted) if token == pad]


async def test_a_raw_prompt_is_what_a_chat_renders(cluster: Cluster) -> None:
    picture = png("green")
    await cluster.chat(picture, "what is this?")
    text = f"<|im_start|>user\n{PICTURE}what is this?<|im_end|>\n<|im_start|>assistant\n"
    await post(cluster, inputs=text, multimodal_params={"images": [image(picture)]})
    chat, raw = cluster.pd.requests
    assert raw.prompt_token_ids == chat.prompt_token_ids
    assert raw.images[0].content_key == chat.images[0].content_key


async def test_pictures_between_tokens(cluster: Cluster) -> None:
    token_ids = cluster.model.tokenizer.encode("a<|vision_start|><|vision_end|>b")
    await post(cluster, inputs=token_ids, multimodal_params={"images": [image(png())]})
    [request] = cluster.pd.requests
    assert list(request.prompt_token_ids) == cluster.model.tokenizer.encode(f"a{PICTURE}b")
    assert request.images[0].offset == token_ids.index(cluster.model.tokenizer.encode("<|vision_end|>")[0])


async def test_markers_and_pictures_must_be_as_many(cluster: Cluster) -> None:
    for inputs, images in (("no marker", 1), (PICTURE, 0), (PICTURE, 2), (PICTURE + PICTURE, 1), ("<image><image>", 1)):
        error = await refused(cluster, inputs=inputs, multimodal_params={"images": [image(png())] * images})
        assert error["param"] == "inputs"
        assert PICTURE in error["message"]


async def test_the_marker_is_plain_text_without_pictures(cluster: Cluster) -> None:
    assert (await post(cluster, inputs="write <image> here")).status_code == 200


BAD_PICTURES: list[tuple[dict[str, Any], str]] = [
    ({"audios": [{"type": "base64", "data": "UklGRg=="}]}, "multimodal_params.audios"),
    ({"images": [{"type": "tensor", "data": "x"}]}, "multimodal_params.images[0].type"),
    ({"images": [{"type": "image_size", "data": [3, 4]}]}, "multimodal_params.images[0].type"),
    ({"images": [{"type": "url"}]}, "multimodal_params.images[0].data"),
    ({"images": [{"type": "base64", "data": 7}]}, "multimodal_params.images[0].data"),
    ({"images": [{"type": "base64", "data": data_url(b"secretsecret")}]}, "multimodal_params.images[0]"),
    ({"images": [{"type": "base64", "data": "c2VjcmV0c2VjcmV0"}]}, "multimodal_params.images[0]"),
    ({"images": [{"type": "url", "data": "file:///etc/secretsecret"}]}, "multimodal_params.images[0]"),
    ({"images": [{"type": "url", "data": "http://127.0.0.1/secretsecret"}]}, "multimodal_params.images[0]"),
]


async def test_bad_pictures_are_refused_without_an_echo(cluster: Cluster) -> None:
    for params, param in BAD_PICTURES:
        response = await post(cluster, inputs=PICTURE, multimodal_params=params)
        assert response.status_code in (400, 403)
        assert response.json()["param"] == param
        assert "secretsecret" not in response.text
        assert "c2VjcmV0" not in response.text
    assert not cluster.pd.requests


async def test_too_many_pictures_name_their_field(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_images_per_request=1)
    response = await post(cluster, inputs=PICTURE * 2, multimodal_params={"images": [image(png())] * 2})
    assert (response.status_code, response.json()["param"]) == (413, "multimodal_params")


async def test_a_model_of_texts_takes_no_pictures(start_cluster: ClusterFactory, tmp_path: Path) -> None:
    cluster = await start_cluster(model=write_model(tmp_path / "m", images=False), encoders=0)
    error = await refused(cluster, multimodal_params={"images": [image(png())]})
    assert error["param"] == "multimodal_params.images"


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_tokens(cluster: Cluster, method: str) -> None:
    response = await cluster.http.request(method, "/tokens", json={"text": "hello world", "parameters": {}})
    assert response.json() == {"ntokens": len(cluster.model.tokenizer.encode("hello world"))}
    assert not cluster.pd.requests


async def test_tokens_of_pictures_need_settings_that_tell(cluster: Cluster) -> None:
    body = {"text": PICTURE, "multimodal_params": {"images": [{"type": "image_size", "data": [56, 56]}]}}
    response = await cluster.http.post("/tokens", json=body)
    assert response.status_code == 400
    assert "max_new_tokens: 1" in response.json()["message"]


async def test_tokens_of_pictures(start_cluster: ClusterFactory, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    settings = {"patch_size": 14, "merge_size": 2, "min_pixels": 28 * 28, "max_pixels": 28 * 28 * 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    cluster = await start_cluster(model=folder)
    text = len(cluster.model.tokenizer.encode("hi<|vision_start|><|vision_end|>"))
    sized = {"type": "image_size", "data": [56, 84]}
    for prompt in (f"hi{PICTURE * 2}", "hi"):  # with markers, and without any
        body = {"text": prompt, "multimodal_params": {"images": [sized, image(png(size=(280, 280)))]}}
        response = await cluster.http.post("/tokens", json=body)
        assert response.json() == {"ntokens": text + 2 + 2 * 3 + 16}
    body = {"text": PICTURE * 3, "multimodal_params": {"images": [sized]}}
    assert (await cluster.http.post("/tokens", json=body)).json()["param"] == "text"
    body = {"text": "hi", "multimodal_params": {"images": [{"type": "image_size", "data": [0, 4]}]}}
    assert (await cluster.http.post("/tokens", json=body)).status_code == 400
