"""A Kafka in memory with its producer and consumer bridges, and hosts, for several Bus instances on the fake clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import attrs
import trio

from gateways.kafka.bus import Bus
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.cluster import TopicFacts
from gateways.kafka.poller import Began
from gateways.kafka.records import ConsumedRecord, Record
from mqtt_trio.archive.spool import Spool, inline, spool_path
from mqtt_trio.errors import GatewayError, StartError
from mqtt_trio.gateway import (
    EventSink,
    Figure,
    FrameRun,
    LocalClient,
    Message,
    Newcomer,
    Parcel,
    ProtocolVersion,
    Spread,
    Tap,
)
from tests.record_check.watch import check

LATENCY = 0.001
"""Seconds between an offer and its confirmation."""
SETTINGS = BusSettings()
NOW = 1_790_000_000.25


def frame(topic: str, payload: bytes = b"x", qos: int = 0, packet_id: int = 7, *, v5: bool = False) -> bytes:
    """A PUBLISH packet of less than 128 bytes."""
    name = topic.encode()
    body = len(name).to_bytes(2, "big") + name
    body += packet_id.to_bytes(2, "big") if qos else b""
    body += (b"\0" if v5 else b"") + payload
    assert len(body) < 128
    return bytes((0x30 | qos << 1, len(body))) + body


def run_of(topic: str, *payloads: bytes, client_id: str = "c", qos: int = 0, at: float = NOW) -> FrameRun:
    """A run of 3.1.1 packets."""
    frames = b"".join(frame(topic, payload, qos) for payload in payloads)
    return FrameRun(frames, len(payloads), qos, ProtocolVersion.MQTT_3_1_1, client_id, at)


class MemoryKafka:
    """Logs by (topic, partition). `away` while `here` is not set: nothing is written or read."""

    def __init__(self, partitions: int = 12, max_message_bytes: int = 1_048_588) -> None:
        self.sizes = TopicFacts(partitions=partitions, max_message_bytes=max_message_bytes)
        self.logs: dict[tuple[str, int], list[ConsumedRecord]] = {}
        self.first: dict[tuple[str, int], int] = {}
        """Offset of the oldest record that is still there."""
        self.here = trio.Event()
        self.here.set()
        self.changed = trio.Event()
        self.identity = "first"
        """Of the bus topic."""
        self.twice = False
        """Every record is written twice, as a producer that was rebuilt may do."""
        self.refuse: Callable[[Record], bool] = lambda record: False
        self.watchers: list[Callable[[], None]] = []
        """Told when it goes away or comes back."""

    def facts(self, topic: str) -> TopicFacts | None:
        return self.sizes if self.here.is_set() else None

    def log(self, topic: str, partition: int) -> list[ConsumedRecord]:
        return self.logs.setdefault((topic, partition), [])

    def records(self, topic: str) -> list[ConsumedRecord]:
        return [record for (name, _), log in sorted(self.logs.items()) if name == topic for record in log]

    def append(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes]] = (),
        timestamp_ms: int | None = None,
    ) -> None:
        log = self.log(topic, partition)
        log.append(ConsumedRecord(topic, partition, len(log), key, value, headers, timestamp_ms or 0))
        self.changed.set()
        self.changed = trio.Event()

    def grow(self, partitions: int) -> None:
        self.sizes = attrs.evolve(self.sizes, partitions=partitions)

    def go_away(self) -> None:
        self.here = trio.Event()
        for look in self.watchers:
            look()

    def come_back(self) -> None:
        self.here.set()
        for look in self.watchers:
            look()

    def trouble(self) -> str | None:
        return None if self.here.is_set() else "planned"


class MemoryProducer:
    def __init__(self, kafka: MemoryKafka) -> None:
        self.kafka = kafka
        self.after_drain: Callable[[], None] = lambda: None
        self.queue: list[Record] = []
        self.offered = trio.Event()
        self.emptied = trio.Event()

    def offer(self, record: Record) -> None:
        self.queue.append(record)
        self.offered.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            await self.offered.wait()
            await trio.sleep(LATENCY)
            while self.queue:
                await self.kafka.here.wait()
                self.write(self.queue.pop(0))
            self.offered = trio.Event()
            self.after_drain()
            self.emptied.set()
            self.emptied = trio.Event()

    def write(self, record: Record) -> None:
        assert record.partition is not None
        assert record.done is not None
        check("bus", record, record.partition)
        if self.kafka.refuse(record):
            record.done(ValueError("refused"))
            return
        for _ in range(2 if self.kafka.twice else 1):
            self.kafka.append(
                record.topic, record.partition, record.key, record.value, record.headers, record.timestamp_ms
            )
        record.done(None)

    async def stop(self) -> None:
        try:
            if self.queue:
                await self.emptied.wait()
        finally:
            queue, self.queue = self.queue, []
            for record in queue:
                assert record.done is not None
                record.done(GatewayError("closed before Kafka confirmed the record", retriable=True))

    def counters(self) -> dict[str, int]:
        return {}


class MemoryConsumer:
    """Reads the bus topic from the end and the retained topic from the beginning, one record a call."""

    def __init__(
        self,
        kafka: MemoryKafka,
        settings: BusSettings,
        on_records: Callable[[list[ConsumedRecord]], None],
        offsets: Mapping[int, int],
    ) -> None:
        self.kafka = kafka
        self.settings = settings
        self.on_records = on_records
        self.positions_known = trio.Event()
        self.caught_up = trio.Event()
        self.room: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.on_another: Callable[[str, str | None], None] = lambda topic, identity: None
        self.expected: str | None = None
        self.gate = trio.Event()
        """While it is not set, nothing more is read."""
        self.gate.set()
        self.positions: dict[tuple[str, int], int] = {}
        self.offsets = offsets
        self.began: dict[tuple[str, int], Began] = {}
        self.committed: dict[tuple[str, int], int] = {}
        self.known_partitions: int | None = None
        """As of its metadata; None: as Kafka has."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await self.kafka.here.wait()
        bus, retained = self.settings.topic, self.settings.retained_topic
        another = self.expected not in (None, self.kafka.identity)
        for number in range(self.kafka.sizes.partitions):
            first, end = self.kafka.first.get((bus, number), 0), len(self.kafka.log(bus, number))
            wanted = self.offsets.get(number, 0) if self.offsets else end
            wanted = first if another else wanted
            start = self.positions[bus, number] = min(max(wanted, first), end)
            self.began[bus, number] = Began(start, end, max(0, first - wanted), another=another)
            self.positions[retained, number] = 0
        self.positions_known.set()
        while True:
            changed = self.kafka.changed
            await self.kafka.here.wait()
            for number in range(self.known_partitions or self.kafka.sizes.partitions):
                for topic in (bus, retained):
                    self.positions.setdefault((topic, number), 0)  # the topic has grown
            for key, position in self.positions.items():
                log = self.kafka.log(*key)
                for record in log[position:]:
                    await self.gate.wait()
                    await self.room()
                    self.positions[key] += 1
                    self.on_records([record])
            self.caught_up.set()
            await changed.wait()

    def expect(self, topic: str, identity: str) -> None:
        self.expected = identity

    def identity(self, topic: str) -> str | None:
        return self.kafka.identity

    def commit(self, offsets: Mapping[tuple[str, int], int]) -> None:
        self.committed.update(offsets)

    def counters(self) -> dict[str, int]:
        return {}


