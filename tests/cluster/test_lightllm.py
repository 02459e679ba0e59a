"""Native endpoints before the demo model, LightLLM's above all: pictures, frames, limits, and the client of TGI."""

from __future__ import annotations

import base64
import json
from typing import Any

from huggingface_hub import InferenceClient

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import Cluster
from tests.cluster.reference import data_url

PICTURE = (CHECKPOINT_DIR.parent / "gallery" / "count.png").read_bytes()
QUESTION = "What shape is this?"
RAW = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
IMAGES = {"images": [{"type": "base64", "data": base64.b64encode(PICTURE).decode()}]}


def frames(text: str) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix("data:")) for event in text.split("\n\n")[:-1]]


def test_a_raw_prompt_with_a_picture_is_answered_as_the_same_chat(demo: Cluster) -> None:
    parts = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}, {"type": "text", "text": QUESTION}]
    chat = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "return_token_ids": True}
    _, chatted = demo.post("/v1/chat/completions", chat)
    status, body = demo.post(
        "/generate", {"inputs": RAW, "multimodal_params": IMAGES, "parameters": {"return_details": True}}
    )
    assert status == 200, body
    [choice] = chatted["choices"]
    assert body["generated_text"] == [choice["message"]["content"]]
    assert [token["id"] for token in body["tokens"]] == choice["token_ids"]
    assert body["prompt_tokens"] == chatted["usage"]["prompt_tokens"]
    assert demo.post("/tokens", {"text": RAW, "multimodal_params": IMAGES}) == (200, {"ntokens": body["prompt_tokens"]})


def test_lmdeploys_answer_may_fill_the_context_behind_a_picture(demo: Cluster) -> None:
    """Without a limit it may, and the proxy does not know how many tokens the picture has."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}, {"type": "text", "text": QUESTION}]
    chat = {"messages": [{"role": "user", "content": parts}], "temperature": 0}
    _, chatted = demo.post("/v1/chat/completions", chat)
    asked = {"prompt": QUESTION, "image_url": data_url(PICTURE), "temperature": 0}
    for limit in ({}, {"request_output_len": 1_000_000}):
        status, body = demo.post("/v1/chat/interactive", asked | limit)
        assert (status, "session_exceeded" in body) == (200, False)
        assert body["text"] == chatted["choices"][0]["message"]["content"]


def test_every_token_has_a_frame_also_within_characters(demo: Cluster) -> None:
    """A grammar makes the model write characters that it spells byte by byte."""
    wanted = "é🙂Ω漢"
    parameters = {"regular_constraint": wanted, "max_new_tokens": 40}
    streamed = frames(demo.post("/generate_stream", {"inputs": "Say it: ", "parameters": parameters})[1])
    assert "".join(frame["token"]["text"] for frame in streamed) == wanted
    assert len(streamed) > len(wanted)
    assert [frame["token"]["count_output_tokens"] for frame in streamed] == list(range(1, len(streamed) + 1))
    assert "\ufffd" not in json.dumps(streamed, ensure_ascii=False)
    [*others, last] = streamed
    assert last["finished"]
    assert not any(frame["finished"] for frame in others)


def test_a_prompt_that_leaves_no_room_is_an_error(demo: Cluster) -> None:
    """Pictures count by what they expand to, which only the worker knows."""
    _, body = demo.post("/tokens", {"text": RAW, "multimodal_params": IMAGES})
    limit = demo.get("/v1/models")[1]["data"][0]["max_model_len"]
    fits = {"max_new_tokens": limit - body["ntokens"]}
    assert demo.post("/generate", {"inputs": RAW, "multimodal_params": IMAGES, "parameters": fits})[0] == 200
    parameters = {"max_new_tokens": limit - body["ntokens"] + 1}
    for path in ("/generate", "/generate_stream"):
        status, error = demo.post(path, {"inputs": RAW, "multimodal_params": IMAGES, "parameters": parameters})
        assert (status, error["error"]["code"]) == (400, "context_length_exceeded")
        assert error["message"].startswith(f"This model's maximum context length is {limit} tokens.")
        assert error["param"] == "inputs"


def test_the_client_of_tgi(demo: Cluster) -> None:
    """Hugging Face's, as it is."""
    client: Any = InferenceClient(f"http://127.0.0.1:{demo.port}")
    prompt = "<|im_start|>user\nHello, who are you?<|im_end|>\n<|im_start|>assistant\n"
    text = client.text_generation(prompt, max_new_tokens=20)
    assert "epd demo" in text
    assert "".join(client.text_generation(prompt, max_new_tokens=20, stream=True)) == text
    detailed = client.text_generation(prompt, max_new_tokens=20, details=True, return_full_text=True)
    assert detailed.generated_text == prompt + text
    assert detailed.details is not None
    assert detailed.details.finish_reason == "eos_token"
    assert "".join(token.text for token in detailed.details.tokens) == text
    [*_, last] = client.text_generation(prompt, max_new_tokens=20, details=True, stream=True, stop=["epd"])
    assert (last.generated_text, last.details.finish_reason) == (text[: text.index("epd") + 3], "stop_sequence")
    form = {"type": "regex", "value": "[a-c]{3}"}
    assert len(client.text_generation(prompt, max_new_tokens=20, grammar=form)) == 3
