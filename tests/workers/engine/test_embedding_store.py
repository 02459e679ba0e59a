from __future__ import annotations

import pytest
import torch

from epd.errors import Overloaded, WorkerFailed
from tests.workers.engine.fakes import FakeClock
from workers.engine.embeddings import EmbeddingStore, ImageEmbeddings


def embeddings(rows: int = 1) -> ImageEmbeddings:
    """16 bytes per row."""
    return ImageEmbeddings((9,) * rows, (1, 2, 2), torch.ones(rows, 4), tuple(range(rows)))


def make_store(rows: int, clock: FakeClock | None = None) -> EmbeddingStore:
    return EmbeddingStore(rows * 16, unclaimed_ttl_s=60, clock=clock or FakeClock())


def test_idle_entries_make_room_least_recently_used_first() -> None:
    store = make_store(2)
    for key in "ab":
        store.put(key, embeddings())
        store.claim(key, "r")
    store.claim("a", "r")
    for key in "ab":
        store.release(key, "r")
    store.put("c", embeddings())
    assert ("a" in store, "b" in store, "c" in store) == (True, False, True)
    store.check_integrity()


def test_entries_in_use_or_not_yet_claimed_stay() -> None:
    store = make_store(2)
    store.put("unclaimed", embeddings())
    store.put("used", embeddings())
    store.claim("used", "r")
    with pytest.raises(Overloaded):
        store.put("c", embeddings())
    assert len(store) == 2
    assert store.users() == {"r"}


def test_entries_that_nobody_claimed_in_time_make_room() -> None:
    clock = FakeClock()
    store = make_store(1, clock)
    store.put("orphan", embeddings())
    clock.now += 61
    assert "orphan" in store
    store.put("b", embeddings())
    assert "orphan" not in store


def test_what_never_fits_is_not_called_overload() -> None:
    store = make_store(1)
    with pytest.raises(WorkerFailed, match="more than the whole store"):
        store.put("a", embeddings(rows=2))


def test_a_failed_put_evicts_nothing() -> None:
    store = make_store(3)
    for key in "abc":
        store.put(key, embeddings())
    store.claim("a", "r")
    store.release("a", "r")
    with pytest.raises(Overloaded):
        store.put("large", embeddings(rows=3))
    assert len(store) == 3


def test_putting_again_keeps_the_first() -> None:
    store = make_store(1)
    first = embeddings()
    store.put("a", first)
    store.put("a", embeddings())
    assert store.claim("a", "r") is first


def test_rows_between_skips_tokens_that_are_no_image_tokens() -> None:
    image = ImageEmbeddings((1, 9, 1, 9, 1), (1, 2, 2), torch.zeros(2, 4), (1, 3))
    assert image.rows_between(2, 5) == slice(1, 2)
    assert image.rows_between(-7, 9) == slice(0, 2)
    assert image.rows_between(-7, 1) == slice(0, 0)


def test_runs_are_neighbouring_image_tokens() -> None:
    image = ImageEmbeddings((9, 9, 1, 9, 1, 9), None, torch.zeros(4, 4), (0, 1, 3, 5))
    assert image.runs() == [(0, 2), (3, 4), (5, 6)]


def test_what_is_sent_again_is_kept_for_the_request_that_is_on_its_way() -> None:
    store = make_store(1)
    store.put("a", embeddings())
    store.claim("a", "first")
    store.release("a", "first")
    store.expect("a")
    with pytest.raises(Overloaded):
        store.put("b", embeddings())
    store.claim("a", "second")
    store.expect("a")  # for the second, which was faster
    store.release("a", "second")
    store.put("b", embeddings())
