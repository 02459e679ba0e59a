"""Token for token: greedy answers through the real processes equal transformers' `generate`, in float32."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import Cluster
from tests.cluster.reference import Reference, picture, user

Messages = list[dict[str, Any]]
MAX_TOKENS = 24


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CONVERSATIONS: dict[str, Messages] = {
    "text": [{"role": "user", "content": "What is 2 plus 3?"}],
    "system turn": [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Who are you?"}],
    "one image": [user(picture(1), "What colour is it?")],
    "another image": [user(picture(2), "What colour is it?")],
    "image last": [user("What is this?", picture(3, 84, 140))],
    "several images": [user(picture(4), picture(5, 140, 56), picture(6, 56, 112), "Which one has the red circle?")],
    "text between and after": [user("First: ", picture(7), " then: ", picture(8, 112, 112), " Compare them.")],
    "the same image twice": [user(picture(9), picture(9), "Are they the same?")],
    "several turns": [
        user(picture(10), "What shape?"),
        assistant("A circle."),
        user("And in this one?", picture(11, 112, 56)),
        assistant("A square."),
        user("Describe both."),
    ],
    "a long text that needs chunks": [user("red green blue circle square " * 40)],
    "images in a long prompt that needs chunks": [
        user(picture(12, 168, 168), "left right above below " * 30, picture(13, 168, 112), "What is where?")
    ],
    "unicode": [user("Ünïcödé 漢字 🙂 what?")],
}


@pytest.fixture(scope="module")
def tiny_reference(tiny: Cluster) -> Reference:
    return Reference(tiny.model)


@pytest.fixture(scope="module")
def demo_reference() -> Reference:
    return Reference(CHECKPOINT_DIR)


def ask(cluster: Cluster, messages: Messages, **options: Any) -> list[int]:
    client: Any = cluster.client()
    with client:
        response = client.chat.completions.create(
            model="test-model",
            messages=messages,
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True},
            **options,
        )
    return list(response.choices[0].token_ids)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tiny_checkpoints(tiny: Cluster, tiny_reference: Reference, name: str) -> None:
    messages = CONVERSATIONS[name]
    assert ask(tiny, messages) == tiny_reference.answer(messages, MAX_TOKENS)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_demo_model(demo: Cluster, demo_reference: Reference, name: str) -> None:
    messages = CONVERSATIONS[name]
    assert ask(demo, messages) == demo_reference.answer(messages, MAX_TOKENS)


async def ask_all(cluster: Cluster, conversations: list[Messages]) -> list[list[int]]:
    async with cluster.async_client() as client:
        create: Any = client.chat.completions.create
        responses = await asyncio.gather(
            *(
                create(
                    model="test-model",
                    messages=messages,
                    max_tokens=MAX_TOKENS,
                    temperature=0,
                    extra_body={"return_token_ids": True},
                )
                for messages in conversations
            )
        )
    return [list(response.choices[0].token_ids) for response in responses]


async def test_eight_at_once_in_one_batch(tiny: Cluster, tiny_reference: Reference) -> None:
    conversations = list(CONVERSATIONS.values())[:8]
    answers = await ask_all(tiny, conversations)
    assert answers == [tiny_reference.answer(messages, MAX_TOKENS) for messages in conversations]


async def test_eight_at_once_of_the_demo_model(demo: Cluster, demo_reference: Reference) -> None:
    conversations = list(CONVERSATIONS.values())[-8:]
    answers = await ask_all(demo, conversations)
    assert answers == [demo_reference.answer(messages, MAX_TOKENS) for messages in conversations]


def test_samples_and_the_next_turn_take_over_what_was_computed(tiny: Cluster, tiny_reference: Reference) -> None:
    first = [user(picture(20, 168, 168), "left right above below " * 8)]
    second = [*first, assistant("A circle."), user("And what else?")]
    client: Any = tiny.client()
    with client:
        replies = [
            client.chat.completions.create(
                model="test-model",
                messages=messages,
                n=2,
                max_tokens=MAX_TOKENS,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            for messages in (first, second)
        ]
    for messages, reply in zip((first, second), replies, strict=True):
        expected = tiny_reference.answer(messages, MAX_TOKENS)
        assert [list(choice.token_ids) for choice in reply.choices] == [expected, expected]
    usage = [reply.usage for reply in replies]
    assert usage[1].prompt_tokens_details.cached_tokens > 0.8 * usage[0].prompt_tokens
    assert usage[1].prompt_tokens_details.cached_tokens < usage[1].prompt_tokens


def test_the_references_tell_pictures_apart(tiny_reference: Reference) -> None:
    """Otherwise the tests above could pass with the pictures swapped."""
    first, second = (tiny_reference.answer(CONVERSATIONS[name], MAX_TOKENS) for name in ("one image", "another image"))
    assert first != second
