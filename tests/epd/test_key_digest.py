"""Bloom filters over content keys."""

from __future__ import annotations

import pytest

from epd.key_digest import KeyDigest

KEYS = [f"key {i}" for i in range(700)]


def test_what_was_put_in_is_found_after_the_journey() -> None:
    digest = KeyDigest.parse(str(KeyDigest(KEYS)))
    assert all(key in digest for key in KEYS)
    wrong = sum(f"other {i}" in digest for i in range(10_000))
    assert wrong < 200  # 71 are to be expected


def test_an_empty_one_is_no_text_and_holds_nothing() -> None:
    assert str(KeyDigest()) == ""
    assert not KeyDigest.parse("")
    assert KeyDigest(KEYS[:1])


@pytest.mark.parametrize("text", ["AAAA", "no base64!", "A" * 5_000_000, "\N{SNOWMAN}"])
def test_what_is_none_holds_nothing(text: str) -> None:
    assert not KeyDigest.parse(text)