class FakeLocal:
    """What a node's subscribers and its retained store see."""

    def __init__(self) -> None:
        self.seen: list[FrameRun | Message] = []
        self.retained: dict[str, Message] = {}
        self.missed: list[Message] = []
        self.grouped: list[tuple[Message, str]] = []

    def publish(self, messages: Iterable[Message], *, tapped: bool = False) -> None:
        assert not tapped
        self.seen += messages

    def bring(self, parcels: Sequence[Parcel]) -> int:
        self.seen += [parcel.message for parcel in parcels]
        return len(parcels)

    def objection(self, topic_name: str) -> str | None:
        return None

    def publish_runs(self, runs: Iterable[FrameRun]) -> None:
        self.seen += runs

    def publish_missed(self, messages: Iterable[Message]) -> None:
        self.missed += messages

    def publish_to_groups(self, messages: Iterable[Message], names: Collection[str]) -> None:
        self.grouped += [(message, name) for message in messages for name in names]

    def set_retained(self, message: Message) -> None:
        if message.payload:
            self.retained[message.topic_name] = message
        else:
            self.retained.pop(message.topic_name, None)

    def has_room(self, *, tapped: bool = False) -> bool:
        return True

    def when_room(self, callback: Callable[[], None], *, tapped: bool = False) -> None:
        callback()

    def when_kept(self, callback: Callable[[], None]) -> None:
        callback()


