"""The format of mqtt.dlq, the topic of dead letters [K12]: pure, no I/O. `schemas/mqtt_dlq.schema.json` describes it.

A dead letter says what could not be stored or understood, where it came from, and why. Where that is possible it holds
the Kafka record that should have been written, or that could not be read, so that `dlq redrive` only has to write it
again. The id of a letter is made of what it is about: the same thing that fails twice has the same id, which is the
letter's key as well.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import attrs
import orjson

from gateways.kafka.mapping import iso_timestamp
from gateways.kafka.records import Headers, Reason
from mqtt_trio.gateway import Message

FORMAT_VERSION: Final = 1
VERSION_HEADER: Final = "mqtt.dlq.version"
ID_HEADER: Final = "mqtt.dlq.id"
"""Also on every record that was redriven: whoever reads the target can tell that it has this letter's record."""
REDRIVEN_HEADER: Final = "mqtt.dlq.redriven"
"""On a record of mqtt.dlq without a value, which has a letter's key: its record was written again. Holds where, as
`topic-partition@offset`."""
STAGE_HEADER: Final = "mqtt.dlq.stage"
REASON_HEADER: Final = "mqtt.dlq.reason"
BROKER_HEADER: Final = "mqtt.brokerId"
TOPIC_HEADER: Final = "mqtt.topic"
CLIENT_HEADER: Final = "mqtt.clientId"
LONGEST_HEADER: Final = 1024
"""Bytes of a topic or Client Identifier up to which it stands in the headers too; the value always has it."""
LONGEST_ERROR: Final = 1000
"""Characters of the error's text; the rest is cut off."""
LATEST_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999: later times are written as this one."""


class Stage(enum.StrEnum):
    """What the node was doing."""

    ARCHIVE = "archive"
    """Writing a message of an archive group."""
    BUS = "bus"
    """Writing messages for the other nodes."""
    RETAINED = "retained"
    """Writing a retained message for the other nodes."""
    MESSAGES = "messages"
    """Writing the public stream of messages."""
    CONSUME = "consume"
    """Reading a record; `KafkaSource.topic` says from where."""


@attrs.frozen(kw_only=True)
class MqttSource:
    """The message that a client of this node published."""

    topic: str
    client_id: str
    published_at: float
    """UTC seconds since the epoch."""
    qos: int = 0
    retain: bool = False


@attrs.frozen(kw_only=True)
class KafkaSource:
    """The record that was read."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int = -1


@attrs.frozen(kw_only=True)
class BusSource:
    """A record of packed messages that was to be written; `instance_id`, `partition` and `sequence` name it."""

    topic: str
    partition: int
    instance_id: bytes
    sequence: int
    messages: int = 0
    """How many messages are in it."""


Source: TypeAlias = MqttSource | KafkaSource | BusSource


@attrs.frozen(kw_only=True)
class LostRecord:
    """A Kafka record as it should have been written, or as it was read."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None
    """None: the partition of the key."""
    timestamp_ms: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the record's contents."""
        size = len(self.key or b"") + len(self.value or b"")
        return size + sum(len(name) + len(value) for name, value in self.headers)


@attrs.frozen(kw_only=True)
class DeadLetter:
    """One dead letter."""

    id: str
    """64 hexadecimal digits; the same whenever the same thing fails again (see `letter_id`)."""
    dead_at_ms: int
    """UTC milliseconds since the epoch."""
    broker_id: str
    """`Node.Id` of the node that wrote the letter."""
    stage: Stage
    reason: Reason
    error: str
    source: Source
    size: int
    """Bytes of the MQTT payload, or of the value of the Kafka record that was read."""
    sha256: str
    """SHA-256 of the same, in hexadecimal digits."""
    target: str | None = None
    """The Kafka topic that the message was meant for; None: it was read."""
    record: LostRecord | None = None
    """None: too large, not wanted here, or it could not even be made."""
    payload: bytes | None = None
    """The payload where there is no record to hold it; None as above."""
    redrivable: bool = False
    """Writing `record` again makes sense: not so where newer records have taken its place."""

    def without_contents(self) -> DeadLetter:
        """Return the facts alone."""
        return attrs.evolve(self, record=None, payload=None, redrivable=False)


