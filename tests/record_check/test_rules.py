"""What the checker says of one record: right ones pass, and each planted fault is found and named."""

from __future__ import annotations

import ast
import inspect
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from gateways.kafka import bus_records, workers
from gateways.kafka.avro import AvroMapper
from gateways.kafka.bus_choices import PAIR, GroupNews, encode_choices, encode_news
from gateways.kafka.bus_clients import encode_newcomer
from gateways.kafka.bus_records import Flag, encode_header, encode_items, encode_message
from gateways.kafka.bus_records import Kind as BusKind
from gateways.kafka.dlq import (
    DeadLetter,
    KafkaSource,
    LostRecord,
    MqttSource,
    Stage,
    encode_letter,
    id_of_message,
    letter_headers,
)
from gateways.kafka.dlq_writer import Pending, note_record, redriven_record
from gateways.kafka.events_out import facts_of
from gateways.kafka.mapping import JsonMapper, RawMapper, RecordMapper
from gateways.kafka.node_facts import NodeFacts, encode_facts
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import Reason, Record
from gateways.kafka.retained import MAP_KEY
from mqtt_trio.gateway import Message, MessageProperties, Newcomer, SessionTakenOver
from tests.gateways.memory_bus import NOW, run_of
from tests.record_check.kinds import UnknownRecordError, kind_of
from tests.record_check.rules import NUMBERS, Kind, Parts, problems_of

ROOT: Final = Path(__file__).parents[2]
INSTANCE: Final = bytes(range(16))
PROPERTIES: Final = MessageProperties(
    payload_format_indicator=1,
    message_expiry_interval=60,
    content_type="text/plain",
    response_topic="answers/1",
    correlation_data=b"\xff\0",
    user_properties=(("name", "one"), ("name", "two")),
)
MESSAGE: Final = Message("a/b", b"\xffpayload", 1, True, PROPERTIES, "client", NOW)
PLAIN: Final = Message("a/b", b"text", client_id="client", published_at=NOW)
MILLISECONDS: Final = round(NOW * 1000)


def letter() -> DeadLetter:
    source = MqttSource(topic="a/b", client_id="client", published_at=NOW, qos=1, retain=False)
    made = JsonMapper("archive", "node-1").record(PLAIN)
    lost = LostRecord(
        topic="archive", partition=None, key=made.key, value=made.value, headers=made.headers, timestamp_ms=MILLISECONDS
    )
    return DeadLetter(
        id=id_of_message(PLAIN, "node-1", "archive"),
        dead_at_ms=MILLISECONDS,
        broker_id="node-1",
        stage=Stage.ARCHIVE,
        reason=Reason.REFUSED,
        error="no",
        source=source,
        size=4,
        sha256="0" * 64,
        target="archive",
        redrivable=True,
        record=lost,
    )


def letter_record() -> Record:
    one = letter()
    return Record("mqtt.dlq", None, one.id.encode(), encode_letter(one), letter_headers(one), one.dead_at_ms)


def mapped(mapper: RecordMapper, message: Message = MESSAGE) -> Record:
    return mapper.record(message)


def registered() -> AvroMapper:
    mapper = AvroMapper("archive", "node-1", registered=True)
    mapper.use_id(7)
    return mapper


def stream() -> RecordMapper:
    mapper = JsonMapper("mqtt.messages", "node-1")
    mapper.mark = ("mqtt.publishedBy", b"node-1")
    return mapper


def bus(kind: BusKind, body: bytes, sequence: int = 1, flags: Flag = Flag.NONE) -> Record:
    return Record("bus", 0, None, encode_header(kind, INSTANCE, "node-1", sequence, flags) + body)


def batch() -> bytes:
    choices = encode_choices([PAIR.pack(1, 2), PAIR.pack(3, 4)], only=True, hops=1)
    runs = run_of("a/b", b"1", b"22"), run_of("a/b", b"x", qos=1)
    return encode_items([*runs, encode_message(MESSAGE), encode_message(PLAIN), choices + encode_message(PLAIN)])


