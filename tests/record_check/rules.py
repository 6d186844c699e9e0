"""What a record has to be, by its kind: the shipped schemas at work. `problems_of` says what is wrong with one."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from functools import cache
from io import BytesIO
from typing import Any, Final

import attrs
import fastavro
import jsonschema_rs
import orjson

from gateways.kafka.records import Record
from gateways.kafka.schema_files import SchemaName, load_schema
from tests.record_check.layout import Layout, LayoutError

LONGEST: Final = 300
"""Characters of a problem."""
REGISTRY_PREFIX: Final = 5
HEXADECIMAL: Final = frozenset(("mqtt.correlationId", "mqtt.version", "mqtt.instance", "mqtt.sequence"))
"""Headers that hold bytes, no text."""
MORE: Final = 1
CONTINUED: Final = 2


class Kind(enum.StrEnum):
    """What a record is; what the summary of a run counts."""

    ARCHIVE_JSON = "archive JSON"
    ARCHIVE_AVRO = "archive AVRO"
    ARCHIVE_AVRO_REGISTRY = "archive AVRO with registry"
    ARCHIVE_RAW = "archive RAW"
    MESSAGES = "messages"
    BUS_BATCH = "bus batch"
    BUS_HELLO = "bus hello"
    BUS_ANNOUNCE = "bus announce"
    BUS_ALIVE = "bus alive"
    BUS_GOODBYE = "bus goodbye"
    BUS_CLIENTS = "bus clients"
    BUS_GROUPS = "bus groups"
    RETAINED = "retained"
    RETAINED_TOMBSTONE = "retained tombstone"
    RETAINED_PARTITIONS = "retained partitions"
    LETTER = "dead letter"
    NOTE = "dead letter's note"
    REDRIVEN = "redriven"
    EVENT = "event"
    METRICS = "metrics"
    AGGREGATE = "example's aggregate"
    ANOMALY = "example's anomaly"


BUS_KINDS: Final = {
    0: Kind.BUS_BATCH,
    1: Kind.BUS_HELLO,
    2: Kind.BUS_ANNOUNCE,
    3: Kind.BUS_ALIVE,
    4: Kind.BUS_GOODBYE,
    6: Kind.BUS_CLIENTS,
    7: Kind.BUS_GROUPS,
}
"""By the number in the record, which `mqtt_bus.layout.json` calls `kind`."""
NUMBERS: Final = {kind: number for number, kind in BUS_KINDS.items()} | {
    Kind.RETAINED: 0,
    Kind.RETAINED_PARTITIONS: 5,
}
AROUND: Final[Mapping[Kind, str]] = {
    **dict.fromkeys(BUS_KINDS.values(), "bus"),
    **{kind: "archive" for kind in Kind if kind.startswith("archive")},
    Kind.MESSAGES: "messages",
    Kind.RETAINED: "retained",
    Kind.RETAINED_TOMBSTONE: "retainedTombstone",
    Kind.RETAINED_PARTITIONS: "retainedPartitions",
    Kind.LETTER: "letter",
    Kind.NOTE: "note",
    Kind.REDRIVEN: "redriven",
    Kind.EVENT: "event",
    Kind.METRICS: "metrics",
}
"""What describes key and headers, in `mqtt_records.schema.json`."""
JSON_VALUES: Final[Mapping[Kind, SchemaName]] = {
    Kind.ARCHIVE_JSON: "mqtt_message.schema.json",
    Kind.MESSAGES: "mqtt_message.schema.json",
    Kind.LETTER: "mqtt_dlq.schema.json",
    Kind.EVENT: "mqtt_event.schema.json",
    Kind.METRICS: "mqtt_metrics.schema.json",
}


@attrs.define
class Parts:
    """Bodies of bus records that came in parts, which are read when the last one is there. One for each process."""

    waiting: dict[tuple[bytes, int], list[tuple[int, bytes]]] = attrs.Factory(dict)
    """Sequence and body of what began, by instance and stream."""

    def take(self, found: Mapping[str, Any]) -> bytes | None:
        """Return the whole body that ends with this record; None: it is not whole, or began before."""
        flags, sequence, body = found["flags"], found["sequence"], found["body"]
        writer = found["instance"], found["stream"]
        if not flags:
            return bytes(body)
        if not flags & CONTINUED:
            self.waiting[writer] = [(sequence, body)]
            return None
        parts = self.waiting.get(writer, [])
        if not parts or parts[-1][0] != sequence - 1:  # sent again, by a new producer
            return None
        parts.append((sequence, body))
        if flags & MORE:
            return None
        del self.waiting[writer]
        return b"".join(part for _, part in parts)


def problems_of(kind: Kind, record: Record, partition: int, parts: Parts | None = None) -> list[str]:
    """Return what is wrong with `record`, which is to go to `partition`; nothing: it validates. Any thread; `parts`
    may be used by one at a time."""
    try:
        name, problems = _value(kind, record, parts)
        around = around_of(record, partition, name)
    except Exception as exc:  # what cannot even be looked at
        return [f"{type(exc).__name__}: {exc}"[:LONGEST]]
    problems += errors_of(_around(AROUND[kind]), around)
    if not problems and AROUND[kind] in ("archive", "messages"):
        problems += _disagreements(record, around)
    return problems


def around_of(record: Record, partition: int, value: str | None) -> dict[str, Any]:
    """Return a record as `mqtt_records.schema.json` describes it.

    Raises:
      UnicodeDecodeError: key or a header are no text. TypeError, AttributeError: they are no bytes.
    """
    headers: dict[str, list[str]] = {}
    for name, content in record.headers:
        text = content.hex() if name in HEXADECIMAL else content.decode(errors=_errors(value, name))
        headers.setdefault(name, []).append(text)
    key = record.key
    return {
        "topic": record.topic,
        "partition": partition,
        "key": None if key is None else key.decode(errors=_errors(value, "")),
        "timestamp": record.timestamp_ms,
        "headers": headers,
        "value": value,
    }


def _errors(value: str | None, name: str) -> str:
    """What was somebody else's record once may hold bytes anywhere."""
    return "backslashreplace" if value == "redriven" and not name.startswith("mqtt.dlq.") else "strict"


