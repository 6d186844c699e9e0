"""Topics that are deleted, or closed to the node, under load: with a spool all that was acknowledged arrives in order,
and nothing becomes a dead letter, however long it takes [K9, K10, K12, K22]."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import kafka as client
import pytest
import trio
from kafka.admin import ACL, ACLFilter, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType

from gateways.kafka import build
from gateways.kafka.bus_records import Kind, decode_header, decode_items, split_frames
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import BusOptions, KafkaOptions, TopicOptions, TopicsOptions
from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions
from mqtt_trio.archive.spool import Spool
from mqtt_trio.gateway import FrameRun, Hold, Message
from tests.gateway_support import LIMIT, without_stream
from tests.gateways.memory_bus import FakeHost, run_of
from tests.gateways.secured import login, options_of, trust
from tests.kafka_support import SecureKafka, unique_name

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

USER = "User:limited"
PARTITIONS = 3
TIMEOUT = 3.0
"""Seconds: DeliveryTimeout, after which other records would be dead letters."""
MQTT_TOPICS = ("t/0", "t/1", "t/2")


@attrs.define
class Topics:
    """What the node writes to, and who may do what with it. Everything blocks."""

    servers: str
    archive: str = attrs.Factory(lambda: unique_name("archive"))
    bus: str = attrs.Factory(lambda: unique_name("bus"))
    retained: str = attrs.Factory(lambda: unique_name("retained"))
    dlq: str = attrs.Factory(lambda: unique_name("dlq"))

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[Any]:
        admin: Any = await trio.to_thread.run_sync(partial(client.KafkaAdminClient, bootstrap_servers=self.servers))
        yield admin
        await trio.to_thread.run_sync(admin.close)

    def make(self, admin: Any, *names: str) -> None:
        admin.create_topics({name: {"num_partitions": PARTITIONS, "replication_factor": 1} for name in names})

    def allow(self, admin: Any, operation: ACLOperation, *names: str) -> None:
        admin.create_acls([acl(name, operation) for name in names])

    def forbid_writing(self, admin: Any, *names: str) -> None:
        admin.delete_acls([
            ACLFilter(
                USER, "*", ACLOperation.WRITE, ACLPermissionType.ANY, ResourcePattern(ResourceType.TOPIC, name)
            )
            for name in names
        ])  # fmt: skip


def acl(name: str, operation: ACLOperation) -> ACL:
    return ACL(USER, "*", operation, ACLPermissionType.ALLOW, ResourcePattern(ResourceType.TOPIC, name))


@attrs.define
class Node:
    """A gateway with an archive group and the bus, both with Ack = "store" and a spool."""

    topics: Topics
    gateway: KafkaGateway
    group: ArchiveGroup
    number: int = 0
    answers: dict[str, list[Hold]] = attrs.Factory(lambda: {"archive": [], "bus": []})

    def publish(self) -> None:
        """Publish the next message to both."""
        number, self.number = self.number, self.number + 1
        topic = MQTT_TOPICS[number % len(MQTT_TOPICS)]
        payload = b"%06d" % number
        bus = self.gateway._bus
        assert bus is not None
        route = bus.route(topic)
        assert route is not None
        taken = {
            "archive": self.group.take(Message(topic, payload, 1, client_id="c")),
            "bus": route.take_run(run_of(topic, payload, qos=1)),
        }
        for kind, answer in taken.items():
            assert isinstance(answer, Hold)
            self.answers[kind].append(answer)

    async def publish_until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(LIMIT):
            while not condition():
                self.publish()
                await trio.sleep(0.005)

    def acknowledged(self, number: int | None = None) -> bool:
        """Whether all messages were acknowledged, or the one with this number."""
        chosen = slice(None) if number is None else slice(number, number + 1)
        holds = [hold for answers in self.answers.values() for hold in answers[chosen]]
        return all(hold.released and hold.refused is None for hold in holds)

    def in_trouble(self, seconds: float = 0.0) -> bool:
        """Whether both know that they may not write, for so long."""
        cluster = self.gateway.cluster
        troubles = [cluster.trouble(topic) for topic in (self.topics.archive, self.topics.bus)]
        return all(trouble is not None and time.monotonic() - trouble.since > seconds for trouble in troubles)

    def rebuilt(self) -> bool:
        """Whether both producers were replaced: what they had in hand waits for its topic now."""
        counters = self.gateway.counters()
        return counters["archive_rebuilds"] > 0 and counters["bus_producer_rebuilds"] > 0

    def empty(self) -> bool:
        """Whether all is in Kafka."""
        assert self.gateway._bus is not None
        outbox = self.gateway._bus.outbox
        assert outbox.spool is not None
        assert self.group.shipper.spool is not None
        waits = self.group.waiting_messages + self.group.shipper.spool.messages + outbox.spool.disk.messages
        return not waits and not outbox.flights and self.acknowledged()


@asynccontextmanager
async def running(kafka: SecureKafka, topics: Topics, folder: Path) -> AsyncIterator[Node]:
    options: KafkaOptions = options_of(
        kafka,
        ("SASL_SSL", login(kafka, "PLAIN", "limited"), trust(kafka)),
        bus=BusOptions(enabled=True, topic=topics.bus, ack="store"),
        topics=TopicsOptions(
            retained=TopicOptions(name=topics.retained),
            archive=TopicOptions(name=topics.archive, partitions=PARTITIONS),
            dlq=TopicOptions(name=topics.dlq),
        ),
        producer={"delivery.timeout.ms": int(TIMEOUT * 1000)},
        consumer={"metadata_max_age_ms": 500},
    )
    gateway = build(without_stream(options))
    host = FakeHost("node", bytes(16))
    host.data = folder
    group = ArchiveGroup(
        ArchiveGroupOptions(name="G", store="KAFKA", ack="store"),
        gateway.archive_store(None, "G", spooled=True),
        host,
        Spool(folder / "archive", max_bytes=1 << 30, synchronous="OFF"),
    )
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            await nursery.start(gateway.run, host)
            await nursery.start(group.run)
        yield Node(topics, gateway, group)
        with trio.move_on_after(5):
            await group.stop()
            await gateway.stop()
        nursery.cancel_scope.cancel()


def read(servers: str, topic: str) -> list[Any]:
    """Return all records of `topic`, each partition in its order."""
    consumer = client.KafkaConsumer(bootstrap_servers=servers, group_id=None)
    partitions = [client.TopicPartition(topic, number) for number in range(PARTITIONS)]
    found: list[Any] = []
    try:
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        while any(consumer.position(p) < ends[p] for p in partitions):
            for records in consumer.poll(timeout_ms=500).values():
                found += records
    finally:
        consumer.close()
    return found


def archived(servers: str, topic: str) -> dict[str, list[int]]:
    """Return the numbers of each MQTT topic, first ones only."""
    found: dict[str, dict[int, None]] = {}
    for record in read(servers, topic):
        value = json.loads(record.value)
        found.setdefault(value["topic"], {})[int(value["payload"])] = None
    return {name: list(numbers) for name, numbers in found.items()}


def on_the_bus(servers: str, topic: str) -> dict[str, list[int]]:
    found: dict[str, dict[int, None]] = {}
    for record in read(servers, topic):
        header = decode_header(record.value)
        if header.kind is not Kind.BATCH:
            continue
        for item in decode_items(record.value, header.body_start):
            assert isinstance(item, FrameRun)
            for frame in split_frames(item.frames):
                found.setdefault(frame[4:7].decode(), {})[int(frame[-6:])] = None
    return {name: list(numbers) for name, numbers in found.items()}


async def check(node: Node, since: int = 0) -> None:
    """Everything from number `since` on is there, in order; nothing was given up."""
    topics, count = node.topics, len(MQTT_TOPICS)
    expected = {
        name: [number for number in range(node.number) if number % count == at and number >= since]
        for at, name in enumerate(MQTT_TOPICS)
    }
    for look, topic in ((archived, topics.archive), (on_the_bus, topics.bus)):
        found = await trio.to_thread.run_sync(look, topics.servers, topic)
        assert {name: [n for n in numbers if n >= since] for name, numbers in found.items()} == expected
    counters = node.gateway.counters()
    assert not any(value for name, value in counters.items() if name.startswith("dlq_")), "no dead letters"
    assert node.group.counters()["failed"] == 0
    assert node.group.counters()["spooled"] > 0
    assert counters["bus_messages_spooled"] > 0
    assert counters["bus_messages_failed"] == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.topics.PATIENCE", 0.3)
    monkeypatch.setattr("gateways.kafka.feeder.LEAVE_AFTER", 1.2)
    monkeypatch.setattr("gateways.kafka.feeder.LEAVE_WAIT", 0.5)


async def prepare(kafka: SecureKafka) -> Topics:
    topics = Topics(kafka.servers)
    names = topics.archive, topics.bus, topics.retained, topics.dlq
    async with topics.admin() as admin:
        await trio.to_thread.run_sync(topics.make, admin, *names)
        for operation in (ACLOperation.DESCRIBE, ACLOperation.READ, ACLOperation.WRITE):
            await trio.to_thread.run_sync(topics.allow, admin, operation, *names)
    return topics


async def test_a_right_that_is_taken_away_under_load_and_given_back(
    quick: None, secure_kafka: SecureKafka, tmp_path: Path
) -> None:
    topics = await prepare(secure_kafka)
    async with topics.admin() as admin, running(secure_kafka, topics, tmp_path) as node:
        await node.publish_until(lambda: node.number > 200 and node.acknowledged(100))
        await trio.to_thread.run_sync(topics.forbid_writing, admin, topics.archive, topics.bus)
        await node.publish_until(node.in_trouble)
        before = node.number
        await node.publish_until(lambda: node.number > before + 10 and node.acknowledged(before + 5))  # on disk
        await node.publish_until(lambda: node.in_trouble(1.2 * TIMEOUT))
        assert not node.gateway.cluster.is_away
        await trio.to_thread.run_sync(topics.allow, admin, ACLOperation.WRITE, topics.archive, topics.bus)
        await node.publish_until(lambda: not node.in_trouble())
        with trio.fail_after(LIMIT):
            while not node.empty():  # noqa: ASYNC110  what is waited for has no event
                await trio.sleep(0.02)
        await check(node)


async def test_topics_that_are_deleted_under_load_and_made_again_by_somebody_else(
    quick: None, secure_kafka: SecureKafka, tmp_path: Path
) -> None:
    """The node may not make them; what comes meanwhile waits for days, if need be."""
    topics = await prepare(secure_kafka)
    async with topics.admin() as admin, running(secure_kafka, topics, tmp_path) as node:
        await node.publish_until(lambda: node.number > 200 and node.acknowledged(100))
        await trio.to_thread.run_sync(admin.delete_topics, [topics.archive, topics.bus])
        deleted_at = node.number
        await node.publish_until(node.in_trouble)
        before = node.number
        await node.publish_until(lambda: node.number > before + 10 and node.acknowledged(before + 5))  # on disk
        await node.publish_until(lambda: node.in_trouble(1.2 * TIMEOUT) and node.rebuilt())
        before = node.number
        await node.publish_until(lambda: node.number > before + 200)  # what waited too long would be given up now
        assert not node.gateway.cluster.is_away
        await trio.to_thread.run_sync(topics.make, admin, topics.archive, topics.bus)
        await node.publish_until(lambda: not node.in_trouble())
        with trio.fail_after(LIMIT):
            while not node.empty():  # noqa: ASYNC110  what is waited for has no event
                await trio.sleep(0.02)
        await check(node, since=deleted_at)