def of_retained(value: bytes | None) -> Record:
    headers = [
        ("mqtt.version", bytes((bus_records.FORMAT_VERSION,))),
        ("mqtt.node", b"node-1"),
        ("mqtt.instance", INSTANCE),
        ("mqtt.sequence", struct.pack(">Q", 1)),
    ]
    return Record("mqtt.retained", 0, b"a/b", value, headers, MILLISECONDS)


def event() -> Record:
    found = facts_of(SessionTakenOver(at=NOW, client_id="c", old_peer="old", new_peer="new"))
    assert found is not None
    about, name, facts = found
    head = {"timestamp": "2026-01-01T00:00:00.000Z", "event": name, "brokerId": "node-1"}
    return Record("mqtt.events", None, about.encode(), json.dumps(head | facts).encode(), (), MILLISECONDS)


def metrics() -> Record:
    figure = {"name": "messages_total", "labels": {"node": "node-1"}, "value": 1}
    head = {"timestamp": "2026-01-01T00:00:00.000Z", "brokerId": "node-1", "interval": 10.0}
    value = json.dumps(head | {"counters": [figure], "gauges": [figure]}).encode()
    return Record("mqtt.metrics", None, b"node-1", value, (), MILLISECONDS)


def redriven() -> Record:
    one = letter()
    assert one.record is not None
    return redriven_record(Pending(one, one.record))


HEAD: Final = encode_header(BusKind.BATCH, INSTANCE, "node-1", 1)
FACTS: Final = encode_facts(NodeFacts("host", 1, NOW, 0, 5))
RIGHT: Final[dict[Kind, Callable[[], Record]]] = {
    Kind.ARCHIVE_JSON: lambda: mapped(JsonMapper("archive", "node-1")),
    Kind.ARCHIVE_AVRO: lambda: mapped(AvroMapper("archive", "node-1")),
    Kind.ARCHIVE_AVRO_REGISTRY: lambda: mapped(registered()),
    Kind.ARCHIVE_RAW: lambda: mapped(RawMapper("archive", "node-1")),
    Kind.MESSAGES: lambda: mapped(stream()),
    Kind.BUS_BATCH: lambda: bus(BusKind.BATCH, batch()),
    Kind.BUS_HELLO: lambda: bus(BusKind.HELLO, FACTS),
    Kind.BUS_ANNOUNCE: lambda: bus(BusKind.ANNOUNCE, FACTS),
    Kind.BUS_ALIVE: lambda: bus(BusKind.ALIVE, FACTS),
    Kind.BUS_GOODBYE: lambda: bus(BusKind.GOODBYE, FACTS),
    Kind.BUS_CLIENTS: lambda: bus(BusKind.CLIENTS, encode_newcomer(Newcomer("c", "user", True, NOW))),
    Kind.BUS_GROUPS: lambda: bus(BusKind.GROUPS, b"\1" + encode_news(GroupNews("$share/g/a/#", 1))),
    Kind.RETAINED: lambda: of_retained(HEAD + encode_message(MESSAGE)),
    Kind.RETAINED_TOMBSTONE: lambda: of_retained(None),
    Kind.RETAINED_PARTITIONS: lambda: Record(
        "mqtt.retained", 0, MAP_KEY, encode_header(BusKind.PARTITIONS, INSTANCE, "node-1", 0) + struct.pack(">I", 12)
    ),
    Kind.LETTER: letter_record,
    Kind.NOTE: lambda: note_record("mqtt.dlq", letter().id, "archive-0@17"),
    Kind.REDRIVEN: redriven,
    Kind.EVENT: event,
    Kind.METRICS: metrics,
}
JSON_KINDS: Final = (Kind.ARCHIVE_JSON, Kind.MESSAGES, Kind.LETTER, Kind.EVENT, Kind.METRICS)
PACKED_KINDS: Final = [kind for kind in NUMBERS if kind is not Kind.BUS_BATCH]


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_record_validates(kind: Kind) -> None:
    assert problems_of(kind, RIGHT[kind](), 0) == []


# --- planted faults


