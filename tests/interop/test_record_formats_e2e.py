"""Archive groups in Avro, raw and JSON, from MQTT clients to Kafka and back; Java reads and writes Avro too [K8]."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from jsonschema import Draft202012Validator
from kafka.partitioner.default import murmur2

from gateways.kafka import ArchiveConsumer
from gateways.kafka.avro import schema_text
from gateways.kafka.options import KafkaOptions, SchemaRegistryOptions
from gateways.kafka.reading import Archived, Find, reader_of
from gateways.kafka.schema_files import load_schema
from gateways.kafka.schema_registry import SchemaRegistry
from gateways.kafka.workers import consumed
from lib.kafka_install import install, java
from lib.kafka_node import make_archive
from lib.registry_install import install_avro
from tests.gateways.fake_registry import FakeRegistry, serve_registry
from tests.interop.broker_process import Brokers
from tests.interop.cluster import read_topic
from tests.interop.paho_support import V311, Heard, PahoClient
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import wait_until
from tests.registry_support import RegistryServer

pytestmark = [pytest.mark.interop, pytest.mark.kafka, pytest.mark.timeout(240)]

JAVA_SOURCE: Final = Path(__file__).parent / "java" / "AvroRecords.java"
JAVA_LIMIT: Final = 120.0
PARTITIONS: Final = 12
PAYLOADS: Final = (b"21.5", "21,5 °C 😀".encode(), b"", bytes(range(256)), b"\xed\xa0\x80", os.urandom(900_000))


def group(topic: str, form: str, more: str = "") -> str:
    return f"""
[[ArchiveGroups]]
Name = "{topic}"
Filter = "s/#"
Store = "KAFKA"
KafkaTopic = "{topic}"
Format = "{form}"
{more}
"""


def config(kafka: KafkaNode, registry: str, *groups: str) -> str:
    return f"""
