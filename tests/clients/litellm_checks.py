"""LiteLLM at a running server, under both of its names for servers like this one, and as if it were Anthropic's:
`python -m … BASE_URL`.

Not within pytest: it leaves coroutines, sockets and event loops behind, which count as errors there. It tells errors
apart by status and by words, and so is a good judge of ours.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import litellm
from litellm import exceptions

from tests.clients.asking import ASK, ASK_PICTURE, CIRCLE, MODEL, SELF, TOOL, Trip

Options = dict[str, Any]


def completion_and_stream(options: Options) -> None:
    answer: Any = litellm.completion(**options)
    assert answer.choices[0].message.content == SELF
    assert answer.usage.completion_tokens > 0
    chunks: Any = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SELF
    rebuilt: Any = litellm.stream_chunk_builder(chunks, messages=ASK)
    assert rebuilt.choices[0].message.content == SELF
    assert rebuilt.usage.total_tokens == answer.usage.total_tokens


def asynchronous(options: Options) -> None:
    answer: Any = asyncio.run(litellm.acompletion(**options))
    assert answer.choices[0].message.content == SELF


def picture(options: Options) -> None:
    answer: Any = litellm.completion(**options | {"messages": ASK_PICTURE})
    assert answer.choices[0].message.content == CIRCLE


def tools(options: Options) -> None:
    for stream in (False, True):
        answer: Any = litellm.completion(
            **options, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=200, stream=stream
        )
        if stream:
            answer = litellm.stream_chunk_builder(list(answer))
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "Trip"
        Trip.model_validate_json(call.function.arguments)
        assert answer.choices[0].finish_reason == "tool_calls"


def structured_output(options: Options) -> None:
    answer: Any = litellm.completion(**options, response_format=Trip, max_tokens=200)
    Trip.model_validate_json(answer.choices[0].message.content)


def classes_of_errors(options: Options) -> None:
    provider, _ = options["model"].split("/")
    long = {"messages": [{"role": "user", "content": "word " * 20_000}]}
    slow = {"timeout": 0.1, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    wanted: list[tuple[type[Exception], Options]] = [
        (exceptions.ContextWindowExceededError, long),
        (exceptions.NotFoundError, {"model": f"{provider}/nobody"}),
        (exceptions.BadRequestError, {"temperature": -1}),
        (exceptions.Timeout, slow),
    ]
    for kind, changed in wanted:
        error = raised(options | changed)
        assert type(error) is kind, (kind, type(error), error)


def too_long_for_anthropic(options: Options) -> None:
    error = raised(options | {"messages": [{"role": "user", "content": "word " * 20_000}]})
    assert type(error) is exceptions.ContextWindowExceededError, error


def raised(options: Options) -> Exception | None:
    try:
        litellm.completion(**options)
    except Exception as error:  # of which class is what the checks are about
        return error
    return None


CHECKS = (completion_and_stream, asynchronous, picture, tools, structured_output, classes_of_errors)
PROVIDERS = ("openai", "hosted_vllm")


def main(base_url: str) -> None:
    litellm.suppress_debug_info = True
    for provider in PROVIDERS:
        options: Options = {"model": f"{provider}/{MODEL}", "api_base": base_url, "api_key": "none"}
        options |= {"messages": ASK, "temperature": 0, "max_retries": 0, "timeout": 60}
        for check in CHECKS:
            check(options)
            print(provider, check.__name__)
    options = {"model": f"anthropic/{MODEL}", "api_base": base_url.removesuffix("/v1"), "api_key": "none"}
    options |= {"messages": ASK, "temperature": 0, "max_retries": 0, "timeout": 60}
    for check in (*CHECKS[:-1], too_long_for_anthropic):
        check(options)
        print("anthropic", check.__name__)
    print("all checks passed")


if __name__ == "__main__":
    main(sys.argv[1])