class FakeHost:
    def __init__(self, node_id: str, instance_id: bytes) -> None:
        self.node_id = node_id
        self.instance_id = instance_id
        self.sinks: list[EventSink] = []
        self.complete = trio.Event()
        self.complete.set()
        self.local = FakeLocal()
        self.taps: list[Tap] = []
        self.stopped: list[bool] = []
        self.data: Path | None = None
        self.watchers: list[Callable[[Newcomer], None]] = []
        self.clients: dict[str, float] = {}
        """Clients that are connected, and when they did so."""
        self.taken: list[tuple[Newcomer, str]] = []
        self.spread: Spread | None = None
        self.waiting: dict[str, list[Message]] = {}
        """Of share groups without connected members."""

    def add_tap(self, tap: Tap) -> None:
        self.taps.append(tap)

    def local_client(self, name: str) -> LocalClient:
        return self.local

    @property
    def marks(self) -> Mapping[str, bytes] | None:
        return None

    def note(self, source: Callable[[], Mapping[str, bytes | None]]) -> None:
        pass

    def commit(self) -> None:
        pass

    def make_spool(self, name: str, max_bytes: int) -> Spool:
        assert self.data is not None, "this test has no place for a spool"
        return Spool(spool_path(self.data, name), max_bytes=max_bytes, synchronous="OFF", run_sync=inline)

    def watch_events(self, sink: EventSink) -> None:
        self.sinks.append(sink)

    def figures(self) -> Iterable[Figure]:
        return ()

    def watch_clients(self, watcher: Callable[[Newcomer], None]) -> None:
        self.watchers.append(watcher)

    def connected_at(self, client_id: str) -> float | None:
        return self.clients.get(client_id)

    def taken_elsewhere(self, newcomer: Newcomer, node: str) -> bool:
        if self.clients.pop(newcomer.client_id, None) is None:
            return False
        self.taken.append((newcomer, node))
        return True

    def spread_groups(self, spread: Spread) -> None:
        self.spread = spread

    def take_waiting(self, name: str, *, ends: bool = False) -> list[Message]:
        return self.waiting.pop(name, [])

    def reroute(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def stop_publishers(self, owner: object) -> None:
        self.stopped.append(True)

    def resume_publishers(self, owner: object) -> None:
        self.stopped.append(False)


@attrs.define
class Node:
    """One node of the cluster under test."""

    host: FakeHost
    bus: Bus
    consumer: MemoryConsumer
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    error: Exception | None = None
    ended: trio.Event = attrs.Factory(trio.Event)

    @property
    def seen(self) -> list[FrameRun | Message]:
        return self.host.local.seen

    @property
    def payloads(self) -> list[bytes]:
        """Payloads of what the subscribers saw; packets of runs by their last byte."""
        return [item.payload if isinstance(item, Message) else item.frames[-1:] for item in self.seen]

    def run_published(self, run: FrameRun, topic: str) -> object:
        route = self.bus.route(topic)
        assert route is not None
        return route.take_run(run)

    def publish(self, topic: str, payload: bytes = b"x", *, qos: int = 0, retain: bool = False) -> object:
        """What the broker does with a PUBLISH of one of its clients."""
        message = Message(topic, payload, qos, retain, client_id=self.host.node_id, published_at=NOW)
        if retain:
            self.host.local.set_retained(message)
        route = self.bus.route(topic)
        assert route is not None
        return route.take(message)

    def connect(self, client_id: str, at: float, *, clean_start: bool = False) -> None:
        """What the broker does with a CONNECT."""
        self.host.clients[client_id] = at
        for tell in self.host.watchers:
            tell(Newcomer(client_id, None, clean_start, at))

    def kill(self) -> None:
        """End without a word, as kill -9 does."""
        self.scope.cancel()


class OnceStatus(trio.TaskStatus[None]):
    """`started()` may be called again."""

    def __init__(self, status: trio.TaskStatus[None]) -> None:
        self._status: trio.TaskStatus[None] | None = status

    def started(self, value: None = None) -> None:
        if self._status is not None:
            self._status.started()
        self._status = None


_numbers = iter(range(1, 1_000_000))


def make_node(kafka: MemoryKafka, node_id: str, settings: BusSettings = SETTINGS) -> Node:
    host = FakeHost(node_id, next(_numbers).to_bytes(16, "big"))
    consumers: list[MemoryConsumer] = []

    def make_consumer(on_records: Callable[[list[ConsumedRecord]], None], offsets: Mapping[int, int]) -> MemoryConsumer:
        consumers.append(MemoryConsumer(kafka, settings, on_records, offsets))
        return consumers[0]

    bus = Bus(settings, host, MemoryProducer(kafka), make_consumer, kafka.facts)
    bus.outbox.trouble = kafka.trouble
    kafka.watchers.append(bus.outbox.look)
    return Node(host, bus, consumers[0])


async def run_node(node: Node, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Run the bus of `node` as the gateway does; what it raises stands in `node.error`."""
    try:
        with node.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(note_error, node)
                task_status.started()
    finally:
        node.ended.set()


async def note_error(node: Node, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    status = OnceStatus(task_status)
    try:
        await node.bus.run(task_status=status)
    except StartError as exc:
        node.error = exc
        status.started()


async def start_node(nursery: trio.Nursery, kafka: MemoryKafka, node_id: str, settings: BusSettings = SETTINGS) -> Node:
    """Start a node; back when its listeners would open (or it failed)."""
    node = make_node(kafka, node_id, settings)
    await nursery.start(run_node, node)
    return node