def assert_found(kind: Kind, fields: dict[str, Any], *words: str) -> None:
    """A right record with this value instead is wrong, and what is said of it has one of these words."""
    record = RIGHT[kind]()
    record.value = json.dumps(fields).encode()
    problems = problems_of(kind, record, 0)
    assert any(word in problem for problem in problems for word in words), (fields, problems)


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_a_value_without_one_of_its_fields_is_found(kind: Kind) -> None:
    fields: dict[str, Any] = json.loads(RIGHT[kind]().value or b"")
    optional = {"payloadEncoding", "target", "record"}
    for name in fields.keys() - optional:
        assert_found(kind, {other: value for other, value in fields.items() if other != name}, name, "oneOf", "anyOf")


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_a_value_with_a_field_of_another_type_is_found(kind: Kind) -> None:
    fields: dict[str, Any] = json.loads(RIGHT[kind]().value or b"")
    for name in fields:
        assert_found(kind, fields | {name: ["wrong"]}, name, "oneOf", "wrong")


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_a_value_with_a_field_that_nobody_knows_is_found(kind: Kind) -> None:
    assert_found(kind, json.loads(RIGHT[kind]().value or b"") | {"unheardOf": 1}, "unheardOf")


@pytest.mark.parametrize("kind", RIGHT)
def test_headers_that_nobody_knows_and_missing_ones_are_found(kind: Kind) -> None:
    record = RIGHT[kind]()
    headers = list(record.headers)
    if kind is not Kind.REDRIVEN:  # which has the headers of whatever it was
        record.headers = [*headers, ("unheard-of", b"x")]
        assert any("headers" in problem for problem in problems_of(kind, record, 0))
    optional = ["mqtt.contentType", "mqtt.correlationId", "mqtt.responseTopic", "mqtt.payload", "mqtt.messageExpiry"]
    if kind in (Kind.LETTER, Kind.REDRIVEN):
        optional += ["mqtt.topic", "mqtt.clientId"]
    for name, _ in headers:
        is_optional = name.startswith((*optional, "mqtt.userProperties.")) or kind is Kind.REDRIVEN
        if not is_optional or name == "mqtt.dlq.id":
            record.headers = [header for header in headers if header[0] != name]
            assert any(name in problem for problem in problems_of(kind, record, 0)), name


@pytest.mark.parametrize("kind", [kind for kind in RIGHT if kind not in (Kind.ARCHIVE_RAW, Kind.REDRIVEN)])
def test_a_value_where_there_has_to_be_none_and_none_where_there_has_to_be_one_are_found(kind: Kind) -> None:
    record = RIGHT[kind]()
    record.value = b"\0" if record.value is None else None
    assert problems_of(kind, record, 0)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_packed_values_that_are_cut_or_too_long_are_found(kind: Kind) -> None:
    record = RIGHT[kind]()
    value = record.value or b""
    for wrong in (value[:-1], value + b"\0", value[:10], b"", b"\1" + value[1:], value[:1] + b"\x09" + value[2:]):
        record.value = wrong
        assert problems_of(kind, record, 0), wrong


