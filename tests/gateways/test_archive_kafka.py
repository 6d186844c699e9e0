"""The bridge, the archive store and the gateway against a real Kafka."""

from __future__ import annotations

import json
import logging
import random
from base64 import b64decode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import kafka as client
import pytest
import trio
from jsonschema import Draft202012Validator

from gateways.kafka import build, client_settings
from gateways.kafka.archive import KafkaArchiveStore
from gateways.kafka.avro import AvroMapper
from gateways.kafka.bridge import ConsumerBridge, ProducerBridge, Record
from gateways.kafka.cluster import Cluster, TopicFacts
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.options import KafkaOptions, TopicOptions, TopicsOptions
from gateways.kafka.partitions import partition_for
from gateways.kafka.precheck import probe
from gateways.kafka.reading import reader_of
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.schema_files import load_schema
from gateways.kafka.topic_plan import TopicPlan
from gateways.kafka.topics import TopicManager
from gateways.kafka.workers import consumed, quiet_loggers
from mqtt_trio.errors import ConfigError
from mqtt_trio.gateway import Message, MessageProperties, Outcome
from tests.gateway_support import LIMIT, Outcomes, read_records, told, without_stream
from tests.kafka_support import KafkaNode, unique_name


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_loggers()


@attrs.define(kw_only=True)
class Harness(Outcomes[bytes]):
    """A producer, the topics that it needs, and what became of its records."""

    options: KafkaOptions
    cluster: Cluster
    bridge: ProducerBridge

    def offer(self, topic: str, value: bytes, partition: int | None = 0, key: bytes | None = None) -> None:
        self.bridge.offer(Record(topic, partition, key, value, done=partial(self.done, value)))

    def failures(self) -> dict[bytes, Exception]:
        return {value: error for value, error in self.outcomes.items() if error is not None}


