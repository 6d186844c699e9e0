"""Programs that know kafka-python alone, and Kafka's own tools, on what a broker of ours writes [K14]."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any, Final

import pytest
import trio
from kafka import KafkaConsumer, KafkaProducer

from gateways.kafka import ArchiveConsumer, KafkaOptions
from gateways.kafka.groups import MESSAGES_GROUP
from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.cluster import committed_offsets
from tests.interop.kafka_tools import rows, run_tool
from tests.interop.paho_support import PahoClient
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import LIMIT, wait_until

pytestmark = [
    pytest.mark.interop,
    pytest.mark.kafka,
    # People hand a lambda over; kafka-python takes it, and would like a class.
    pytest.mark.filterwarnings("ignore:value_(de)?serializer does not implement:DeprecationWarning"),
]
COUNT: Final = 30
JOIN_LIMIT: Final = 60.0
"""Seconds: groups take their time."""
PARTITIONS: Final = 12
"""Of an archive topic."""


@pytest.fixture
def archive() -> str:
    """The name of the test's archive topic."""
    return unique_name("outside")


@pytest.fixture
def node(kafka: KafkaNode, brokers: Brokers, archive: str) -> BrokerProcess:
    """A broker that archives everything there."""
    config = f"""
[Kafka]
Servers = "{kafka.servers}"
[[ArchiveGroups]]
Name = "Default"
Filter = "#"
Store = "KAFKA"
Ack = "store"
KafkaTopic = "{archive}"
"""
    return brokers.start(config, node_id="outside")


def publish(node: BrokerProcess, *, start: int = 0) -> None:
    """Publish COUNT numbered messages; they are in Kafka when this returns."""
    with PahoClient(node, client_id="device") as device:
        for number in range(start, start + COUNT):
            device.publish(f"room-{number % 10}/temperature", str(number).encode(), qos=1)


def first(messages: Iterator[Any], count: int) -> list[Any]:
    """Return so many of an endless iterator."""
    return [next(messages) for _ in range(count)]


def test_a_plain_consumer_iterates_over_decoded_values(kafka: KafkaNode, node: BrokerProcess, archive: str) -> None:
    """A deserializer, a group, the defaults for all else, and a loop over the consumer."""
    group = unique_name("python-consumer")
    consumer = KafkaConsumer(
        bootstrap_servers=[kafka.servers],
        value_deserializer=lambda raw: json.loads(raw.decode("utf-8")),
        group_id=group,
    )
    values: list[dict[str, Any]] = []
    try:
        # A member that joins before it has heard of the topic may stay without a share.
        wait_until(lambda: consumer.partitions_for_topic(archive), "the topic", limit=30)
        consumer.subscribe([archive])
        wait_until(lambda: (consumer.poll(50), len(consumer.assignment()) == PARTITIONS)[1], "partitions")
        for partition in consumer.assignment():  # it begins at the end, which is known now
            consumer.position(partition, timeout_ms=10_000)
        publisher = threading.Thread(target=publish, args=(node,))
        publisher.start()
        for message in consumer:
            values.append(message.value)
            if len(values) == COUNT:
                break
        publisher.join()
    finally:
        consumer.close()
    assert {(value["topic"], value["payload"]) for value in values} == {
        (f"room-{number % 10}/temperature", str(number)) for number in range(COUNT)
    }
    assert sum(committed_offsets(kafka, group).values()) == COUNT
    described = rows(run_tool("consumer-groups", kafka.servers, "--group", group, "--describe"))
    assert {row["TOPIC"] for row in described} == {archive}
    assert {row["LAG"] for row in described} == {"0"}


def test_a_plain_producer_writes_what_our_consumer_reads(kafka: KafkaNode, node: BrokerProcess, archive: str) -> None:
    """`topic`, `payload` and `timestamp` in a dict, a serializer, no key: as much as a program has to know."""
    producer = KafkaProducer(
        bootstrap_servers=[kafka.servers], value_serializer=lambda value: json.dumps(value).encode("utf-8")
    )
    for number in range(COUNT):
        producer.send(
            archive, {"topic": "test/topic", "payload": f"message {number}", "timestamp": "2024-01-15T10:00:00Z"}
        )
    producer.send(archive, ["not", "a", "message"])
    producer.flush(LIMIT)
    producer.close()
    publish(node)
    found: list[tuple[str, bytes]] = []

    async def read() -> int:
        options = KafkaOptions(servers=kafka.servers)
        with trio.fail_after(4 * LIMIT):  # a member waits for its group to settle
            async with ArchiveConsumer(options=options, group=unique_name("g"), topics=archive) as consumer:
                async for message in consumer:
                    found.append((message.topic_name, message.payload))
                    if message.topic_name == "test/topic":
                        assert message.published_at == 1_705_312_800.0
                        assert (message.client_id, message.broker_id, message.qos) == ("", "", 0)
                    if len(found) == 2 * COUNT and consumer.malformed == 1:
                        return consumer.malformed
        raise AssertionError("the loop ended")

    assert trio.run(read) == 1
    assert sorted(found) == sorted(
        [("test/topic", b"message %d" % number) for number in range(COUNT)]
        + [(f"room-{number % 10}/temperature", b"%d" % number) for number in range(COUNT)]
    )


