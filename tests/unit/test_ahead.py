"""One item is made while the one before is used, in order, and what goes wrong is raised in its turn."""

import threading

import pytest

from flipkd_dist.ahead import ahead


def test_items_come_in_order_and_one_ahead():
    made, second = [], threading.Event()

    def make(item):
        made.append((item, threading.current_thread() is threading.main_thread()))
        if item == 1:
            second.set()
        return item * 10

    results = ahead(make, iter(range(4)))
    assert next(results) == 0
    assert second.wait(5)  # the next one is made while nobody asks for it
    assert [item for item, _ in made] == [0, 1]
    assert list(results) == [10, 20, 30]
    assert made == [(item, False) for item in range(4)]
    assert list(ahead(make, [])) == []


def test_an_error_waits_for_its_turn():
    def make(item):
        if item == 1:
            raise KeyError("text")
        return item

    results = ahead(make, range(3))
    assert next(results) == 0
    with pytest.raises(KeyError, match="text"):
        next(results)
