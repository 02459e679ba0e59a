"""When a worker counts as dead for its silence, on a clock that the test moves."""

from __future__ import annotations

from proxy.cluster.silence import LONGEST_PAUSE_S, LONGEST_UPLOAD_S, SILENT_PINGS, SLOWEST_LINK_BYTES_S, Silence


class Line:
    def __init__(self) -> None:
        self.now = 100.0
        self.silence = Silence(lambda: self.now)

    def pings_until_dead(self, *, interval_s: float, sent_each_time: int = 0) -> int:
        count = 1
        self.now += interval_s
        while not self.silence.ping_passed():
            count += 1
            self.silence.sent(sent_each_time)
            self.now += interval_s
        return count


def test_so_many_pings_without_an_answer() -> None:
    assert Line().pings_until_dead(interval_s=0.5) == SILENT_PINGS


def test_a_word_starts_the_count_again() -> None:
    line = Line()
    for _ in range(SILENT_PINGS - 1):
        assert not line.silence.ping_passed()
    line.silence.heard()
    assert line.pings_until_dead(interval_s=0.5) == SILENT_PINGS


def test_pings_behind_a_picture_do_not_count() -> None:
    line = Line()
    line.silence.sent(3 * SLOWEST_LINK_BYTES_S)
    assert line.pings_until_dead(interval_s=0.5) == 5 + SILENT_PINGS  # it may have arrived after 3 s


def test_pictures_without_end_do_not_keep_a_dead_worker_alive() -> None:
    pings = Line().pings_until_dead(interval_s=1.0, sent_each_time=100 * SLOWEST_LINK_BYTES_S)
    assert pings <= LONGEST_UPLOAD_S + SILENT_PINGS


def test_a_pause_that_was_announced_does_not_count() -> None:
    line = Line()
    line.silence.excused(3.0)
    line.silence.heard()  # an answer that was on its way
    assert line.pings_until_dead(interval_s=0.5) == 5 + SILENT_PINGS
    line = Line()
    line.silence.excused(1e9)
    assert line.pings_until_dead(interval_s=1.0) <= LONGEST_PAUSE_S + SILENT_PINGS