def letter_id(*parts: bytes) -> str:
    """Return the id for what `parts` name; equal parts, equal id."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack(">I", len(part)))
        digest.update(part)
    return digest.hexdigest()


def id_of_message(message: Message, broker_id: str, target: str, occurrence: int = 0) -> str:
    """Return the id of a letter about `message` on its way to the topic `target`.

    `occurrence` tells messages apart that are alike in all else: 0 for the first of them.
    """
    return letter_id(
        b"mqtt",
        broker_id.encode(),
        target.encode(),
        message.topic_name.encode(),
        message.client_id.encode(),
        struct.pack(">dB?Q", message.published_at, message.qos, message.retain, occurrence),
        hashlib.sha256(message.payload).digest(),
    )


def id_of_consumed(source: KafkaSource, value: bytes | None) -> str:
    """Return the id of a letter about a record that was read: all nodes that read it agree on it.

    The value is in it because a topic that was deleted and created again begins at offset 0 again.
    """
    place = struct.pack(">iqq", source.partition, source.offset, source.timestamp_ms)
    return letter_id(b"kafka", source.topic.encode(), place, hashlib.sha256(value or b"").digest())


def id_of_bus_record(source: BusSource) -> str:
    """Return the id of a letter about a record that could not be written to the bus."""
    place = struct.pack(">iQ", source.partition, source.sequence)
    return letter_id(b"bus", source.topic.encode(), source.instance_id, place)


# --- writing


def data(raw: bytes | None) -> dict[str, str] | None:
    """Return bytes as JSON has them: text where they are UTF-8, else base64."""
    if raw is None:
        return None
    try:
        return {"text": raw.decode()}
    except UnicodeDecodeError:
        return {"base64": b64encode(raw).decode()}


def encode_letter(letter: DeadLetter) -> bytes:
    """Return the value of the record of `letter`."""
    payload: dict[str, Any] = {"size": letter.size, "sha256": letter.sha256}
    if letter.payload is not None:
        payload["data"] = data(letter.payload)
    value: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "id": letter.id,
        "timestamp": iso_time(letter.dead_at_ms),
        "brokerId": letter.broker_id,
        "stage": letter.stage,
        "reason": letter.reason,
        "error": clean_text(letter.error),
        "source": encode_source(letter.source),
        "payload": payload,
        "redrivable": letter.redrivable,
    }
    if letter.target is not None:
        value["target"] = letter.target
    if (record := letter.record) is not None:
        value["record"] = {
            "topic": record.topic,
            "partition": record.partition,
            "timestamp": record.timestamp_ms,
            "key": data(record.key),
            "value": data(record.value),
            "headers": [[name, data(raw)] for name, raw in record.headers],
        }
    return orjson.dumps(value)


def encode_source(source: Source) -> dict[str, Any]:
    """Return the `source` of a letter's value."""
    if isinstance(source, MqttSource):
        return {
            "type": "mqtt",
            "topic": source.topic,
            "clientId": source.client_id,
            "publishedAt": iso_time(round(source.published_at * 1000)),
            "qos": source.qos,
            "retained": source.retain,
        }
    if isinstance(source, KafkaSource):
        return {
            "type": "kafka",
            "topic": source.topic,
            "partition": source.partition,
            "offset": source.offset,
            "timestamp": source.timestamp_ms,
        }
    return {
        "type": "bus",
        "topic": source.topic,
        "partition": source.partition,
        "instanceId": source.instance_id.hex(),
        "sequence": source.sequence,
        "messages": source.messages,
    }


def letter_headers(letter: DeadLetter) -> Sequence[tuple[str, bytes]]:
    """Return the headers of the record of `letter`."""
    headers = [
        (VERSION_HEADER, b"%d" % FORMAT_VERSION),
        (ID_HEADER, letter.id.encode()),
        (STAGE_HEADER, letter.stage.encode()),
        (REASON_HEADER, letter.reason.encode()),
        (BROKER_HEADER, letter.broker_id.encode()),
    ]
    if isinstance(source := letter.source, MqttSource):
        for name, text in ((TOPIC_HEADER, source.topic), (CLIENT_HEADER, source.client_id)):
            if len(raw := text.encode()) <= LONGEST_HEADER:
                headers.append((name, raw))
    return headers


def iso_time(milliseconds: int) -> str:
    """Return a time as ISO 8601 in UTC; what no calendar shows becomes its nearest day."""
    return iso_timestamp(min(max(milliseconds, 0), LATEST_MS))


def clean_text(text: str) -> str:
    """Return an error's text as one bounded line that JSON can hold."""
    line = " ".join(text.encode(errors="backslashreplace").decode().split())
    return line if len(line) <= LONGEST_ERROR else line[: LONGEST_ERROR - 1] + "…"
