"""Bodies that /openapi.json shows. Each is answered: tests send them all. `model` and `model_id` are put in there."""

from __future__ import annotations

from typing import Any, Final

_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKElEQVR42u3NQQ0AAAgEoNP+"
    "nTWFDzcoQE1udQQCgUAgEAgEAsGTYAGjxAE/G/Q2tQAAAABJRU5ErkJggg=="
)
"""A red square."""
_HI: Final[list[Any]] = [{"role": "user", "content": "Hello!"}]
_PICTURE: Final = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_PNG}"}}
_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
_FUNCTION: Final = {"name": "get_weather", "description": "The weather in a city.", "parameters": _SCHEMA}
_NATIVE: Final[dict[str, Any]] = {"inputs": "What is AI?", "parameters": {"max_new_tokens": 17}}
_NATIVE_PICTURE: Final[dict[str, Any]] = {
    "inputs": "<|vision_start|><|image_pad|><|vision_end|>What is this?",
    "parameters": {"max_new_tokens": 17},
    "multimodal_params": {"images": [{"type": "base64", "data": _PNG}]},
}
_COUNTED: Final[dict[str, Any]] = {"text": "What is AI?"}
_BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "text": {"messages": _HI, "max_tokens": 64, "temperature": 0},
        "stream": {"messages": _HI, "stream": True, "stream_options": {"include_usage": True}},
        "picture": {"messages": [{"role": "user", "content": [_PICTURE, {"type": "text", "text": "What is this?"}]}]},
        "tools": {"messages": _HI, "tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": "auto"},
        "json": {
            "messages": _HI,
            "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": _SCHEMA}},
        },
        "session": {"messages": "Hello!", "session_id": 1},
    },
    "/v1/completions": {
        "text": {"prompt": "Once upon a time", "max_tokens": 16},
        "tokens": {"prompt": [5, 6, 7], "max_tokens": 16, "logprobs": 1},
    },
    "/v1/responses": {
        "text": {"input": "Hello!", "max_output_tokens": 64},
        "picture": {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": f"data:image/png;base64,{_PNG}"},
                        {"type": "input_text", "text": "What is this?"},
                    ],
                }
            ]
        },
    },
    "/v1/messages": {
        "text": {"model": "", "messages": _HI, "max_tokens": 64},
        "picture": {
            "model": "",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": _PNG}},
                        {"type": "text", "text": "What is this?"},
                    ],
                }
            ],
            "max_tokens": 64,
        },
    },
    "/v1/messages/count_tokens": {"text": {"model": "", "messages": _HI}},
    "/generate": {
        "LightLLM": _NATIVE,
        "LightLLM, a picture": _NATIVE_PICTURE,
        "TGI": {"inputs": "What is AI?", "parameters": {"max_new_tokens": 17, "details": True}},
        "LMDeploy": {"prompt": "Hello!", "sequence_start": True, "sequence_end": True},
        "LMDeploy, today's": {"prompt": "What is AI?", "max_tokens": 17},
        "SGLang": {"text": "What is AI?", "sampling_params": {"max_new_tokens": 17}},
    },
    "/generate_stream": {"text": _NATIVE},
    "/": {"LightLLM": _NATIVE | {"multimodal_params": {}}, "TGI": _NATIVE},
    "/tokens": {"text": _COUNTED},
    "/v1/chat/interactive": {"text": {"prompt": "Hello!", "session_id": 2, "interactive_mode": True}},
    "/v1/generate": {
        "base": {"model_id": "", "inputs": "Hello!", "parameters": {"max_new_tokens": 64, "temperature": 0.7}},
        "qa": {"model_id": "", "inputs": "What is AI?", "scenario": "qa"},
    },
    "/v1/embeddings": {"texts": {"input": ["a circle", "two squares"]}, "tokens": {"input": [5, 6, 7]}},
    "/pooling": {"text": {"input": "a circle"}},
    "/v1/score": {"pairs": {"text_1": "What is a circle?", "text_2": ["A shape.", "A city."]}},
    "/v1/rerank": {"texts": {"query": "What is a circle?", "documents": ["A shape.", "A city."], "top_n": 1}},
    "/get_score": {"conversation": {"chat": "Hello! My name is epd."}},
    "/tokenize": {"text": {"prompt": "Hello!"}, "conversation": {"messages": _HI}},
    "/detokenize": {"tokens": {"tokens": [5, 6, 7]}},
    "/abort": {"one": {"request_id": "chatcmpl-1"}},
    "/start_profile": {"steps": {"steps": 100}},
    "/stop_profile": {"all": {}},
}
EXAMPLES: Final[dict[tuple[str, str], dict[str, Any]]] = {
    **{("post", path): bodies for path, bodies in _BODIES.items()},
    ("get", "/tokens"): {"text": _COUNTED},
}
"""Method and path → name → body."""
