"""MQTT messages as JSON records, the shipped schema, and the partition of a key."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from kafka.partitioner.default import murmur2 as reference_murmur2

from gateways.kafka.mapping import JsonMapper, TimestampFormat
from gateways.kafka.partitions import murmur2, partition_for
from gateways.kafka.records import Record
from gateways.kafka.schema_files import load_schema
from mqtt_trio.gateway import Message, MessageProperties
from tests.gateways.strategies import PROPERTIES, TEXT, TOPICS

VALIDATOR = Draft202012Validator(load_schema("mqtt_message.schema.json"))
PUBLISHED_AT = 1705314600.5
"""2024-01-15T10:30:00.500Z"""


def make(message: Message, timestamps: TimestampFormat = "iso") -> Record:
    return JsonMapper("mqtt.archive", "broker-1", timestamps).record(message)


def value_of(record: Record) -> dict[str, object]:
    assert record.value is not None
    value: dict[str, object] = json.loads(record.value)
    VALIDATOR.validate(value)
    return value


def test_a_text_message_reads_as_the_format_says() -> None:
    properties = MessageProperties(
        content_type="text/plain", correlation_data=b"abc123", user_properties=(("b", "1"), ("a", "2"), ("b", "3"))
    )
    record = make(
        Message(
            "sensors/temperature", b"23.5", 1, properties=properties, client_id="sensor-001", published_at=PUBLISHED_AT
        )
    )
    assert value_of(record) == {
        "timestamp": "2024-01-15T10:30:00.500Z",
        "topic": "sensors/temperature",
        "payload": "23.5",
        "qos": 1,
        "retained": False,
        "clientId": "sensor-001",
        "brokerId": "broker-1",
        "headers": {
            "contentType": "text/plain",
            "correlationId": "abc123",
            "userProperties": [["b", "1"], ["a", "2"], ["b", "3"]],
        },
    }
    assert record.topic == "mqtt.archive"
    assert record.key == b"sensors/temperature"
    assert record.timestamp_ms == 1705314600500


def test_the_facts_stand_in_record_headers_too() -> None:
    properties = MessageProperties(content_type="x", correlation_data=b"\xff", user_properties=(("k", "ä"), ("k", "2")))
    message = Message("t", b"", 2, retain=True, properties=properties, client_id="c", published_at=1.001)
    assert list(make(message).headers) == [
        ("mqtt.timestamp", b"1001"),
        ("mqtt.topic", b"t"),
        ("mqtt.qos", b"2"),
        ("mqtt.retained", b"true"),
        ("mqtt.clientId", b"c"),
        ("mqtt.brokerId", b"broker-1"),
        ("mqtt.contentType", b"x"),
        ("mqtt.correlationId", b"\xff"),
        ("mqtt.userProperties.k", "ä".encode()),
        ("mqtt.userProperties.k", b"2"),
    ]


def test_bytes_that_are_no_text_are_in_base64() -> None:
    message = Message("t", b"\x00\xff\x80", properties=MessageProperties(correlation_data=b"\xc3("))
    value = value_of(make(message))
    assert value["payload"] == base64.b64encode(b"\x00\xff\x80").decode()
    assert value["payloadEncoding"] == "base64"
    assert value["headers"] == {"correlationId": "wyg=", "correlationIdEncoding": "base64"}


def test_epoch_milliseconds() -> None:
    assert value_of(make(Message("t", published_at=PUBLISHED_AT), "epoch_ms"))["timestamp"] == 1705314600500


@given(topic=TOPICS, payload=st.binary(max_size=50) | TEXT.map(str.encode), properties=PROPERTIES, client=TEXT)
def test_every_record_validates_and_keeps_the_payload(
    topic: str, payload: bytes, properties: MessageProperties, client: str
) -> None:
    message = Message(topic, payload, 1, properties=properties, client_id=client, published_at=PUBLISHED_AT)
    value = value_of(make(message))
    text = value["payload"]
    assert isinstance(text, str)
    assert (base64.b64decode(text) if "payloadEncoding" in value else text.encode()) == payload
    assert value["topic"] == topic


@pytest.mark.parametrize(
    "change",
    [{"qos": 3}, {"timestamp": "2024-01-15T10:30:00Z"}, {"topic": "a/#"}, {"payloadEncoding": "hex"}, {"extra": 1}],
)
def test_the_schema_refuses_what_is_no_record_of_ours(change: dict[str, object]) -> None:
    value = value_of(make(Message("t", b"x", published_at=PUBLISHED_AT)))
    assert not VALIDATOR.is_valid(value | change)


@pytest.mark.parametrize(
    "key,expected",
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_gives_the_numbers_of_kafka_itself(key: bytes, expected: int) -> None:
    assert murmur2(key) == expected & 0xFFFFFFFF


@given(key=st.binary(max_size=70), count=st.integers(1, 100))
def test_the_partition_is_the_one_of_other_clients(key: bytes, count: int) -> None:
    assert murmur2(key) == reference_murmur2(key) & 0xFFFFFFFF
    assert partition_for(key, count) == (reference_murmur2(key) & 0x7FFFFFFF) % count