@asynccontextmanager
async def producing(
    node: KafkaNode, *plans: TopicPlan, window: int = 1000, name: str = "test"
) -> AsyncIterator[Harness]:
    options = KafkaOptions(servers=node.servers)
    cluster = Cluster(options.server_names, probe(options))
    topics = TopicManager(options, cluster, plans)
    bridge = ProducerBridge(
        options, cluster, name=name, compression="gzip", window_records=window, window_bytes=32 << 20
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(topics.run)
        with trio.fail_after(LIMIT):
            await topics.complete.wait()
        await nursery.start(bridge.run)
        yield Harness(options=options, cluster=cluster, bridge=bridge)
        with trio.move_on_after(5):
            await bridge.stop()
        nursery.cancel_scope.cancel()


async def read_back(servers: str, topic: str, count: int) -> list[Any]:
    return await trio.to_thread.run_sync(read_records, servers, topic, count)


@pytest.mark.kafka
async def test_archived_messages_read_back_as_the_schema_says(kafka: KafkaNode) -> None:
    topic = unique_name("archive")
    payloads = [b"", b"text", "grün".encode(), bytes(range(256)), b"\x00", b"large" * 300_000]
    properties = MessageProperties(content_type="x/y", user_properties=(("a", "1"), ("a", "2")))
    messages = [
        Message(f"sensors/{number % 3}", payload, number % 3, properties=properties, client_id="c", published_at=1.5)
        for number, payload in enumerate(payloads)
    ]
    large = {"max.message.bytes": str(4 << 20)}
    outcomes: list[Any] = []
    done = trio.Event()

    def finished(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done.set()

    async with producing(kafka, TopicPlan(name=topic, partitions=5, config=large), name="archive") as harness:
        store = KafkaArchiveStore(harness.bridge, JsonMapper(topic, "node-1"))
        assert store.describe() == f"Kafka topic {topic}"
        store.submit(messages[:2], outcomes.append)
        store.submit([], outcomes.append)
        store.submit(messages[2:], finished)
        with trio.fail_after(LIMIT):
            await done.wait()
            await store.stop()
    assert outcomes == [{}, {}, {}]
    records = await read_back(kafka.servers, topic, len(messages))
    assert len(records) == len(messages)
    validator = Draft202012Validator(load_schema("mqtt_message.schema.json"))
    found: list[tuple[str, bytes]] = []
    for record in records:
        value = json.loads(record.value)
        validator.validate(value)
        assert record.key == value["topic"].encode()
        assert record.partition == partition_for(record.key, 5)
        assert record.timestamp == 1500
        assert value["brokerId"] == "node-1"
        assert dict(record.headers)["mqtt.qos"] == b"%d" % value["qos"]
        text = value["payload"]
        found.append((value["topic"], b64decode(text) if "payloadEncoding" in value else text.encode()))
    sent = [(message.topic_name, message.payload) for message in messages]
    for name in ("sensors/0", "sensors/1", "sensors/2"):
        assert [item for item in found if item[0] == name] == [item for item in sent if item[0] == name]


@pytest.mark.kafka
async def test_avro_without_a_registry_reads_back(kafka: KafkaNode) -> None:
    topic, done = unique_name("avro"), trio.Event()
    messages = [Message(f"s/{n}", bytes((n, 255)), n % 3, client_id="c", published_at=1.5) for n in range(5)]
    async with producing(kafka, TopicPlan(name=topic, partitions=1), name="archive") as harness:
        store = KafkaArchiveStore(harness.bridge, AvroMapper(topic, "node-1"))
        store.submit(messages, lambda outcome: done.set() if not outcome else None)
        with trio.fail_after(LIMIT):
            await done.wait()
            await store.stop()
    reader = reader_of("AVRO")
    found = [reader.read(consumed(record)).message for record in await read_back(kafka.servers, topic, len(messages))]
    assert [(m.topic_name, m.payload, m.qos) for m in found] == [(m.topic_name, m.payload, m.qos) for m in messages]


@pytest.mark.kafka
async def test_a_record_that_kafka_refuses_fails_alone(kafka: KafkaNode) -> None:
    small, compacted = unique_name("small"), unique_name("compacted")
    plans = [
        TopicPlan(name=small, partitions=1, config={"max.message.bytes": "2000"}),
        TopicPlan(name=compacted, partitions=1, config={"cleanup.policy": "compact"}),
    ]
    async with producing(kafka, *plans) as harness:
        # Somebody lowered the limit after we asked: the broker refuses what we took for small enough.
        harness.cluster.know(small, TopicFacts(partitions=1))
        noise = "".join(chr(33 + number * number % 90) + str(number) for number in range(3000)).encode()
        for number in range(40):
            harness.offer(small, b"%d" % number)
            harness.offer(compacted, b"c%d" % number, key=None if number == 7 else b"k%d" % number)
            if number == 20:
                harness.offer(small, noise)
        await harness.until(lambda: len(harness.outcomes) == 81)
        assert harness.failures().keys() == {noise, b"c7"}
        counters = harness.bridge.counters()
        assert (counters["records_sent"], counters["records_failed"]) == (79, 2)
    assert [record.value for record in await read_back(kafka.servers, small, 40)] == [b"%d" % n for n in range(40)]
    kept = [record.value for record in await read_back(kafka.servers, compacted, 39)]
    assert kept == [b"c%d" % number for number in range(40) if number != 7]


@pytest.mark.kafka
async def test_what_is_too_large_is_not_sent_and_what_compresses_is(kafka: KafkaNode) -> None:
    topic = unique_name("limit")
    async with producing(kafka, TopicPlan(name=topic, partitions=1, config={"max.message.bytes": "5000"})) as harness:
        noise = random.Random(1).randbytes(6000)
        harness.offer(topic, noise)
        harness.offer(topic, b"a" * 6000)
        await harness.until(lambda: len(harness.outcomes) == 2)
        assert harness.failures().keys() == {noise}
        assert harness.bridge.counters()["rebuilds"] == 0


@attrs.define
class Received:
    """What a consumer bridge saw, per partition, each value at its first appearance."""

    values: dict[int, list[int]] = attrs.field(factory=dict)
    seen: set[bytes] = attrs.field(factory=set)
    repeated: int = 0
    changed: trio.Event = attrs.field(factory=trio.Event)

    def on_records(self, records: list[ConsumedRecord]) -> None:
        for record in records:
            assert record.value is not None
            if record.value in self.seen:
                self.repeated += 1
                continue
            self.seen.add(record.value)
            self.values.setdefault(record.partition, []).append(int(record.value))
        self.changed.set()

    async def until(self, count: int) -> None:
        with trio.fail_after(LIMIT):
            while len(self.seen) < count:
                self.changed = trio.Event()
                await self.changed.wait()


@pytest.mark.kafka
async def test_kafka_is_killed_under_load_and_nothing_is_lost(
    own_kafka: KafkaNode, caplog: pytest.LogCaptureFixture
) -> None:
    topic, count, received = "load", 20_000, Received()
    async with producing(own_kafka, TopicPlan(name=topic, partitions=3), window=2000) as harness:
        consumer = ConsumerBridge(harness.options, harness.cluster, [(topic, "end")], received.on_records)
        async with trio.open_nursery() as nursery:
            await nursery.start(consumer.run)
            with trio.fail_after(LIMIT):
                await consumer.positions_known.wait()
            nursery.start_soon(offer_many, harness, topic, count)
            await harness.until(lambda: len(harness.outcomes) > count // 4)
            await trio.to_thread.run_sync(own_kafka.kill)
            at_the_kill = len(harness.outcomes)
            await told(harness.cluster, lambda: harness.cluster.is_away)
            assert harness.bridge.outstanding_records <= 2001  # memory stays within the window
            await trio.to_thread.run_sync(own_kafka.start)
            await harness.until(lambda: len(harness.outcomes) == count)
            await received.until(count)
            await told(harness.cluster, lambda: not harness.cluster.is_away)  # each part says so by itself
            nursery.cancel_scope.cancel()
        assert at_the_kill < count
        assert harness.failures() == {}
    for partition, values in received.values.items():
        assert values == list(range(partition, count, 3))
    messages = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 2, messages
    assert f"Kafka at {own_kafka.servers} is away" in messages[0]
    assert messages[1] == f"Kafka at {own_kafka.servers} is back"


async def offer_many(harness: Harness, topic: str, count: int) -> None:
    for number in range(count):
        if harness.bridge.full:
            room = trio.Event()
            harness.bridge.when_room(room.set)
            await room.wait()
        harness.offer(topic, b"%d" % number, number % 3)
        if number % 100 == 0:
            await trio.lowlevel.checkpoint()


@pytest.mark.kafka
async def test_stop_is_bounded_while_kafka_is_dead(own_kafka: KafkaNode) -> None:
    async with producing(own_kafka, TopicPlan(name="t", partitions=1)) as harness:
        harness.offer("t", b"first")
        await harness.until(lambda: len(harness.outcomes) == 1)
        await trio.to_thread.run_sync(own_kafka.kill)
        for number in range(500):
            harness.offer("t", b"%d" % number)
        before = trio.current_time()
        with trio.move_on_after(0.5) as scope:
            await harness.bridge.stop()
        assert scope.cancelled_caught
        assert trio.current_time() - before < 3
        assert len(harness.failures()) == 500


class FakeHost:
    """As much of the broker as a gateway without the bus needs."""

    node_id = "node-1"
    instance_id = bytes(16)

    def __init__(self) -> None:
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1


@asynccontextmanager
async def running(options: KafkaOptions, topics: Sequence[str | None]) -> AsyncIterator[tuple[KafkaGateway, list[Any]]]:
    gateway = build(without_stream(options))
    stores = [gateway.archive_store(topic, f"group-{number}") for number, topic in enumerate(topics)]
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            await nursery.start(gateway.run, FakeHost())
        for store in stores:
            await nursery.start(store.run)
        yield gateway, stores
        with trio.move_on_after(1):
            await gateway.stop()
        nursery.cancel_scope.cancel()


@pytest.mark.kafka
async def test_the_gateway_archives_into_topics_that_it_made(own_kafka: KafkaNode) -> None:
    options = KafkaOptions(servers=own_kafka.servers, topics=TopicsOptions(archive=TopicOptions(partitions=4)))
    for round_number in range(2):  # the second start finds everything and changes nothing
        results: list[Any] = []
        async with running(options, [None, "mqtt.sensors"]) as (gateway, stores):
            for store in stores:
                store.submit([Message(f"sensors/{round_number}", b"1")], results.append)
            with trio.fail_after(LIMIT):
                for store in stores:
                    await store.stop()
            assert results == [{}, {}]
            assert gateway.describe()[0] == f"Kafka {own_kafka.servers}: connected"
            assert gateway.counters()["archive_records_sent"] == 2
    admin = client.KafkaAdminClient(bootstrap_servers=own_kafka.servers)
    try:
        topics = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics()}
    finally:
        admin.close()
    assert topics == {
        "mqtt.archive": 4,
        "mqtt.dlq": 3,
        "mqtt.sensors": 4,
    }
    assert len(await read_back(own_kafka.servers, "mqtt.sensors", 2)) == 2


@pytest.mark.parametrize(
    "servers,reason",
    [
        ("no-such-host.invalid:9092", "the host name 'no-such-host.invalid' is unknown"),
        ("127.0.0.1:1", "127.0.0.1:1 refuses connections"),
    ],
)
async def test_a_kafka_that_is_not_there_is_told_once(
    servers: str, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_settings, "COMMON", {**client_settings.COMMON, "bootstrap_timeout_ms": 100})
    with caplog.at_level(logging.INFO):
        async with running(KafkaOptions(servers=servers), [None]) as (gateway, stores):
            results: list[Any] = []
            stores[0].submit([Message("a", b"1")], results.append)
            await told(gateway.cluster, lambda: gateway.cluster.is_away)
            assert results == []
            assert gateway.describe()[0] == f"Kafka {servers}: away, trying until it answers"
    assert len(caplog.records) == 1
    assert reason in caplog.records[0].message
    assert results == []  # closed before it was stored: nobody knows what became of it


@pytest.mark.parametrize(
    "table,problem",
    [
        ({"producer": {"linger.msec": 5}}, "Kafka.Producer.linger_msec: kafka-python has no such option"),
        ({"consumer": {"group_id": "x"}}, "Kafka.Consumer.group_id: set by the gateway itself; Kafka.Topics.Messages"),
        (
            {"consumer": {"auto.offset.reset": "none"}},
            "Kafka.Consumer.auto_offset_reset: expected one of earliest, latest, got 'none'",
        ),
        ({"producer": {"auto_offset_reset": "earliest"}}, "Kafka.Producer.auto_offset_reset: kafka-python has no such"),
        ({"consumer": {"enable.auto.commit": 1}}, "Kafka.Consumer.enable_auto_commit: expected true or false, got 1"),
        ({"producer": {"enable.auto.commit": True}}, "Kafka.Producer.enable_auto_commit: kafka-python has no such opt"),
        ({"producer": {"linger_ms": "abc"}}, "Kafka.Producer.linger_ms: expected a number, got 'abc'"),
        ({"producer": {"linger_ms": True}}, "Kafka.Producer.linger_ms: expected a number, got True"),
        ({"producer": {"linger.ms": -1}}, "Kafka.Producer.linger_ms: expected 0 or more, got -1"),
        ({"producer": {"acks": 2}}, "Kafka.Producer.acks: expected one of all, -1, 0, 1, got 2"),
        (
            {"producer": {"compression.type": "zip"}},
            "Kafka.Producer.compression_type: expected one of gzip, lz4, snappy, zstd, got 'zip'",
        ),
        (
            {"producer": {"acks": 1, "enable.idempotence": True}},
            'Kafka.Producer.enable_idempotence: needs acks = "all", not 1',
        ),
        (
            {"producer": {"max_in_flight_requests_per_connection": 6}},
            "Kafka.Producer.max_in_flight_requests_per_connection: more than 5; with it",
        ),
        ({"producer": {"retries": 0}}, "Kafka.Producer.retries: with it records may be doubled"),
        (
            {"consumer": {"isolation_level": "none"}},
            "Kafka.Consumer.isolation_level: expected one of read_uncommitted, read_committed",
        ),
        (
            {"consumer": {"partition_assignment_strategy": "range"}},
            "Kafka.Consumer.partition_assignment_strategy: set by the gateway itself",
        ),
        ({"consumer": {"check_crcs": 1}}, "Kafka.Consumer.check_crcs: expected true or false, got 1"),
        ({"consumer": {"client_rack": 7}}, "Kafka.Consumer.client_rack: expected text, got 7"),
    ],
)
def test_client_options_are_checked_at_the_start(table: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(KafkaOptions(**table))
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_client_options_under_both_spellings_are_fine() -> None:
    gateway = build(KafkaOptions(producer={"linger.ms": 5, "acks": "all"}, consumer={"fetch.max.bytes": 1}))
    assert isinstance(gateway, KafkaGateway)
