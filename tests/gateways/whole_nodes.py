"""Whole nodes on the fake clock, joined by a Kafka in memory: broker, store and bus. They are killed and restarted."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from gateways.kafka.bus import Bus
from gateways.kafka.bus_settings import BusSettings
from mqtt_trio.archive.spool import Spool, inline, spool_path
from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.store import MemoryStore, Store
from mqtt_trio.host import Host
from mqtt_trio.protocol.packets import Publish
from mqtt_trio.testing import EPOCH, ConnectionEndedError, MemoryBroker, TestClient, open_memory_broker
from tests.gateways.memory_bus import MemoryConsumer, MemoryKafka, MemoryProducer

SOON = 0.2
"""Seconds on the fake clock in which everything arrives."""
_numbers = itertools.count(1)


@attrs.define(eq=False)
class WholeNode:
    """One life of one node."""

    node_id: str
    memory: MemoryBroker
    bus: Bus
    consumer: MemoryConsumer
    producer: MemoryProducer
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    ended: trio.Event = attrs.Factory(trio.Event)

    async def kill(self) -> None:
        """End as kill -9 does: what was not committed and not sent is gone."""
        self.scope.cancel()
        await self.ended.wait()

    async def stop(self) -> None:
        """End in good order, as a SIGTERM does."""
        await self.memory.clients.shut_down()
        await self.bus.stop()
        if self.memory.storage is not None:
            await self.memory.storage.stop()
        await self.kill()

    async def connect(self, client_id: str = "", *filters: str, qos: int = 2, **fields: Any) -> TestClient:
        """Connect a client, with subscriptions when it has none from before."""
        if self.scope.cancel_called:
            raise ConnectionEndedError("the node was killed")
        client = await self.memory.connect(client_id, **fields)
        assert client.connack is not None
        if filters and not client.connack.session_present:
            await client.subscribe(*filters, qos=qos)
        return client

    def counters(self) -> dict[str, int]:
        return self.bus.counters()


class MemoryHost(Host):
    """Spools are files; they are worked on without threads, which the fake clock does not see."""

    def __init__(self, broker: Broker, node_id: str, instance_id: bytes, data: Path | None) -> None:
        super().__init__(broker, node_id=node_id, instance_id=instance_id)
        self._place = data

    def make_spool(self, name: str, max_bytes: int) -> Spool:
        assert self._place is not None, "this test has no place for a spool"
        path = spool_path(self._place / self.node_id, name)
        return Spool(path, max_bytes=max_bytes, synchronous="OFF", run_sync=inline)


@attrs.define(eq=False)
class WholeCluster:
    """Some nodes and what outlives them: Kafka, and each node's store by its id."""

    nursery: trio.Nursery
    kafka: MemoryKafka = attrs.Factory(MemoryKafka)
    stores: dict[str, Store] = attrs.Factory(dict)
    settings: BusSettings = attrs.Factory(BusSettings)
    data: Path | None = None
    """Where spools are."""

    async def start(self, node_id: str, *, kept: bool = True, **options: Any) -> WholeNode:
        """Start a node; back when its listeners would open. `kept`: with a store; `options` are those of Broker."""
        if kept and node_id not in self.stores:
            self.stores[node_id] = MemoryStore()
        node: WholeNode = await self.nursery.start(partial(self._run, node_id, kept, options))
        return node

    async def _run(
        self, node_id: str, kept: bool, options: dict[str, Any], *, task_status: trio.TaskStatus[WholeNode]
    ) -> None:
        store = self.stores[node_id] if kept else None
        options = {"wall_offset": EPOCH, **options}  # one clock for all nodes and all their lives
        scope, ended = trio.CancelScope(), trio.Event()
        instance = next(_numbers).to_bytes(8, "big") + os.urandom(8)
        made: list[MemoryConsumer] = []

        def make_consumer(on_records: Any, offsets: Mapping[int, int]) -> MemoryConsumer:
            made.append(MemoryConsumer(self.kafka, self.settings, on_records, offsets))
            return made[0]

        try:
            with scope, ExitStack() as stack:
                async with open_memory_broker(store=store, **options) as memory, trio.open_nursery() as nursery:
                    host = MemoryHost(memory.broker, node_id, instance, self.data)
                    memory.host = host
                    producer = MemoryProducer(self.kafka)
                    bus = Bus(self.settings, host, producer, make_consumer, self.kafka.facts, utc=memory.utc_now)
                    bus.outbox.trouble = self.kafka.trouble
                    self.kafka.watchers.append(bus.outbox.look)
                    stack.callback(self.kafka.watchers.remove, bus.outbox.look)
                    await nursery.start(bus.run)
                    task_status.started(WholeNode(node_id, memory, bus, made[0], producer, scope, ended))
                    await trio.sleep_forever()
        finally:
            ended.set()


@asynccontextmanager
async def open_cluster(settings: BusSettings | None = None, data: Path | None = None) -> AsyncIterator[WholeCluster]:
    """Give an empty cluster; leaving the block kills its nodes."""
    async with trio.open_nursery() as nursery:
        yield WholeCluster(nursery, settings=settings or BusSettings(), data=data)
        nursery.cancel_scope.cancel()


async def drain(client: TestClient, within: float = SOON) -> list[Publish]:
    """Take, and acknowledge, the messages that come until there is none for `within` seconds."""
    from mqtt_trio.testing import NothingCameError

    found: list[Publish] = []
    while True:
        try:
            found.append(await client.next_message(timeout=within))
        except NothingCameError:
            return found
