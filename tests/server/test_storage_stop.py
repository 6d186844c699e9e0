"""Stopping a store while it commits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import trio
import trio.testing
from trio.testing import MockClock

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.server.storage import Storage

T = TypeVar("T")


async def slowly(function: Callable[[], T]) -> T:
    await trio.sleep(1)
    return function()


async def test_changes_during_the_commit_that_stop_finds_are_committed(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    broker = Broker(Limits(), random_id=lambda: "x", journal=Journal())
    storage = Storage(broker, store, slowly)
    await storage.load()

    def retain(topic_name: str) -> None:
        broker.inbound.retain(Message(topic_name, b"kept", retain=True))
        broker.flush()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(storage.run)
            retain("first")
            await trio.sleep(0.5)
            nursery.start_soon(storage.stop)
            await trio.sleep(0.25)
            retain("second")
    assert set(store.state.retained) == {"first", "second"}


class Hanging(MemoryStore):
    """Whose commit lasts until a test lets it go; it notes what is called while it does."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.inside = 0
        self.together = 0
        self.calls: list[str] = []

    def commit(self, batch: Batch) -> None:
        self.inside += 1
        self.together = max(self.together, self.inside)
        self.begun.set()
        assert self.go_on.wait(20)
        super().commit(batch)
        self.inside -= 1

    def close(self) -> None:
        self.together = max(self.together, self.inside + 1)
        self.calls.append("close")


async def test_nothing_is_called_beside_a_commit_that_was_abandoned() -> None:
    store = Hanging()
    broker = Broker(Limits(), random_id=lambda: "x", journal=Journal())
    storage = Storage(broker, store)
    await storage.load()
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(storage.run)
                broker.inbound.retain(Message("t", b"kept", retain=True))
                broker.flush()
                await trio.to_thread.run_sync(store.begun.wait, 20)
                nursery.cancel_scope.cancel()
            storage._ended.set()  # as `run` says when it is not cancelled
            async with trio.open_nursery() as nursery:
                nursery.start_soon(storage.stop)
                await trio.testing.wait_all_tasks_blocked()
                assert store.calls == []
                store.go_on.set()
    finally:
        store.go_on.set()
    assert store.calls == ["close"]
    assert store.together == 1
