"""Records of mqtt.messages that others wrote [K11]: what is taken, and what is said about the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateways.kafka.mapping import json_value
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.stream_records import GUARD_HEADER, MalformedError, OutsideMessage, OwnRecords, is_own, message_of
from mqtt_trio.gateway import Message, MessageProperties

MOMENT = 1_705_314_600.123


def record(value: object, **fields: Any) -> ConsumedRecord:
    raw = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
    return ConsumedRecord("mqtt.messages", 3, 7, None, raw, fields.pop("headers", []), 1500, **fields)


def test_topic_payload_and_timestamp_are_enough() -> None:
    """As the Python producer that people know sends them; what Spring adds does no harm."""
    spring = [("__TypeId__", b"com.example.MqttMessage")]
    value = {"topic": "test/topic", "payload": "test message", "timestamp": "2024-01-15T10:30:00.123Z", "more": [1]}
    message = message_of(record(value, headers=spring))
    assert message == OutsideMessage("test/topic", b"test message", 1, published_at=MOMENT)
    assert isinstance(message, OutsideMessage)


@pytest.mark.parametrize(
    "timestamp,seconds",
    [
        ("2024-01-15T10:30:00.123+00:00", MOMENT),
        ("2024-01-15T11:30:00.123+01:00", MOMENT),
        ("2024-01-15T10:30:00.123", MOMENT),
        (1_705_314_600_123, MOMENT),
        (1_705_314_600_123.0, MOMENT),
        (None, 1.5),
        (0, 0.0),
    ],
)
def test_times_are_iso_or_milliseconds_and_else_the_records(timestamp: object, seconds: float) -> None:
    assert message_of(record({"topic": "t", "payload": "", "timestamp": timestamp})).published_at == seconds


def test_everything_that_this_broker_writes_is_understood() -> None:
    properties = MessageProperties(
        content_type="text/plain", correlation_data=b"\xff\0", user_properties=(("a", "1"), ("a", "2"))
    )
    message = Message("a/b", b"\xff\xfe", 2, True, properties, "sensor", MOMENT)
    assert message_of(record(json_value(message, "node", round(MOMENT * 1000)))) == OutsideMessage(
        "a/b", b"\xff\xfe", 2, True, properties, "sensor", MOMENT
    )


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=30))
def test_own_records_that_others_follow_are_left_out(seeds: list[tuple[int, bool]]) -> None:
    """What is left of each partition has all that others wrote, in order, and its last record whoever wrote that."""
    mark = [(GUARD_HEADER, b"n")]
    all_of = [
        ConsumedRecord("m", partition, offset, None, b"", mark if own else [], 0)
        for offset, (partition, own) in enumerate(sorted(seeds))
    ]
    own_records = OwnRecords()
    kept = own_records.thin(all_of)
    assert own_records.left_out == len(all_of) - len(kept)
    lasts = {record.partition: record for record in all_of}.values()
    assert kept == [record for record in all_of if not is_own(record) or record in lasts]


@given(st.text().filter(lambda text: "\ud800" not in text), st.binary(), st.integers(0, 2), st.booleans())
def test_any_payload_comes_as_it_was(text: str, payload: bytes, qos: int, retain: bool) -> None:
    message = Message("t", payload, qos, retain, client_id="c", published_at=1.0)
    back = message_of(record(json_value(message, "n", 1000)))
    assert (back.payload, back.qos, back.retain) == (payload, qos, retain)


@pytest.mark.parametrize(
    "value,error",
    [
        (None, "no value"),
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"{" * 5000, "no JSON"),
        ([1], "the value is a list instead of an object"),
        ({"payload": "x"}, "topic is missing"),
        ({"topic": 5, "payload": "x"}, "topic: expected text, got 5"),
        ({"topic": "", "payload": "x"}, "topic: a Topic Name has at least one character"),
        ({"topic": "a/+", "payload": "x"}, "topic: a Topic Name contains a wildcard"),
        ({"topic": "a\0", "payload": "x"}, r"topic: a Topic Name contains U\+0000"),
        ({"topic": "a" * 70_000, "payload": "x"}, "topic: a Topic Name has more than 65,535 bytes"),
        ({"topic": "t"}, "payload is missing"),
        ({"topic": "t", "payload": {"temperature": 1}}, "payload: expected text, got an object"),
        ({"topic": "t", "payload": "x", "payloadEncoding": "hex"}, "payloadEncoding: expected base64, got 'hex'"),
        ({"topic": "t", "payload": "x!", "payloadEncoding": "base64"}, "payload is no base64"),
        ({"topic": "t", "payload": "ä", "payloadEncoding": "base64"}, "payload is no base64"),
        ({"topic": "t", "payload": "x", "qos": 3}, "qos: expected 0, 1 or 2, got 3"),
        ({"topic": "t", "payload": "x", "qos": True}, "qos: expected 0, 1 or 2"),
        ({"topic": "t", "payload": "x", "retained": 1}, "retained: expected true or false, got 1"),
        ({"topic": "t", "payload": "x", "timestamp": "yesterday"}, "timestamp: expected ISO 8601, got 'yesterday'"),
        ({"topic": "t", "payload": "x", "timestamp": -1}, "timestamp: -1 lies outside"),
        ({"topic": "t", "payload": "x", "timestamp": 1e300}, "timestamp: 1e[+]300 lies outside"),
        ({"topic": "t", "payload": "x", "timestamp": "0001-01-01T00:00:00+23:59"}, "timestamp"),
        ({"topic": "t", "payload": "x", "timestamp": False}, "timestamp: expected ISO 8601 or milliseconds"),
        ({"topic": "t", "payload": "x", "clientId": ["c"]}, "clientId: expected text, got a list"),
        ({"topic": "t", "payload": "x", "clientId": "c" * 70_000}, "clientId: .* more than 65,535 bytes"),
        ({"topic": "t", "payload": "x", "headers": "h"}, "headers: expected an object, got 'h'"),
        ({"topic": "t", "payload": "x", "headers": {"contentType": 1}}, "headers.contentType: expected text"),
        ({"topic": "t", "payload": "x", "headers": {"userProperties": [["a"]]}}, "headers.userProperties: expected"),
        ({"topic": "t", "payload": "x", "headers": {"userProperties": [["a", None]]}}, "headers.userProperties"),
        ({"topic": "t", "payload": "x", "headers": {"correlationId": "x" * 70_000}}, "headers.correlationId has more"),
    ],
)
def test_what_is_no_message_is_told_exactly(value: object, error: str) -> None:
    with pytest.raises(MalformedError, match=error):
        message_of(record(value))


def test_a_record_that_could_not_even_be_read_is_malformed() -> None:
    with pytest.raises(MalformedError, match="the checksum is wrong"):
        message_of(record(b"{}", defect="the checksum is wrong"))


@given(st.binary() | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.dictionaries(st.sampled_from(
        ["topic", "payload", "qos", "retained", "timestamp", "headers", "clientId", "userProperties", "contentType"]
    ), inner) | st.lists(inner, max_size=3), max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_a_message_or_malformed(raw: bytes) -> None:
    try:
        message = message_of(record(raw))
    except MalformedError:
        return
    assert message.topic_name
    assert message.qos in (0, 1, 2)
    assert 0 <= message.published_at < 253_402_300_800


def test_records_of_this_deployment_are_known_by_a_header() -> None:
    assert is_own(record({}, headers=[("mqtt.timestamp", b"1"), (GUARD_HEADER, b"node-1")]))
    assert not is_own(record({}, headers=[("mqtt.brokerId", b"node-1"), ("__TypeId__", b"x")]))
    assert not is_own(record({}))
