"""Nodes on a real Kafka: their configuration, and what a plain kafka-python client finds in the topics."""

from __future__ import annotations

import time
from typing import Any, Final

import attrs
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from gateways.kafka.bus_choices import Chosen
from gateways.kafka.bus_records import Flag, Kind, decode_header, decode_items
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import read_run
from tests.interop.broker_process import BrokerProcess
from tests.kafka_support import KafkaNode, unique_name

READ_LIMIT: Final = 30.0
WARNED: Final = r"^\S+Z (WARNING|ERROR|CRITICAL) "
"""A log line that an operator has to read."""


@attrs.frozen
class Cluster:
    """The topics that join some nodes; each test has its own."""

    kafka: KafkaNode
    bus_topic: str = attrs.field(factory=lambda: unique_name("bus"))
    retained_topic: str = attrs.field(factory=lambda: unique_name("retained"))

    def config(self, more: str = "", *, bus: str = "") -> str:
        """Return the configuration of a node; `more`: further sections, `bus`: further keys of [Kafka.Bus]."""
        return f"""
[Kafka]
Servers = "{self.kafka.servers}"
[Kafka.Bus]
Enabled = true
Topic = "{self.bus_topic}"
{bus}
[Kafka.Topics.Retained]
Name = "{self.retained_topic}"
{more}
"""

    def bus_messages(self, topic_name: str) -> list[Message]:
        """Return what lies on the bus for one MQTT topic, in the order of its partition."""
        return [message for message in read_bus(self.kafka, self.bus_topic) if message.topic_name == topic_name]


def read_topic(kafka: KafkaNode, topic: str) -> list[Any]:
    """Return the records (kafka-python's) of all partitions from their beginning to their present end."""
    consumer = KafkaConsumer(bootstrap_servers=kafka.servers, group_id=None, enable_auto_commit=False)
    try:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        assert partitions, f"Kafka has no topic {topic}"
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        ends = consumer.end_offsets(partitions)
        records: list[Any] = []
        limit = time.monotonic() + READ_LIMIT
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            assert time.monotonic() < limit, f"the end of {topic} was not reached in {READ_LIMIT} s"
            for batch in consumer.poll(timeout_ms=200).values():
                records += batch
        return records
    finally:
        consumer.close()


def read_bus(kafka: KafkaNode, topic: str) -> list[Message]:
    """Decode all messages of a bus topic."""
    found: list[Message] = []
    for record in read_topic(kafka, topic):
        header = decode_header(record.value)
        if header.kind is Kind.BATCH:
            assert header.flags is Flag.NONE, "a body in parts is more than this reader understands"
            for item in decode_items(record.value, header.body_start):
                for each in item.items if isinstance(item, Chosen) else [item]:
                    found += [each] if isinstance(each, Message) else read_run(each)
    return found


def committed_offsets(kafka: KafkaNode, group: str) -> dict[tuple[str, int], int]:
    """Return what a group has stored, by topic and partition."""
    admin = KafkaAdminClient(bootstrap_servers=kafka.servers)
    try:
        found = admin.list_group_offsets(group)[group]
        return {(partition.topic, partition.partition): stored.offset for partition, stored in found.items()}
    finally:
        admin.close()


def warnings_of(broker: BrokerProcess) -> list[str]:
    """Return the log lines of `broker` from level WARNING on, but for kafka-python's about other programs that had the
    cores for a tenth of a second."""
    return [line for found in broker.output.matches(WARNED) if "kafka.net.selector: Task" not in (line := found.string)]
