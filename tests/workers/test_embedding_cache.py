from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from workers.embedding_cache import EmbeddingCache, EncodedImage


@dataclass
class Value:
    nbytes: int


def test_a_value_is_found_again_and_counted() -> None:
    cache: EmbeddingCache[Value] = EmbeddingCache(100)
    assert cache.get("a") is None
    value = Value(60)
    cache.put("a", value)
    assert cache.get("a") is value
    assert (cache.hits, cache.misses, cache.evictions, cache.used_bytes, len(cache)) == (1, 1, 0, 60, 1)


def test_the_least_recently_used_goes_first() -> None:
    cache: EmbeddingCache[Value] = EmbeddingCache(100)
    for key in "abc":
        cache.put(key, Value(30))
    cache.get("a")
    cache.put("d", Value(30))
    assert [key for key in "abcd" if key in cache] == ["a", "c", "d"]
    assert cache.evictions == 1


def test_a_large_value_pushes_out_as_many_as_it_needs() -> None:
    cache: EmbeddingCache[Value] = EmbeddingCache(100)
    for key in "abc":
        cache.put(key, Value(30))
    cache.put("d", Value(70))
    assert [key for key in "abcd" if key in cache] == ["c", "d"]
    assert cache.used_bytes == 100


def test_a_value_larger_than_the_cache_is_not_kept_and_evicts_nothing() -> None:
    cache: EmbeddingCache[Value] = EmbeddingCache(100)
    cache.put("a", Value(50))
    cache.put("b", Value(101))
    assert "a" in cache
    assert "b" not in cache
    assert cache.evictions == 0


def test_a_key_is_replaced_not_counted_twice() -> None:
    cache: EmbeddingCache[Value] = EmbeddingCache(100)
    cache.put("a", Value(90))
    cache.put("a", Value(80))
    assert (cache.used_bytes, len(cache), cache.evictions) == (80, 1, 0)
    cache.put("a", Value(101))  # the old value is not the key's value any more
    assert (cache.used_bytes, len(cache)) == (0, 0)


def test_capacity_zero_keeps_nothing_and_a_negative_one_is_a_mistake() -> None:
    cache: EmbeddingCache[Value] = EmbeddingCache(0)
    cache.put("a", Value(1))
    assert len(cache) == 0
    with pytest.raises(ValueError, match="-1"):
        EmbeddingCache(-1)


def test_the_books_balance_after_a_random_history() -> None:
    rng = random.Random(0)
    cache: EmbeddingCache[Value] = EmbeddingCache(1000)
    for _ in range(2000):
        key = str(rng.randrange(50))
        if rng.random() < 0.5:
            cache.put(key, Value(rng.randrange(1, 300)))
        else:
            cache.get(key)
        cache.check_integrity()


def test_an_encoded_image_counts_rows_and_token_ids() -> None:
    image = EncodedImage((7,) * 4, (1, 4, 4), (4, 8), "float32", memoryview(bytes(4 * 8 * 4)))
    assert image.nbytes == 4 * 8 * 4 + 4 * 8
