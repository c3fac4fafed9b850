"""The time left of units comes from the units of each kind that are done."""

import pytest

from kvjax.evaluate import progress
from kvjax.evaluate.progress import Units


def test_seconds_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Units(False, 5, [("slow", 100.0), ("slow", 50.0)]) as units:
        units.plan(["quick", "slow", "quick"])
        assert units.seconds_left() is None  # nothing quick was ever done
        with units.unit("a", "quick"):
            now[0] += 4.0
            units.within(1, 2)
        assert units.seconds_left() == 75.0 + 4.0
        with units.unit("b", "slow"):
            now[0] += 10.0
            assert units.seconds_left() == 75.0 + 4.0 - 10.0
            now[0] += 1000.0
            assert units.seconds_left() == 0.0
        with units.paused(), units.unit("c", "quick"):
            now[0] += 8.0
        assert units.seconds_left() == 0.0


def test_a_unit_that_ends_in_an_error_is_not_done():
    with Units(False, 1) as units:
        units.plan(["a"])
        with pytest.raises(KeyboardInterrupt), units.unit("x", "a"):
            raise KeyboardInterrupt
        assert units.seconds_left() is None