def test_the_tools_of_kafka_describe_reset_and_read(kafka: KafkaNode, node: BrokerProcess, archive: str) -> None:
    group = unique_name("readers")
    publish(node)

    async def read(count: int) -> list[bytes]:
        options = KafkaOptions(servers=kafka.servers)
        found: list[bytes] = []
        with trio.fail_after(4 * LIMIT):  # a member waits for its group to settle
            async with ArchiveConsumer(options=options, group=group, topics=archive) as consumer:
                async for message in consumer:
                    found.append(message.payload)
                    if len(found) == count:
                        described = await trio.to_thread.run_sync(describe)
                        assert {row["CLIENT-ID"] for row in described} == {f"mqtt-trio-{group}"}
                        break
        return found

    def describe() -> list[dict[str, str]]:
        return rows(run_tool("consumer-groups", kafka.servers, "--group", group, "--describe"))

    def lag() -> int:
        return sum(int(row["LAG"]) for row in describe() if row["LAG"] != "-")

    before = trio.run(read, COUNT)
    assert len(set(before)) == COUNT
    assert lag() == 0
    publish(node, start=COUNT)
    assert lag() == COUNT
    reset = ["--group", group, "--topic", archive, "--reset-offsets", "--to-earliest"]
    assert "0" in run_tool("consumer-groups", kafka.servers, *reset, "--dry-run")
    assert lag() == COUNT
    run_tool("consumer-groups", kafka.servers, *reset, "--execute")
    assert lag() == 2 * COUNT
    assert set(trio.run(read, 2 * COUNT)) == {str(number).encode() for number in range(2 * COUNT)}

    shown = run_tool(
        "console-consumer", kafka.servers, "--topic", archive, "--from-beginning", "--max-messages", str(COUNT),
        "--timeout-ms", "60000", "--property", "print.key=true", "--property", "print.headers=true",
    )  # fmt: skip
    lines = shown.splitlines()
    assert len(lines) == COUNT
    assert all(re.match(r"mqtt\.timestamp:\d+,mqtt\.topic:room-\d/temperature,mqtt\.qos:1,", line) for line in lines)
    assert {json.loads(line.split("\t")[2])["brokerId"] for line in lines} == {"outside"}
    topic = run_tool("topics", kafka.servers, "--describe", "--topic", archive)
    assert f"PartitionCount: {PARTITIONS}" in topic
    assert run_tool("topics", kafka.servers, "--describe", "--under-replicated-partitions").strip() == ""


def test_the_tools_of_kafka_on_the_group_that_publishes(kafka: KafkaNode, brokers: Brokers) -> None:
    """`monstermq-cluster` on a stream of messages: described, its lag, and set back: all of it is published again."""
    stream = unique_name("messages")
    topic = f"tools/{stream}"
    config = f"""
[Kafka]
Servers = "{kafka.servers}"
[Kafka.Topics.Messages]
Enabled = true
Name = "{stream}"
Filter = []
"""

    def put(*numbers: int) -> None:
        producer = KafkaProducer(
            bootstrap_servers=[kafka.servers], value_serializer=lambda value: json.dumps(value).encode("utf-8")
        )
        for number in numbers:
            value = {"topic": topic, "payload": str(number), "timestamp": "2024-01-15T10:00:00Z"}
            producer.send(stream, value, key=b"%d" % (number % 5))
        producer.flush(LIMIT)
        producer.close()

    def lag() -> int:
        described = rows(run_tool("consumer-groups", kafka.servers, "--group", MESSAGES_GROUP, "--describe"))
        ours = [row for row in described if row["TOPIC"] == stream]
        return sum(int(row["LAG" if row["LAG"] != "-" else "LOG-END-OFFSET"]) for row in ours)  # "-": nothing stored

    node = brokers.start(config)
    with PahoClient(node) as subscriber:
        subscriber.subscribe(topic)
        put(*range(10))
        assert sorted(int(heard.payload) for heard in subscriber.received(10, JOIN_LIMIT)) == list(range(10))
        wait_until(lambda: lag() == 0, "all is stored in the group", JOIN_LIMIT)
        reset = ["--group", MESSAGES_GROUP, "--topic", stream, "--reset-offsets", "--to-earliest"]
        refused = run_tool("consumer-groups", kafka.servers, *reset, "--execute", code=None)
        assert lag() == 0, refused  # not while the group has members
    node.stop()
    put(*range(10, 15))
    assert lag() == 5
    run_tool("consumer-groups", kafka.servers, *reset, "--execute")
    assert lag() == 15
    node = brokers.start(config, name="again")
    with PahoClient(node) as subscriber:
        subscriber.subscribe(topic)
        wait_until(lambda: lag() == 0, "all is published again", JOIN_LIMIT)
