"""Stopping a store while it commits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio
from trio.testing import MockClock

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import MemoryStore
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
