"""What a real Kafka takes from anybody, on the topics that a node reads: nothing of it stops the node."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kafka as client
import pytest
import trio
from jsonschema import Draft202012Validator

from gateways.kafka import build
from gateways.kafka.bridge import ConsumerBridge
from gateways.kafka.bus_records import Kind, encode_header
from gateways.kafka.cluster import Cluster
from gateways.kafka.dlq import KafkaSource
from gateways.kafka.dlq_reading import decode_letter
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import BusOptions, KafkaOptions, TopicOptions, TopicsOptions
from gateways.kafka.poller import Assignment
from gateways.kafka.records import ConsumedRecord, Reason
from gateways.kafka.schema_files import load_schema
from mqtt_trio.gateway import Message
from tests.gateway_support import LIMIT, without_stream
from tests.gateways.memory_bus import NOW, FakeHost
from tests.kafka_support import KafkaNode, unique_name

pytestmark = pytest.mark.kafka
CODECS = ("uncompressed", "gzip", "snappy", "lz4", "zstd")


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await trio.sleep(0.02)


def write_all_codecs(servers: str, topics: dict[str, str], values: list[bytes]) -> None:
    admin: Any = client.KafkaAdminClient(bootstrap_servers=servers)
    producer: Any = client.KafkaProducer(bootstrap_servers=servers, linger_ms=50)
    try:
        facts = {
            topic: {"num_partitions": 1, "replication_factor": 1, "configs": {"compression.type": name}}
            for name, topic in topics.items()
        }
        admin.create_topics(facts, wait_for_metadata=True)
        for topic in topics.values():
            for value in values:
                producer.send(topic, value)
        producer.flush(30)
    finally:
        producer.close()
        admin.close()


async def test_a_topic_in_each_codec_is_read(kafka: KafkaNode) -> None:
    topics = {name: unique_name(name) for name in CODECS}
    values = [b"%d " % number * 50 for number in range(200)]
    await trio.to_thread.run_sync(write_all_codecs, kafka.servers, topics, values)
    found: dict[str, list[bytes | None]] = {topic: [] for topic in topics.values()}

    def on_records(records: list[ConsumedRecord]) -> None:
        for record in records:
            assert record.defect is None
            found[record.topic].append(record.value)

    assignments: list[Assignment] = [(topic, "beginning") for topic in topics.values()]
    bridge = ConsumerBridge(KafkaOptions(servers=kafka.servers), Cluster([kafka.servers]), assignments, on_records)
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        await until(lambda: all(len(records) == len(values) for records in found.values()))
        nursery.cancel_scope.cancel()
    assert all(records == values for records in found.values())


@asynccontextmanager
async def running(options: KafkaOptions, node_id: str, instance: bytes) -> AsyncIterator[tuple[KafkaGateway, FakeHost]]:
    gateway, host = build(without_stream(options)), FakeHost(node_id, instance)
    with TemporaryDirectory() as folder:
        host.data = Path(folder)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(LIMIT):
                await nursery.start(gateway.run, host)
            yield gateway, host
            with trio.move_on_after(5):
                await gateway.stop()
            nursery.cancel_scope.cancel()


class NoText(str):
    """A header's name that is no UTF-8: other clients than kafka-python's write any bytes."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"\xff\xfe"


