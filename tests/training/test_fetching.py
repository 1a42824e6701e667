"""The next batch, fetched in a thread: only when it is asked for, and given up when its reader hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from ldm.errors import UserError
from ldm.training.fetching import Fetcher


def test_batches_come_in_order_and_none_before_it_is_asked_for():
    read: list[int] = []

    def batches() -> Iterator[int]:
        for number in range(3):
            read.append(number)
            yield number

    fetcher = Fetcher(batches())
    assert read == []
    for number in range(3):
        fetcher.ask()
        assert fetcher.wait(10) and not fetcher.failed()
        assert fetcher.take() == number and read == list(range(number + 1))
    fetcher.close()
    assert not fetcher._thread.is_alive()


def test_what_reading_raises_is_raised_where_the_batch_is_taken():
    def batches() -> Iterator[int]:
        yield 1
        raise UserError("the shards are gone")

    fetcher = Fetcher(batches())
    fetcher.ask()
    assert fetcher.wait(10) and fetcher.take() == 1
    fetcher.ask()
    assert fetcher.wait(10) and fetcher.failed()
    with pytest.raises(UserError, match="the shards are gone"):
        fetcher.take()
    fetcher.close()


def test_one_that_hangs_is_not_waited_for():
    go = threading.Event()

    def batches() -> Iterator[int]:
        go.wait(60)
        yield 1

    fetcher = Fetcher(batches())
    fetcher.ask()
    assert not fetcher.wait(0.05)
    begun = time.monotonic()
    fetcher.close()
    assert time.monotonic() - begun < 5
    go.set()


def test_the_readers_generator_is_closed_with_it():
    closed = threading.Event()

    def batches() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.set()

    fetcher = Fetcher(batches())
    fetcher.ask()
    assert fetcher.wait(10) and fetcher.take() == 1
    fetcher.close()
    assert closed.is_set()