def _disagreements(record: Record, around: Mapping[str, Any]) -> list[str]:
    """Return which facts of a message its record tells in two ways."""
    headers, problems = around["headers"], []
    if headers["mqtt.topic"] != [around["key"]]:
        problems.append("mqtt.topic is not the key")
    if headers["mqtt.timestamp"] != [str(record.timestamp_ms)]:
        problems.append("mqtt.timestamp is not the record's")
    return problems


def _value(kind: Kind, record: Record, parts: Parts | None) -> tuple[str | None, list[str]]:
    """Return what describes the value, and what is wrong with it."""
    value = record.value
    if kind is Kind.REDRIVEN:
        return "redriven", []
    if value is None or kind in (Kind.NOTE, Kind.RETAINED_TOMBSTONE):
        return (None, []) if value is None else ("something", [])
    if not isinstance(value, bytes):
        raise TypeError(f"the value is {type(value).__name__}")
    if (schema := JSON_VALUES.get(kind)) is not None:
        found = orjson.loads(value)
        problems = errors_of(_validator(schema), found)
        if schema == "mqtt_message.schema.json" and not problems:
            problems = [] if found["topic"].encode() == record.key else ["topic: it is not the key"]
        return schema, problems
    if kind is Kind.ARCHIVE_RAW:
        return "payload", []
    if kind in (Kind.ARCHIVE_AVRO, Kind.ARCHIVE_AVRO_REGISTRY):
        return "mqtt_message.avsc", avro_problems(value, record, registered=kind is Kind.ARCHIVE_AVRO_REGISTRY)
    return "mqtt_bus.layout.json", bus_problems(kind, record, parts or Parts())


def avro_problems(value: bytes, record: Record, *, registered: bool) -> list[str]:
    """Return what is wrong with a value in Avro: bytes that are read and written again have to be the same."""
    if registered:
        if value[0] != 0 or int.from_bytes(value[1:REGISTRY_PREFIX], "big", signed=True) < 1:
            return [f"no schema's id in front of it: {value[:REGISTRY_PREFIX].hex()}"]
        value = value[REGISTRY_PREFIX:]
    datum = fastavro.schemaless_reader(BytesIO(value), _avro(), None)
    again = BytesIO()
    fastavro.schemaless_writer(again, _avro(), datum)
    if again.getvalue() != value:
        return ["it is not what its fields are in Avro"]
    assert isinstance(datum, dict)
    if (
        datum["topic"].encode() != record.key
        or datum["timestamp"] != record.timestamp_ms
        or datum["qos"] not in (0, 1, 2)
    ):
        return [f"topic, timestamp or QoS are not the record's: {datum['topic']!r}, {datum['timestamp']}"]
    return []


def bus_problems(kind: Kind, record: Record, parts: Parts) -> list[str]:
    """Return what is wrong with the value of a record of the bus or of mqtt.retained."""
    layout = _layout()
    try:
        found = layout.read("record", record.value or b"")
        if found["kind"] != NUMBERS[kind]:
            return [f"kind {found['kind']} instead of {NUMBERS[kind]}"]
        if (body := parts.take(found)) is None:
            return []
        read = layout.read(str(found["kind"]), body)
    except LayoutError as exc:
        return [str(exc)[:LONGEST]]
    if kind is not Kind.RETAINED:
        return []
    items = read["items"]
    if len(items) != 1 or items[0]["tag"] != 2 or items[0]["content"]["topic"].encode() != record.key:
        return ["it is not one message of the key's topic"]
    return []


def bus_kind(value: bytes | None) -> Kind | None:
    """Return the kind of a record that is to go to the bus; None: no such record has a schema."""
    return BUS_KINDS.get(value[1]) if value is not None and len(value) > 1 else None


def errors_of(validator: Any, value: object) -> list[str]:
    """Return what a JSON Schema says against `value`, the first few."""
    if validator.is_valid(value):
        return []
    errors = list(validator.iter_errors(value))[:10]
    return [f"{'.'.join(map(str, error.instance_path)) or 'all'}: {error.message}"[:LONGEST] for error in errors]


@cache
def _validator(name: SchemaName) -> Any:
    return jsonschema_rs.validator_for(load_schema(name))


@cache
def _around(name: str) -> Any:
    schema = load_schema("mqtt_records.schema.json")
    return jsonschema_rs.validator_for({**schema, "$ref": f"#/$defs/{name}"})


@cache
def _avro() -> Any:
    return fastavro.parse_schema(load_schema("mqtt_message.avsc"))


@cache
def _layout() -> Layout:
    return Layout(load_schema("mqtt_bus.layout.json"))


def warm_up() -> Callable[..., list[str]]:
    """Read all schemas: a process does so before its first record."""
    for name in set(AROUND.values()):
        _around(name)
    for schema in set(JSON_VALUES.values()):
        _validator(schema)
    _avro()
    _layout()
    return problems_of