@pytest.mark.parametrize(
    "body, problem",
    [
        (b"\x09", "item.tag: 9"),
        (batch()[:-1], "are announced"),
        (encode_message(PLAIN)[:1] + b"\x03" + encode_message(PLAIN)[2:], "message.flags: 3"),
        (encode_message(Message("a\xff", b"")).replace("a\xff".encode(), b"a\xff\xff"), "message.topic: no UTF-8"),
        (encode_message(Message("a/b", b"")).replace(b"a/b", b"a/#"), "message.topic: 'a/#'"),
        (encode_items([run_of("a", b"1", b"2")]).replace(b"\0\0\0\x02", b"\0\0\0\x03", 1), "2 packets, 3"),
        (encode_items([run_of("a", b"1")]).replace(b"\x30", b"\x31"), "begins with 0x31"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_with_wrong_items_are_found(body: bytes, problem: str) -> None:
    problems = problems_of(Kind.BUS_BATCH, bus(BusKind.BATCH, body), 0)
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_body_in_parts_is_read_when_it_is_whole() -> None:
    parts, body = Parts(), batch() + b"\x09"
    pieces = body[:50], body[50:100], body[100:]
    flags = Flag.MORE, Flag.MORE | Flag.CONTINUED, Flag.CONTINUED
    records = [bus(BusKind.BATCH, piece, n, flag) for n, (piece, flag) in enumerate(zip(pieces, flags, strict=True), 1)]
    assert [problems_of(Kind.BUS_BATCH, record, 0, parts) for record in records[:2]] == [[], []]
    assert problems_of(Kind.BUS_BATCH, records[2], 0, parts) == ["item.tag: 9 is none of what it may be"]
    assert problems_of(Kind.BUS_BATCH, records[2], 0, parts) == []  # sent again: its body was read


@pytest.mark.parametrize("kind", [Kind.ARCHIVE_AVRO, Kind.ARCHIVE_AVRO_REGISTRY])
def test_wrong_avro_is_found(kind: Kind) -> None:
    record = RIGHT[kind]()
    value = record.value or b""
    for wrong in (value[:-1], value + b"\0", b"\0" + value, value[5:], b"{}", b"\0\0\0\0\0" + value[5:]):
        record.value = wrong
        assert problems_of(kind, record, 0), wrong


@pytest.mark.parametrize("kind", [kind for kind in RIGHT if kind.startswith("archive") or kind is Kind.MESSAGES])
def test_facts_that_a_record_tells_in_two_ways_have_to_agree(kind: Kind) -> None:
    for change in ({"key": b"a/c"}, {"timestamp_ms": MILLISECONDS + 1}):
        record = RIGHT[kind]()
        vars(record).update(change)
        assert problems_of(kind, record, 0), change


def test_a_record_of_the_stream_without_its_guard_is_found() -> None:
    record = RIGHT[Kind.ARCHIVE_JSON]()
    assert any("mqtt.publishedBy" in problem for problem in problems_of(Kind.MESSAGES, record, 0))


def test_a_letter_about_a_record_has_a_source_of_the_other_kind() -> None:
    record = letter_record()
    fields = json.loads(record.value or b"")
    source = KafkaSource(topic="t", partition=0, offset=1, timestamp_ms=2)
    fields["source"] = {"type": "kafka", "topic": source.topic, "partition": -1, "offset": 1, "timestamp": 2}
    record.value = json.dumps(fields).encode()
    assert any("source" in problem for problem in problems_of(Kind.LETTER, record, 0))


# --- which kind


@pytest.mark.parametrize("kind", RIGHT)
def test_kinds_are_told_by_their_producers(kind: Kind) -> None:
    names = {"letter": "dlq", "note": "redrive", "redriven": "redrive", "event": "events", "metrics": "metrics"}
    by_kind = {Kind.LETTER: "letter", Kind.NOTE: "note"}
    first = str(kind).split(maxsplit=1)[0]
    producer = names.get(by_kind.get(kind, first), "bus" if first in ("bus", "retained") else first)
    assert kind_of(producer, RIGHT[kind]()) is kind


@pytest.mark.parametrize(
    "producer, record",
    [
        ("new", Record("t", 0, None, b"x")),
        ("archive", Record("t", 0, None, b"x")),
        ("bus", Record("t", 0, None, b"")),
        ("bus", Record("t", 0, None, b"\2\x63")),
    ],
)
def test_what_no_schema_describes_is_found(producer: str, record: Record) -> None:
    with pytest.raises(UnknownRecordError, match="no schema is known"):
        kind_of(producer, record, KafkaOptions())


def test_there_is_no_other_way_to_kafka() -> None:
    """The check stands around `workers.Producer.send`."""
    places = set()
    for path in (*(ROOT / "gateways").rglob("*.py"), *(ROOT / "mqtt_trio").rglob("*.py")):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            text = ast.unparse(function)
            if "KafkaProducer(" in text or "_accumulator.append" in text or ".send(record.topic" in text:
                places.add((path.name, function.name))
    assert places == {("workers.py", "__init__"), ("workers.py", "send")}
    assert inspect.getsource(workers).count("KafkaProducer(") == 1
