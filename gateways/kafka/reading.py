"""Records back to messages, whatever format a group writes in [K8].

Anybody may write to a Kafka topic, so everything is looked at before a message is made of it: what is returned could
have been published. Of a JSON value `topic` and `payload` are enough, which is what other programs write; AVRO and RAW
take what their values do not hold from the headers `mqtt.*`, and where these are missing from the record itself.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import attrs
import orjson

from gateways.kafka.bus_records import BusRecordError, check_topic
from gateways.kafka.mapping import USER_PROPERTY
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.errors import GatewayError
from mqtt_trio.gateway import NO_PROPERTIES, Message, MessageProperties

LATEST_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999."""
LONGEST_TEXT: Final = 65_535
"""Bytes of a string of MQTT."""
LARGEST_PAYLOAD: Final = 268_435_455
LONGEST_EXPIRY: Final = 2**32 - 1
FEWEST_HEADERS: Final = 6
"""Headers that every record of ours has."""

Find = Callable[[int], str]
"""Returns the text of a schema by its id; blocks, raises GatewayError."""


class UnreadableError(GatewayError):
    """A record is none of the format that it should have, or stands for nothing that can be published."""

    def __init__(self, text: str) -> None:
        super().__init__(text, retriable=False)


@attrs.frozen
class Archived:
    """What a record of an archive says."""

    message: Message
    broker_id: str
    """`Node.Id` of the broker that the message was published to; empty where nobody said."""


class Reader(Protocol):
    """Reads the records of one group."""

    def read(self, record: ConsumedRecord) -> Archived:
        """Return what `record` says.

        Raises:
          UnreadableError: it cannot be read, now or later.
          GatewayError: the schema registry does not answer (`retriable`) or does not know its schema.
        """


def reader_of(form: str, find_schema: Find | None = None) -> Reader:
    """Return the reader of a group by its `Format`; `find_schema`: what its registry has, None without one. The reader
    then blocks for the registry where it meets an id for the first time: not on the Trio thread."""
    if form == "JSON":
        return JsonReader()
    if form == "RAW":
        return RawReader()
    return AvroReader(find_schema)


class JsonReader:
    """Reads JSON values; timestamps in either of their forms."""

    def read(self, record: ConsumedRecord) -> Archived:
        """See `Reader.read`."""
        archived = read_json(record.value or b"", record.timestamp_ms)
        if len(record.headers) > FEWEST_HEADERS and (extras := HeaderFacts(record).extras()):
            message = archived.message
            message.properties = attrs.evolve(message.properties, **extras)
        return archived


def read_json(value: bytes, timestamp_ms: int) -> Archived:
    """Return what a JSON value says; `timestamp_ms`: the time of its record, where it has none of its own.

    Raises:
      UnreadableError: it is no value of a message.
    """
    try:
        table = orjson.loads(value)
    except orjson.JSONDecodeError as exc:
        raise UnreadableError(f"not JSON: {exc}") from None
    if not isinstance(table, dict):
        raise UnreadableError("not a JSON object")
    get = table.get
    message = Message(
        checked_topic(get("topic")),
        _payload(_bytes(table, "payload", "payloadEncoding")),
        _qos(get("qos", 0)),
        _flag(get("retained", False)),
        _json_properties(get("headers")),
        _text(get("clientId", ""), "clientId"),
        read_timestamp(get("timestamp", timestamp_ms)) / 1000,
    )
    return Archived(message, _text(get("brokerId", ""), "brokerId"))


