"""Processes that find each other on a store in which dead ones have left their keys."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch import distributed
from torch.distributed import HashStore

from ldm.training.processes import make_accelerator
from ldm.training.rendezvous import PATIENCE, agree_on_word, join

from .toys import LOOP


def words(store: HashStore, world: int) -> list[str]:
    """What each rank of one attempt comes to, all of them at once."""
    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(lambda rank: agree_on_word(store, rank, world), range(world)))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_one_word_for_all_and_another_each_time(world):
    store = HashStore()
    attempts = [words(store, world) for _ in range(4)]
    assert all(len(set(attempt)) == 1 for attempt in attempts)
    assert len({attempt[0] for attempt in attempts}) == 4


def test_the_dead_are_answered_and_not_waited_for():
    """A former rank 1 died while it asked and a former rank 2 after it had heard; then three come, then only two."""
    store = HashStore()
    store.set("asking/1", "died asking")
    store.set("asking/2", "died later")
    store.set("answer/died later", "old")
    store.set("heard/2/old", "")
    first = words(store, 3)
    assert len(set(first)) == 1 and first[0] != "old"
    second = words(store, 2)
    assert len(set(second)) == 1 and second[0] != first[0]


def test_a_process_may_wait_for_hours_for_what_one_does_alone(tmp_path, monkeypatch):
    """Both where `join` makes the group and where accelerate does."""
    asked: list[timedelta] = []
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr("ldm.training.rendezvous.rendezvous", lambda _: iter([(HashStore(), 0, 1)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, timeout, **__: asked.append(timeout))
    join()
    given: dict[str, Any] = {}
    monkeypatch.setattr("ldm.training.processes.Accelerator.__init__", lambda self, **settings: given.update(settings))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with contextlib.suppress(AttributeError):  # of an accelerator that was not made
        make_accelerator(LOOP, tmp_path)
    asked += [handler.timeout for handler in given["kwargs_handlers"] if hasattr(handler, "timeout")]
    assert not any(
        getattr(handler, "broadcast_buffers", False) for handler in given["kwargs_handlers"]
    )  # SD 3's: 226 MB
    assert asked == [PATIENCE, PATIENCE] and timedelta(hours=1) < PATIENCE
