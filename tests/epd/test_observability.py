"""Histograms that one thread writes and another reads."""

from __future__ import annotations

from collections.abc import Iterator

from epd.observability import Histogram


class Written(list[int]):
    """Counts of which one grows whenever they are looked at."""

    def __iter__(self) -> Iterator[int]:
        self[0] += 1
        return super().__iter__()


def test_the_count_is_that_of_the_ranges() -> None:
    histogram = Histogram()
    histogram.buckets = Written(histogram.buckets)
    stats = histogram.snapshot()
    assert stats.count == sum(stats.buckets)