def _json_properties(headers: object) -> MessageProperties:
    if not headers and (headers is None or isinstance(headers, dict)):
        return NO_PROPERTIES
    if not isinstance(headers, dict):
        raise UnreadableError(f"headers: expected an object, got {_shown(headers)}")
    pairs = headers.get("userProperties", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UnreadableError("headers.userProperties: expected a list of [name, value]")
    content_type = headers.get("contentType")
    correlation = _bytes(headers, "correlationId", "correlationIdEncoding") if "correlationId" in headers else None
    return MessageProperties(
        content_type=_text(content_type, "contentType") if content_type is not None else None,
        correlation_data=_short(correlation, "correlationId"),
        user_properties=tuple((_text(name, "a user property"), _text(text, "a user property")) for name, text in pairs),
    )


class AvroReader:
    """Reads AVRO values, plain ones and those that name their schema by the id of a registry."""

    def __init__(self, find_schema: Find | None = None) -> None:
        from gateways.kafka.writer_schemas import WriterSchemas

        self._writers = None if find_schema is None else WriterSchemas(find_schema)

    def read(self, record: ConsumedRecord) -> Archived:
        """See `Reader.read`."""
        from gateways.kafka import avro

        value = record.value or b""
        try:
            writer, datum = avro.SCHEMA, value
            if self._writers is not None:
                schema_id, datum = avro.split_id(value)
                writer = avro.SCHEMA if schema_id is None else self._writers[schema_id]
            fields = avro.decode_datum(datum, writer)
        except avro.AvroError as exc:
            hint = ""
            if self._writers is None and avro.split_id(value)[0] is not None:
                hint = "; it seems to begin with a schema id, for which [Kafka.SchemaRegistry] Url is needed"
            raise UnreadableError(f"{exc}{hint}") from None
        facts = HeaderFacts(record)
        message = Message(
            checked_topic(fields["topic"]),
            _payload(fields["payload"]),
            _qos(fields["qos"]),
            _flag(fields["retained"]),
            facts.properties(),
            _text(fields["clientId"] or "", "clientId"),
            read_timestamp(fields["timestamp"]) / 1000,
        )
        return Archived(message, facts.text("mqtt.brokerId"))


class RawReader:
    """Reads RAW values: the topic is the key's where no header says it, the time that of the record."""

    def read(self, record: ConsumedRecord) -> Archived:
        """See `Reader.read`."""
        if record.value is None:
            raise UnreadableError("a record without a value is no message")
        facts = HeaderFacts(record)
        topic = facts.get("mqtt.topic", record.key or b"")
        message = Message(
            checked_topic(_decoded(topic, "mqtt.topic")),
            _payload(record.value),
            _qos(facts.number("mqtt.qos", 0)),
            facts.flag("mqtt.retained"),
            facts.properties(),
            facts.text("mqtt.clientId"),
            read_timestamp(facts.number("mqtt.timestamp", record.timestamp_ms)) / 1000,
        )
        return Archived(message, facts.text("mqtt.brokerId"))


class HeaderFacts:
    """The headers `mqtt.*` of a record; of those that must not repeat the last one counts."""

    def __init__(self, record: ConsumedRecord) -> None:
        self._single: Mapping[str, bytes] = dict(record.headers)
        self._headers = record.headers

    def get(self, name: str, default: bytes) -> bytes:
        """Return the bytes of a header."""
        return self._single.get(name, default)

    def text(self, name: str) -> str:
        """Return a header as text; missing, it is empty."""
        return _text(_decoded(self.get(name, b""), name), name)

    def number(self, name: str, default: int) -> int:
        """Return a header that is a whole number."""
        found = self._single.get(name)
        if found is None:
            return default
        if not found.isdigit() or len(found) > 15:
            raise UnreadableError(f"header {name}: expected a whole number, got {_shown(found)}")
        return int(found)

    def flag(self, name: str) -> bool:
        """Return a header that is true or false; missing, it is false."""
        found = self.get(name, b"false")
        if found not in (b"true", b"false"):
            raise UnreadableError(f"header {name}: expected true or false, got {_shown(found)}")
        return found == b"true"

    def properties(self) -> MessageProperties:
        """Return the properties of the message."""
        user_properties = tuple(
            (_text(name[len(USER_PROPERTY) :], name), _text(_decoded(value, name), name))
            for name, value in self._headers
            if name.startswith(USER_PROPERTY)
        )
        correlation = _short(self._single.get("mqtt.correlationId"), "mqtt.correlationId")
        has_type = "mqtt.contentType" in self._single
        extras = self.extras()
        if not has_type and correlation is None and not user_properties and not extras:
            return NO_PROPERTIES
        return MessageProperties(
            content_type=self.text("mqtt.contentType") if has_type else None,
            correlation_data=correlation,
            user_properties=user_properties,
            **extras,
        )

    def extras(self) -> dict[str, Any]:
        """Return the properties that stand in headers alone, whatever the format."""
        found: dict[str, Any] = {}
        if "mqtt.responseTopic" in self._single:
            found["response_topic"] = topic = self.text("mqtt.responseTopic")
            if not topic or "#" in topic or "+" in topic:  # [MQTT5-3.3.2-14]
                raise UnreadableError(f"header mqtt.responseTopic: expected a Topic Name, got {_shown(topic)}")
        for name, header, most in (
            ("payload_format_indicator", "mqtt.payloadFormatIndicator", 1),
            ("message_expiry_interval", "mqtt.messageExpiryInterval", LONGEST_EXPIRY),
        ):
            if header in self._single:
                found[name] = number = self.number(header, 0)
                if number > most:
                    raise UnreadableError(f"header {header}: expected {most} at most, got {number}")
        return found


# --- what a message may hold


def read_timestamp(value: object) -> int:
    """Return milliseconds since the epoch of either form: a whole number, or ISO 8601, in UTC where it has no zone.

    Raises:
      UnreadableError: it is neither, or before 1970, or behind the year 9999.
    """
    milliseconds = value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            milliseconds = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
        except (ValueError, OverflowError):
            milliseconds = None
    if type(milliseconds) is not int or not 0 <= milliseconds <= LATEST_MS:
        raise UnreadableError(f"timestamp: expected ISO 8601 or milliseconds since 1970, got {_shown(value)}")
    return milliseconds


def checked_topic(topic: object) -> str:
    """Return a Topic Name that clients could publish to, and that is no node's own.

    Raises:
      UnreadableError: it is none.
    """
    name = _text(topic, "topic")
    try:
        check_topic(name)
    except BusRecordError as exc:
        raise UnreadableError(f"topic: {exc}") from None
    return name


def _text(value: object, what: str) -> str:
    """Return a string that MQTT can carry."""
    if not isinstance(value, str):
        raise UnreadableError(f"{what}: expected a string, got {_shown(value)}")
    if "\0" in value:
        raise UnreadableError(f"{what}: it holds U+0000")
    if len(value) > LONGEST_TEXT // 4 and len(value.encode()) > LONGEST_TEXT:
        raise UnreadableError(f"{what}: more than {LONGEST_TEXT} bytes")
    return value


def _short(data: bytes | None, what: str) -> bytes | None:
    if data is not None and len(data) > LONGEST_TEXT:
        raise UnreadableError(f"{what}: more than {LONGEST_TEXT} bytes")
    return data


def _payload(payload: bytes) -> bytes:
    if len(payload) > LARGEST_PAYLOAD:
        raise UnreadableError(f"payload: more than {LARGEST_PAYLOAD} bytes")
    return payload


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UnreadableError(f"{what}: not UTF-8: {_shown(data)}") from None


def _bytes(table: Mapping[str, Any], key: str, encoding_key: str) -> bytes:
    """Return what stands as text, or in base64 where `encoding_key` says so."""
    text, encoding = table.get(key), table.get(encoding_key)
    if not isinstance(text, str):
        raise UnreadableError(f"{key}: expected a string, got {_shown(text)}")
    if encoding is None:
        return text.encode()
    if encoding != "base64":
        raise UnreadableError(f"{encoding_key}: expected base64, got {_shown(encoding)}")
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UnreadableError(f"{key}: not base64") from None


def _qos(value: object) -> int:
    if type(value) is not int or not 0 <= value <= 2:
        raise UnreadableError(f"qos: expected 0, 1 or 2, got {_shown(value)}")
    return value


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise UnreadableError(f"retained: expected true or false, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """Return a value for a message, cut short."""
    if value is None:
        return "nothing"
    text = repr(value[:40] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= 60 else text[:60] + "…"
