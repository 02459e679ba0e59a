from __future__ import annotations

import gc
import weakref

from epd import collector


class Node:
    """Holds itself."""

    def __init__(self) -> None:
        self.me = self


def test_what_is_there_at_the_end_of_a_start_stays_and_what_was_dropped_is_freed() -> None:
    usual = gc.get_threshold()
    try:
        collector.start()
        collector.keep()
        assert gc.get_threshold()[0] > usual[0]
        dropped = weakref.ref(Node())
        collector.settle()
        assert dropped() is None
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > 0
        later = weakref.ref(Node())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*usual)
