"""Work done ahead of time."""

from __future__ import annotations

import threading
import time

import pytest

from vitreg.images import map_ahead


@pytest.mark.parametrize("in_bursts", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("ahead", [1, 2, 7, 100])
def test_results_come_in_order(ahead, num_threads, in_bursts):
    options = {"ahead": ahead, "num_threads": num_threads, "in_bursts": in_bursts}
    found = list(map_ahead(lambda item: item * item, range(50), **options))
    assert found == [item * item for item in range(50)]


def test_items_are_taken_as_they_are_needed():
    taken: list[int] = []

    def items():
        for item in range(1000):
            taken.append(item)
            yield item

    results = map_ahead(lambda item: item, items(), ahead=8, num_threads=2)
    assert next(results) == 0
    assert len(taken) <= 12
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vitreg-images")]


def test_between_bursts_nothing_is_computed():
    computed: list[int] = []
    results = map_ahead(computed.append, range(20), ahead=6, num_threads=2, in_bursts=True)
    counts = []
    for _ in range(20):
        next(results)
        time.sleep(0.01)
        counts.append(len(computed))
    assert counts[5::6] == [6, 12, 18]
    assert counts[-1] == 20


def test_an_error_is_raised_where_its_result_would_be():
    def check(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    results = map_ahead(check, range(10), ahead=4, num_threads=2)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="five"):
        list(results)
