"""A bus in front of a store that is slow, or takes nothing: what Kafka has waits there [K5, S2]."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import attrs
import trio
from trio.testing import MockClock

from gateways.kafka.bus import Bus
from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.errors import StoreError
from mqtt_trio.host import Host
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import Connect, Subscribe, Subscription
from mqtt_trio.server.storage import RETRY_LAST, Storage
from tests.gateways.memory_bus import SETTINGS, MemoryConsumer, MemoryKafka, MemoryProducer, Node, run_of, start_node
from tests.lane_worlds import V5, RecordingLink

T = TypeVar("T")
LIMIT = 10_000
"""JournalBytes."""
RECORD = 20
"""Messages that one record brings: about half of LIMIT."""


class Disk(MemoryStore):
    """Takes a second for each commit, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def commit(self, batch: Batch) -> None:
        if self.broken:
            raise StoreError("planned: no space")
        super().commit(batch)

    @staticmethod
    async def run_sync(function: Callable[[], T]) -> T:
        await trio.sleep(1)
        return function()


@attrs.define
class Kept:
    """The node under test with a kept session that is away, and another node, which publishes."""

    broker: Broker
    disk: Disk
    elsewhere: Node
    largest: int = 0
    """Bytes that waited for the store at a time."""

    async def bring(self, count: int, first: int = 0) -> None:
        """Have the other node publish so many records."""
        for number in range(first, first + count):
            payloads = [b"%090d" % (RECORD * number + each) for each in range(RECORD)]
            self.elsewhere.run_published(run_of("t", *payloads, qos=1), "t")
            await trio.sleep(0.1)

    def queue(self) -> list[int]:
        return [int(delivery.message.payload) for delivery in self.broker.connections.sessions["kept"].queue]


@asynccontextmanager
async def kept_node() -> AsyncIterator[Kept]:
    disk, kafka = Disk(), MemoryKafka()
    broker = Broker(Limits(), random_id=lambda: "x", journal=Journal(limit=LIMIT))
    host = Host(broker, node_id="here", instance_id=b"h" * 16)
    storage = Storage(broker, disk, disk.run_sync)
    await storage.load()
    bus = Bus(SETTINGS, host, MemoryProducer(kafka), partial(MemoryConsumer, kafka, SETTINGS), kafka.facts)
    link = RecordingLink(broker, "kept")
    broker.handle(link, Connect(client_id="kept", protocol_version=V5, session_expiry_interval=1000), 0.0)
    broker.handle(link, Subscribe(1, (Subscription("t", QoS(1)),)), 0.0)
    link.end(None, "cut")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.run)
        await nursery.start(bus.run)
        node = Kept(broker, disk, await start_node(nursery, kafka, "elsewhere"))
        await trio.sleep(5)

        async def look() -> None:
            while True:
                node.largest = max(node.largest, broker.journal.size + broker.journal.out_size)
                await trio.sleep(0.05)

        nursery.start_soon(look)
        yield node
        nursery.cancel_scope.cancel()


async def test_a_slow_store_makes_records_wait_in_kafka(autojump_clock: MockClock) -> None:
    async with kept_node() as node:
        await node.bring(30)
        await trio.sleep(60)
        assert node.queue() == list(range(30 * RECORD))
        assert LIMIT < node.largest < 2 * LIMIT + 2 * RECORD * 350, "one batch is out, one is filled"
        assert len(node.disk.state.deliveries) == 30 * RECORD


async def test_a_store_that_takes_nothing_stops_records_until_it_does(autojump_clock: MockClock) -> None:
    async with kept_node() as node:
        node.disk.broken = True
        await node.bring(100)
        await trio.sleep(600)
        assert node.largest < 2 * LIMIT + 2 * RECORD * 350
        came = node.queue()
        assert came == list(range(len(came)))
        assert 0 < len(came) < 10 * RECORD
        node.disk.broken = False
        await trio.sleep(RETRY_LAST + 60)
        assert node.queue() == list(range(100 * RECORD))
        await trio.sleep(5)
        rows = sorted(node.disk.state.deliveries.values())
        assert len(rows) == 100 * RECORD


async def test_what_needs_no_store_does_not_wait_for_one_that_fails(autojump_clock: MockClock) -> None:
    async with kept_node() as node:
        node.disk.broken = True
        for number in range(1000):
            node.elsewhere.publish("elsewhere", b"%0100d" % number, qos=1)
        node.elsewhere.publish("t", b"0", qos=1)
        await trio.sleep(1)
        assert node.queue() == [0]