def write_garbage(servers: str, bus: str, retained: str) -> None:
    """Write what nobody should: 12 records to `bus`, 16 to `retained`."""
    rng = random.Random(1)
    foreign = encode_header(Kind.BATCH, b"f" * 16, "foreign", 1)
    values = [
        b"", None, b"{}", rng.randbytes(500), rng.randbytes(900_000), foreign, foreign + b"\x07", b"[" * 100_000,
        b"\x03" + foreign[1:] + b"of the future", b"\x03" + foreign[1:] + b"once more", foreign[:-3],
    ]  # fmt: skip
    producer: Any = client.KafkaProducer(bootstrap_servers=servers, max_request_size=1 << 30)
    packed: Any = client.KafkaProducer(bootstrap_servers=servers, max_request_size=1 << 30, compression_type="zstd")
    try:
        for value in values:
            producer.send(bus, value, key=b"k", partition=0)
            producer.send(retained, value, key=b"a/b", partition=0)
        producer.send(retained, b"x", key=b"\xff", partition=0)
        producer.send(retained, None, key=b"k" * 70_000, partition=0)
        producer.send(
            retained, None, key=b"gone", headers=[("mqtt.sequence", b""), ("mqtt.instance", b"")], partition=0
        )
        producer.flush(30)
        for topic in (bus, retained):  # each is a batch of its own, and what stands in front of it is flushed
            producer.send(topic, b"x", key=b"a", headers=[(NoText("x"), b"1")], partition=0)
            producer.flush(30)
        packed.send(retained, bytes(80 << 20), key=b"a", partition=0)  # a batch of a few kilobytes
        packed.flush(60)
    finally:
        producer.close()
        packed.close()


def read_letters(servers: str, topic: str) -> list[Any]:
    consumer: Any = client.KafkaConsumer(topic, bootstrap_servers=servers, auto_offset_reset="earliest", group_id=None)
    found: list[Any] = []
    try:
        for _ in range(15):
            for records in consumer.poll(timeout_ms=200).values():
                found += records
    finally:
        consumer.close()
    return found


async def test_garbage_on_every_topic_is_counted_and_dead_lettered_and_stalls_nobody(kafka: KafkaNode) -> None:
    bus, retained, dlq = unique_name("bus"), unique_name("retained"), unique_name("dlq")
    topics = TopicsOptions(
        bus=TopicOptions(partitions=1), retained=TopicOptions(name=retained, partitions=1), dlq=TopicOptions(name=dlq)
    )
    options = KafkaOptions(servers=kafka.servers, bus=BusOptions(enabled=True, topic=bus), topics=topics)
    async with running(options, "one", b"1" * 16) as (one, host), running(options, "two", b"2" * 16) as (_two, other):
        await trio.to_thread.run_sync(write_garbage, kafka.servers, bus, retained)
        message = Message("behind", b"all of it", 1, client_id="c", published_at=NOW)
        kept = Message("behind/kept", b"all of it", 1, True, client_id="c", published_at=NOW)
        for each in (message, kept):
            route = other.taps[0].route(each.topic_name)
            assert route is not None
            route.take(each)
        await until(lambda: message in host.local.seen and "behind/kept" in host.local.retained)
        counters = one.counters()
        refused = counters["bus_records_malformed"] + counters["bus_records_unknown_version"]
        assert refused + counters["bus_records_doubled"] == 12 - 1  # a batch with nothing in it is one
        assert counters["bus_records_unknown_version"] >= 2
        refused = counters["retained_records_malformed"] + counters["retained_records_unknown_version"]
        assert refused == 16 - 2  # two remove a message
        assert counters["bus_records_undelivered"] == 0
        await until(lambda: one.counters()["dlq_letters_written"] == one.counters()["dlq_letters"])
    third = KafkaOptions(servers=kafka.servers, bus=BusOptions(enabled=True, topic=bus), topics=topics)
    async with running(third, "three", b"3" * 16) as (_, late):  # one that reads all of it at its start
        assert "behind/kept" in late.local.retained
    letters = await trio.to_thread.run_sync(read_letters, kafka.servers, dlq)
    validator = Draft202012Validator(load_schema("mqtt_dlq.schema.json"))
    decoded = []
    for record in letters:
        validator.validate(json.loads(record.value))
        decoded.append(decode_letter(record.value))
    reasons = {letter.reason for letter in decoded}
    assert reasons == {Reason.MALFORMED, Reason.UNKNOWN_VERSION}
    places = {
        (letter.source.topic, letter.source.offset) for letter in decoded if isinstance(letter.source, KafkaSource)
    }
    assert len({letter.id for letter in decoded}) == len(places)  # all nodes agree on the ids
    assert sum("unpacks to more than" in letter.error for letter in decoded) >= 1
    assert sum("utf-8" in letter.error for letter in decoded) >= 2
