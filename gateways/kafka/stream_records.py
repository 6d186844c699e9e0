"""Records of mqtt.messages that others wrote, as MQTT messages [K11]: pure, no I/O.

`{"topic": ..., "payload": ..., "timestamp": ...}` is enough; whatever else the records of this broker have is
understood, and anything beyond that is left alone. Key and headers say nothing: Spring's `__TypeId__` is welcome.
"""

from __future__ import annotations

import binascii
import datetime
from base64 import b64decode
from itertools import zip_longest
from typing import Any, Final

import orjson

from gateways.kafka.dlq import LATEST_MS
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.errors import MqttTrioError
from mqtt_trio.gateway import NO_PROPERTIES, Message, MessageProperties, validate_topic_name

GUARD_HEADER: Final = "mqtt.publishedBy"
"""The first header of each record that a node writes to mqtt.messages, with its `Node.Id`: no node publishes it."""
DEFAULT_QOS: Final = 1
"""Of records that name none: what Kafka keeps is worth keeping for a subscriber that is away."""
LONGEST_STRING: Final = 65_535
"""Bytes of a string in MQTT."""


class MalformedError(Exception):
    """The record is no message that a client could have published; the text says what is wrong with it."""


class OutsideMessage(Message):
    """A message that was read from mqtt.messages: it never goes back there, and what it is acknowledged for there is
    that Kafka has it for the other nodes as well, whatever `[Kafka.Bus] Ack` says to clients."""


def is_own(record: ConsumedRecord) -> bool:
    """Tell whether a node of ours wrote the record. Hot: most records are."""
    return any(name == GUARD_HEADER for name, _ in record.headers)


class OwnRecords:
    """Thins out what this deployment wrote, before it costs the Trio thread anything: whoever writes all that clients
    publish reads it all again, to find what others put between it. The reader's thread.

    Attributes:
      left_out: how many there were.
    """

    def __init__(self) -> None:
        self.left_out = 0

    def thin(self, records: list[ConsumedRecord]) -> list[ConsumedRecord]:
        """Return the records without those of ours behind which comes another one of their partition: when that is done
        with, so are they. The last one of a partition stays, for the group's offset."""
        kept = [
            record
            for record, following in zip_longest(records, records[1:])
            if following is None or record.partition != following.partition or not is_own(record)
        ]
        self.left_out += len(records) - len(kept)
        return kept


def message_of(record: ConsumedRecord) -> OutsideMessage:
    """Return the message of a record.

    Raises:
      MalformedError: there is none in it.
    """
    if record.defect is not None:
        raise MalformedError(record.defect)
    if record.value is None:
        raise MalformedError("the record has no value")
    try:
        value = orjson.loads(record.value)
    except ValueError as exc:
        raise MalformedError(f"the value is no JSON: {exc}") from None
    if not isinstance(value, dict):
        raise MalformedError(f"the value is {kind_of(value)} instead of an object")
    qos = value.get("qos", DEFAULT_QOS)
    if type(qos) is not int or not 0 <= qos <= 2:
        raise MalformedError(f"qos: expected 0, 1 or 2, got {shown(qos)}")
    retained = value.get("retained", False)
    if type(retained) is not bool:
        raise MalformedError(f"retained: expected true or false, got {shown(retained)}")
    return OutsideMessage(
        _topic_of(value),
        _bytes_of(value, "payload", "payloadEncoding"),
        qos,
        retained,
        _properties_of(value.get("headers")),
        _string(value.get("clientId"), "clientId") or "",
        _seconds_of(value.get("timestamp"), record.timestamp_ms),
    )


def _topic_of(value: dict[str, Any]) -> str:
    topic = value.get("topic")
    if not isinstance(topic, str):
        raise MalformedError(f"topic: expected text, got {shown(topic)}" if "topic" in value else "topic is missing")
    try:
        validate_topic_name(topic)
    except MqttTrioError as exc:
        raise MalformedError(f"topic: {exc}") from None
    return topic


def _bytes_of(value: dict[str, Any], name: str, encoding_name: str) -> bytes:
    text, encoding = value.get(name), value.get(encoding_name)
    if not isinstance(text, str):
        raise MalformedError(f"{name}: expected text, got {shown(text)}" if name in value else f"{name} is missing")
    if encoding is None:
        return text.encode()
    if encoding != "base64":
        raise MalformedError(f"{encoding_name}: expected base64, got {shown(encoding)}")
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise MalformedError(f"{name} is no base64: {exc}") from None


def _seconds_of(value: object, record_ms: int) -> float:
    """Return UTC seconds: of ISO 8601 (without a zone it is UTC), of milliseconds since the epoch, or the record's."""
    if value is None:
        return max(record_ms, 0) / 1000
    if isinstance(value, str):
        try:
            moment = datetime.datetime.fromisoformat(value)
            moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)
            milliseconds = moment.timestamp() * 1000
        except (ValueError, OverflowError):
            raise MalformedError(f"timestamp: expected ISO 8601, got {shown(value)}") from None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        milliseconds = float(value)
    else:
        raise MalformedError(f"timestamp: expected ISO 8601 or milliseconds, got {shown(value)}")
    if not 0 <= milliseconds <= LATEST_MS:
        raise MalformedError(f"timestamp: {shown(value)} lies outside of the years 1970 to 9999")
    return milliseconds / 1000


def _properties_of(headers: object) -> MessageProperties:
    if headers is None or headers == {}:
        return NO_PROPERTIES
    if not isinstance(headers, dict):
        raise MalformedError(f"headers: expected an object, got {shown(headers)}")
    correlation = None
    if headers.get("correlationId") is not None:
        correlation = _bytes_of(headers, "correlationId", "correlationIdEncoding")
        if len(correlation) > LONGEST_STRING:
            raise MalformedError("headers.correlationId has more than 65,535 bytes")
    pairs = headers.get("userProperties") or []
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise MalformedError(f"headers.userProperties: expected a list of [name, value], got {shown(pairs)}")
    found = [tuple(_string(text, "headers.userProperties") or "" for text in pair) for pair in pairs]
    content_type = _string(headers.get("contentType"), "headers.contentType")
    if content_type is None and correlation is None and not found:
        return NO_PROPERTIES
    return MessageProperties(
        content_type=content_type,
        correlation_data=correlation,
        user_properties=tuple((name, text) for name, text in found),
    )


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _string(value: object, name: str) -> str | None:
    """Return a string that MQTT can carry, None for none."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise MalformedError(f"{name}: expected text, got {shown(value)}")
    if "\0" in value or len(value.encode()) > LONGEST_STRING:
        raise MalformedError(f"{name}: U+0000 is in it, or more than 65,535 bytes")
    return value


def kind_of(value: object) -> str:
    """Return what JSON calls a value."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "something else")


def shown(value: object) -> str:
    """Return a value of JSON as an error may show it: numbers and short texts, else its kind."""
    if isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 40):
        return repr(value)
    return kind_of(value)