[Kafka]
Servers = "{kafka.servers}"
[Kafka.SchemaRegistry]
Url = "{registry}"
{"".join(groups)}
"""


def find_in(url: str) -> Find:
    return SchemaRegistry(KafkaOptions(schema_registry=SchemaRegistryOptions(url=url, timeout=60))).schema


def read_back(kafka: KafkaNode, topic: str, form: str, find: Find | None = None) -> list[Archived]:
    """Return what the records of a topic say, by MQTT topic and QoS, after a look at key and partition."""
    reader, found = reader_of(form, find), []
    for record in read_topic(kafka, topic):
        archived = reader.read(consumed(record))
        assert record.key.decode() == archived.message.topic_name
        assert record.partition == (murmur2(record.key) & 0x7FFF_FFFF) % PARTITIONS
        assert record.timestamp == round(archived.message.published_at * 1000)
        found.append(archived)
    return sorted(found, key=lambda one: (one.message.topic_name, one.message.qos))


def run_java(*arguments: str, lines: str = "") -> list[dict[str, Any]]:
    """Run the program of the folder beside us; return the objects that it printed."""
    jars = os.pathsep.join(f"{folder}/*" for folder in (install_avro(), install(make_archive).folder / "libs"))
    command = [java(), "-XX:TieredStopAtLevel=1", "-Dlog4j2.level=OFF", "-cp", jars, str(JAVA_SOURCE), *arguments]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=JAVA_LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


async def consume(kafka: KafkaNode, registry: RegistryServer, topic: str, count: int) -> list[tuple[str, bytes, int]]:
    """Read so many messages as user code does."""
    options = KafkaOptions(servers=kafka.servers, schema_registry=SchemaRegistryOptions(url=registry.url, timeout=60))
    found: list[tuple[str, bytes, int]] = []
    consumer = ArchiveConsumer(options=options, group=unique_name("avro"), topics=topic, format="AVRO")
    with trio.fail_after(100):
        async with consumer:
            async for message in consumer:
                found.append((message.topic_name, message.payload, message.qos))
                if len(found) == count:
                    return found
    return found


def test_every_format_holds_what_was_published_and_java_agrees(
    kafka: KafkaNode, schema_registry: RegistryServer, brokers: Brokers
) -> None:
    avro, raw, text = unique_name("avro"), unique_name("raw"), unique_name("json")
    json_group = group(text, "JSON", 'TimestampFormat = "epoch_ms"')
    node = brokers.start(
        config(kafka, schema_registry.url, group(avro, "AVRO"), group(raw, "RAW"), json_group), node_id="n1"
    )
    rich = Heard("s/rich", b"rich", 1, True, (("unit", "°C"), ("unit", "K"), ("", "")), "text/plain", None, b"\xff\0")
    with PahoClient(node, client_id="device") as device, PahoClient(node, client_id="older", version=V311) as older:
        for number, payload in enumerate(PAYLOADS):
            for qos in (0, 1, 2):
                (device if qos else older).publish(f"s/{number}", payload, qos=qos)
        device.publish_message(rich)
    node.stop()

    find = find_in(schema_registry.url)
    found = read_back(kafka, avro, "AVRO", find)
    assert read_back(kafka, raw, "RAW") == found
    assert read_back(kafka, text, "JSON") == found
    assert [one.broker_id for one in found] == ["n1"] * (3 * len(PAYLOADS) + 1)
    assert [(m.topic_name, m.payload, m.qos, m.client_id) for m in (one.message for one in found[:-1])] == [
        (f"s/{number}", payload, qos, "device" if qos else "older")
        for number, payload in enumerate(PAYLOADS)
        for qos in (0, 1, 2)
    ]
    last = found[-1].message
    assert (last.payload, last.retain, last.properties.content_type) == (b"rich", True, "text/plain")
    assert last.properties.user_properties == rich.user_properties
    assert last.properties.correlation_data == b"\xff\0"
    validator = Draft202012Validator(load_schema("mqtt_message.schema.json"))
    for record in read_topic(kafka, text):
        value = json.loads(record.value)
        validator.validate(value)
        assert value["timestamp"] == record.timestamp
    assert sorted(r.value for r in read_topic(kafka, raw)) == sorted([*PAYLOADS * 3, b"rich"])

    seen = run_java("read", kafka.servers, schema_registry.url, avro, str(len(found)))
    assert {one["schema"] for one in seen} == {"at.rocworks.kafka.MqttMessage"}
    assert sorted(seen, key=lambda one: (one["topic"], one["qos"])) == [
        {
            "schema": "at.rocworks.kafka.MqttMessage",
            "key": m.topic_name,
            "timestamp": round(m.published_at * 1000),
            "topic": m.topic_name,
            "payload": base64.b64encode(m.payload).decode(),
            "qos": m.qos,
            "retained": m.retain,
            "clientId": m.client_id,
        }
        for m in (one.message for one in found)
    ]

    heard = trio.run(partial(consume, kafka, schema_registry, avro, len(found)))
    assert sorted(heard) == sorted((m.topic_name, m.payload, m.qos) for m in (one.message for one in found))

    # The reverse: Java writes the same into the topic, by the schema that the registry has of us.
    lines = "\n".join(json.dumps(one) for one in seen)
    assert run_java("write", kafka.servers, schema_registry.url, avro, lines=lines) == []
    both = sorted(
        (reader_of("AVRO", find).read(consumed(record)).message for record in read_topic(kafka, avro)),
        key=lambda m: (m.topic_name, m.qos),
    )
    assert [(m.topic_name, m.payload, m.qos, m.retain, m.client_id, m.published_at) for m in both] == [
        (m.topic_name, m.payload, m.qos, m.retain, m.client_id, m.published_at)
        for m in (one.message for one in found)
        for _ in range(2)
    ]


def test_what_comes_while_the_registry_is_away_becomes_records_later(kafka: KafkaNode, brokers: Brokers) -> None:
    avro, raw = unique_name("avro"), unique_name("raw")
    with serve_registry() as registry:
        registry.status, registry.answer = 503, b'{"message": "starting"}'
        groups = [group(avro, "AVRO", 'Ack = "store"'), group(raw, "RAW", 'Ack = "store"')]
        node = brokers.start(config(kafka, registry.url, *groups), name="one")
        for begin in (0, 25):
            node.output.wait_for(r"schema registry \S+ answers 503")
            with PahoClient(node) as device:  # acknowledged, because the spool has it
                for number in range(begin, begin + 25):
                    device.publish(f"s/{number % 7}", b"%d" % number, qos=1 + number % 2)
            if begin:
                node.kill()
            else:
                node.stop()
            node = brokers.start(config(kafka, registry.url, *groups), name="one")  # the spool outlives the process
        node.output.wait_for(r"schema registry \S+ answers 503")
        assert len(read_back(kafka, raw, "RAW")) == 50, "other groups do not wait for the registry"
        assert read_topic(kafka, avro) == []
        registry.status, registry.answer = 200, b""
        wait_until(lambda: len(read_topic(kafka, avro)) >= 50, "the spool in Kafka", limit=60)
        check_schema(registry, avro)
        with PahoClient(node) as device:
            registry.status = 503  # from now on it is not needed
            device.publish("s/later", b"later", qos=1)
        node.stop()
        registry.status = 200
        reader = reader_of("AVRO", find_in(registry.url))
        found = [reader.read(consumed(record)).message for record in read_topic(kafka, avro)]
    assert {m.payload for m in found} == {b"later", *(b"%d" % number for number in range(50))}
    for topic in {m.topic_name for m in found} - {"s/later"}:
        numbers = [int(m.payload) for m in found if m.topic_name == topic]
        assert list(dict.fromkeys(numbers)) == sorted(set(numbers)), "in the order of their topic"


def check_schema(registry: FakeRegistry, topic: str) -> None:
    assert registry.subjects == {f"{topic}-value": {schema_text(): 1}}
