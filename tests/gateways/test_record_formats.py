"""The three formats of an archive record, there and back [K8]: mappers, readers, and what readers refuse."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateways.kafka.avro import (
    AvroError,
    AvroMapper,
    decode_datum,
    parse_writer,
    schema_text,
    split_id,
)
from gateways.kafka.mapping import JsonMapper, RawMapper, RecordMapper
from gateways.kafka.partitions import partition_for
from gateways.kafka.reading import Reader, UnreadableError, read_json, read_timestamp, reader_of
from gateways.kafka.records import ConsumedRecord, Headers, Record
from gateways.kafka.schema_files import load_schema
from mqtt_trio.gateway import Message
from tests.gateways.strategies import PROPERTIES, TEXT, TOPICS

AVRO = load_schema("mqtt_message.avsc")
MESSAGES = st.builds(
    Message,
    TOPICS,
    st.binary(max_size=60) | TEXT.map(str.encode),
    st.integers(0, 2),
    st.booleans(),
    PROPERTIES,
    TEXT,
    st.integers(0, 4_000_000_000_000).map(lambda milliseconds: milliseconds / 1000),
)
SCHEMA_ID = 77


def known_schema(schema_id: int) -> str:
    """Be a registry with one schema."""
    assert schema_id == SCHEMA_ID
    return schema_text()


def registered_mapper() -> AvroMapper:
    mapper = AvroMapper("mqtt.archive", "broker-1", registered=True)
    assert not mapper.is_ready
    mapper.use_id(SCHEMA_ID)
    return mapper


FORMATS: list[tuple[RecordMapper, Reader]] = [
    (JsonMapper("mqtt.archive", "broker-1"), reader_of("JSON")),
    (JsonMapper("mqtt.archive", "broker-1", "epoch_ms"), reader_of("JSON")),
    (AvroMapper("mqtt.archive", "broker-1"), reader_of("AVRO")),
    (registered_mapper(), reader_of("AVRO", known_schema)),
    (RawMapper("mqtt.archive", "broker-1"), reader_of("RAW")),
]
NAMES = ["json", "json-epoch", "avro", "avro-registered", "raw"]
each_format = pytest.mark.parametrize("mapper,reader", FORMATS, ids=NAMES)


def consumed(record: Record) -> ConsumedRecord:
    """Return a record as a consumer gets it."""
    assert record.timestamp_ms is not None
    return ConsumedRecord(record.topic, 0, 0, record.key, record.value, list(record.headers), record.timestamp_ms)


def bare(
    value: bytes | None, headers: Headers = (), key: bytes | None = b"a/b", timestamp_ms: int = 5
) -> ConsumedRecord:
    """Return a record of somebody else."""
    return ConsumedRecord("mqtt.archive", 0, 0, key, value, headers, timestamp_ms)


@each_format
@given(message=MESSAGES)
def test_a_message_comes_back_as_it_was(mapper: RecordMapper, reader: Reader, message: Message) -> None:
    record = mapper.record(message)
    found = reader.read(consumed(record))
    assert found.message == message
    assert found.broker_id == "broker-1"
    assert record.key == message.topic_name.encode()
    assert record.timestamp_ms == round(message.published_at * 1000)
    assert record.size >= record.measure(), "the size must be an upper bound"


@each_format
@pytest.mark.parametrize("payload", [b"", bytes(range(256)) * 4096, b"x" * (1 << 20), "ü".encode() * (1 << 19)])
def test_payloads_of_any_size_come_back(mapper: RecordMapper, reader: Reader, payload: bytes) -> None:
    message = Message("a/b", payload, 2, retain=True, client_id="c", published_at=1.5)
    record = mapper.record(message)
    assert record.value is not None, "no value would be a deletion in a compacted topic"
    assert reader.read(consumed(record)).message == message


@given(message=MESSAGES, count=st.integers(1, 50))
def test_key_headers_and_partition_are_the_same_in_every_format(message: Message, count: int) -> None:
    records = [mapper.record(message) for mapper, _ in FORMATS]
    assert len({record.key for record in records}) == 1
    assert len({partition_for(record.key or b"", count) for record in records}) == 1
    assert all(record.headers == records[0].headers for record in records)


def test_raw_is_the_payload_alone() -> None:
    assert RawMapper("t").record(Message("a", b"\x00\xff")).value == b"\x00\xff"


def test_avro_is_the_schema_that_people_know() -> None:
    fields = {field["name"]: field["type"] for field in AVRO["fields"]}
    assert (AVRO["namespace"], AVRO["name"]) == ("at.rocworks.kafka", "MqttMessage")
    assert fields == {
        "timestamp": "long",
        "topic": "string",
        "payload": "bytes",
        "qos": "int",
        "retained": "boolean",
        "clientId": ["null", "string"],
    }
    value = AvroMapper("t").record(Message("a/b", b"\xff", 1, client_id="", published_at=1.5)).value
    # By the Avro specification: zigzag varints, length-prefixed bytes, index of the union's branch.
    assert value == b"\xb8\x17" + b"\x06a/b" + b"\x02\xff" + b"\x02" + b"\x00" + b"\x00"


def test_a_registered_value_names_its_schema() -> None:
    value = registered_mapper().record(Message("a", b"x", published_at=1.0)).value
    assert value is not None
    assert value[:5] == b"\x00\x00\x00\x00\x4d"
    assert split_id(value) == (SCHEMA_ID, AvroMapper("t").record(Message("a", b"x", published_at=1.0)).value)


def test_no_record_is_made_before_the_id_is_known() -> None:
    with pytest.raises(AvroError, match="has not said yet"):
        AvroMapper("t", registered=True).record(Message("a"))


def test_plain_values_are_read_beside_registered_ones() -> None:
    message = Message("a", b"x", published_at=1.0)
    plain = consumed(AvroMapper("t").record(message))
    assert reader_of("AVRO", known_schema).read(plain).message == message


def test_a_value_with_an_id_needs_a_registry() -> None:
    record = consumed(registered_mapper().record(Message("a", b"x", published_at=1.0)))
    with pytest.raises(UnreadableError, match="SchemaRegistry"):
        reader_of("AVRO").read(record)


def writer_with(*fields: dict[str, object]) -> str:
    """Return our schema with further fields in front."""
    return json.dumps(AVRO | {"fields": [*fields, *AVRO["fields"]]})


def test_what_a_later_schema_wrote_is_read_as_ours() -> None:
    text = writer_with(
        {"name": "brokerId", "type": "string"}, {"name": "labels", "type": {"type": "map", "values": "string"}}
    )
    datum = {
        "brokerId": "b", "labels": {"x": "y"}, "timestamp": 1, "topic": "a", "payload": b"p", "qos": 1,
        "retained": True, "clientId": None,
    }  # fmt: skip
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(json.loads(text)), datum)
    record = bare(b"\x00\x00\x00\x00\x09" + stream.getvalue())
    found = reader_of("AVRO", lambda schema_id: {9: text}[schema_id]).read(record).message
    assert found == Message("a", b"p", 1, retain=True, published_at=0.001)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        '"string"',
        '{"type": "record", "name": "R", "fields": [{"name": "next", "type": ["null", "R"]}]}',
        writer_with({"name": "many", "type": {"type": "array", "items": "null"}}),
        '{"type": "record", "name": "R"}',
        "[" * 100_000,
    ],
)
def test_schemas_that_could_hurt_are_refused(text: str) -> None:
    with pytest.raises(AvroError):
        parse_writer(text)


def test_a_schema_that_is_none_of_ours_is_an_unreadable_record() -> None:
    text = '{"type": "record", "name": "Other", "fields": [{"name": "x", "type": "int"}]}'
    with pytest.raises(UnreadableError):
        reader_of("AVRO", lambda schema_id: text).read(bare(b"\x00\x00\x00\x00\x09\x02"))


@pytest.mark.parametrize(
    "schema_id,value",
    [
        (None, b""),
        (None, b"\x02"),
        (None, b"\x02\xfe\xff\xff\xff\xff\xff\xff\xff\x01a"),
        (None, b"\x02\x01a"),
        (None, AvroMapper("t").record(Message("a", published_at=1.0)).value or b""),
    ],
)
def test_damaged_datums_are_refused(schema_id: int | None, value: bytes) -> None:
    with pytest.raises(AvroError):
        decode_datum(value + b"\x00" if len(value) > 12 or value.endswith(b"\x00") else value)


@each_format
@given(value=st.binary(max_size=60), headers=st.lists(st.tuples(TEXT, st.binary(max_size=10)), max_size=3))
def test_anything_is_a_message_or_unreadable(
    mapper: RecordMapper, reader: Reader, value: bytes, headers: Sequence[tuple[str, bytes]]
) -> None:
    record = bare(value, [("mqtt." + name, content) for name, content in headers])
    if value[:1] == b"\x00" and mapper is FORMATS[3][0]:
        value = value[:5].ljust(5, b"\x00") + value[5:]
        record.value = b"\x00\x00\x00\x00\x4d" + value[5:]
    topics: list[str] = []
    with contextlib.suppress(UnreadableError):
        topics.append(reader.read(record).message.topic_name)
    assert all(topics), "a message without a topic"


# --- what other programs write


def test_topic_and_payload_are_enough() -> None:
    found = read_json(b'{"topic": "a/b", "payload": "23.5", "timestamp": "2024-01-15T10:30:00Z", "more": [1]}', 0)
    assert found.message == Message("a/b", b"23.5", published_at=1705314600.0)
    assert read_json(b'{"topic": "a", "payload": ""}', 1500).message == Message("a", b"", published_at=1.5)


def test_a_raw_record_of_somebody_else_is_read_by_its_key() -> None:
    found = reader_of("RAW").read(bare(b"\xff", key=b"a/b", timestamp_ms=2000))
    assert (found.message, found.broker_id) == (Message("a/b", b"\xff", published_at=2.0), "")


@pytest.mark.parametrize(
    "text,problem",
    [
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 5000, "not JSON"),
        ('{"payload": "x"}', "topic: expected a string, got nothing"),
        ('{"topic": "", "payload": "x"}', "topic:"),
        ('{"topic": "a/#", "payload": "x"}', "topic:"),
        ('{"topic": "$SYS/x", "payload": "x"}', "topic:"),
        ('{"topic": "a\\u0000", "payload": "x"}', "topic: it holds U\\+0000"),
        ('{"topic": "a", "payload": 5}', "payload: expected a string, got 5"),
        ('{"topic": "a", "payload": "%", "payloadEncoding": "base64"}', "payload: not base64"),
        ('{"topic": "a", "payload": "%", "payloadEncoding": "hex"}', "payloadEncoding: expected base64, got 'hex'"),
        ('{"topic": "a", "payload": "", "qos": 3}', "qos: expected 0, 1 or 2, got 3"),
        ('{"topic": "a", "payload": "", "qos": true}', "qos:"),
        ('{"topic": "a", "payload": "", "retained": 1}', "retained:"),
        ('{"topic": "a", "payload": "", "timestamp": "noon"}', "timestamp: .*'noon'"),
        ('{"topic": "a", "payload": "", "timestamp": 1e300}', "timestamp:"),
        ('{"topic": "a", "payload": "", "timestamp": -1}', "timestamp:"),
        ('{"topic": "a", "payload": "", "headers": []}', "headers:"),
        ('{"topic": "a", "payload": "", "headers": {"userProperties": [["a"]]}}', "headers.userProperties:"),
        ('{"topic": "a", "payload": "", "headers": {"userProperties": [["a", 1]]}}', "a user property:"),
        ('{"topic": "a", "payload": "", "clientId": null}', "clientId:"),
        ('{"topic": "%s", "payload": ""}' % ("ü" * 40_000), "topic: more than 65535 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_published_is_named(text: str, problem: str) -> None:
    with pytest.raises(UnreadableError, match=problem):
        read_json(text.encode(), 0)


@pytest.mark.parametrize(
    "headers,problem",
    [
        ([("mqtt.qos", b"3")], "qos: expected 0, 1 or 2"),
        ([("mqtt.qos", b"-1")], "header mqtt.qos: expected a whole number"),
        ([("mqtt.timestamp", b"9" * 5000)], "header mqtt.timestamp: expected a whole number"),
        ([("mqtt.retained", b"yes")], "header mqtt.retained: expected true or false"),
        ([("mqtt.topic", b"\xff")], "mqtt.topic: not UTF-8"),
        ([("mqtt.userProperties.a", b"\xff")], "not UTF-8"),
        ([("mqtt.correlationId", b"x" * 65_536)], "mqtt.correlationId: more than 65535 bytes"),
    ],
)
def test_headers_are_looked_at(headers: Headers, problem: str) -> None:
    with pytest.raises(UnreadableError, match=problem):
        reader_of("RAW").read(bare(b"x", headers))


def test_a_deletion_is_no_message() -> None:
    with pytest.raises(UnreadableError, match="without a value"):
        reader_of("RAW").read(bare(None))


@pytest.mark.parametrize(
    "text,milliseconds",
    [
        ("2024-01-15T10:30:00.123Z", 1705314600123),
        ("2024-01-15T11:30:00+01:00", 1705314600000),
        ("2024-01-15T10:30:00", 1705314600000),
    ],
)
def test_times_of_any_zone(text: str, milliseconds: int) -> None:
    assert read_timestamp(text) == milliseconds


@pytest.mark.parametrize(
    "name,value",
    [
        ("mqtt.responseTopic", b"a/#"),
        ("mqtt.responseTopic", b""),
        ("mqtt.responseTopic", b"\xff"),
        ("mqtt.payloadFormatIndicator", b"2"),
        ("mqtt.messageExpiryInterval", b"4294967296"),
        ("mqtt.messageExpiryInterval", b"-1"),
    ],
)
@each_format
def test_headers_that_no_value_has_are_looked_at(mapper: RecordMapper, reader: Reader, name: str, value: bytes) -> None:
    record = mapper.record(Message("a", b"b", published_at=1.0))
    with pytest.raises(UnreadableError, match=name):
        reader.read(ConsumedRecord("t", 0, 0, record.key, record.value, [*record.headers, (name, value)], 1))
