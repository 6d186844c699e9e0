"""MQTT messages as records [K8]: pure, no I/O. `schemas/mqtt_message.schema.json` describes a JSON value.

`avro` has the mapper of AVRO values, `reading` the way back.
"""

from __future__ import annotations

from base64 import b64encode
from functools import lru_cache
from time import gmtime, strftime
from typing import Any, Final, Literal

import orjson

from gateways.kafka.records import RECORD_OVERHEAD, Record
from mqtt_trio.gateway import Message

TimestampFormat = Literal["iso", "epoch_ms"]
HEADER_NAMES: Final = 40
"""Bytes of a header's name and framing, at most: `mqtt.userProperties.` in front of a name that the value holds."""
USER_PROPERTY: Final = "mqtt.userProperties."
"""How the header of a User Property begins; its name follows."""
QOS: Final = (b"0", b"1", b"2")
FLAG: Final = {False: b"false", True: b"true"}


@lru_cache(maxsize=16)
def iso_second(second: int) -> str:
    """Return a UTC second as `2024-01-15T10:30:00`."""
    return strftime("%Y-%m-%dT%H:%M:%S", gmtime(second))


def iso_timestamp(milliseconds: int) -> str:
    """Return UTC milliseconds since the epoch as `2024-01-15T10:30:00.000Z`."""
    second, rest = divmod(milliseconds, 1000)
    return f"{iso_second(second)}.{rest:03d}Z"


def text_or_base64(data: bytes) -> tuple[str, bool]:
    """Return `data` as text, or in base64 and True where it is no UTF-8."""
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return b64encode(data).decode(), True


def json_value(message: Message, broker_id: str, milliseconds: int, timestamps: TimestampFormat = "iso") -> bytes:
    """Return the value of the record of `message`; `milliseconds` is its publish time."""
    payload, encoded = text_or_base64(message.payload)
    value: dict[str, Any] = {
        "timestamp": iso_timestamp(milliseconds) if timestamps == "iso" else milliseconds,
        "topic": message.topic_name,
        "payload": payload,
    }
    if encoded:
        value["payloadEncoding"] = "base64"
    value["qos"] = message.qos
    value["retained"] = message.retain
    value["clientId"] = message.client_id
    value["brokerId"] = broker_id
    value["headers"] = json_headers(message)
    return orjson.dumps(value)


def json_headers(message: Message) -> dict[str, Any]:
    """Return what the `headers` of the value say about the message's properties."""
    properties = message.properties
    headers: dict[str, Any] = {}
    if properties.content_type is not None:
        headers["contentType"] = properties.content_type
    if properties.correlation_data is not None:
        text, encoded = text_or_base64(properties.correlation_data)
        headers["correlationId"] = text
        if encoded:
            headers["correlationIdEncoding"] = "base64"
    if properties.user_properties:
        headers["userProperties"] = [[name, value] for name, value in properties.user_properties]
    return headers


def record_headers(message: Message, broker_id: bytes, milliseconds: int) -> list[tuple[str, bytes]]:
    """Return the same facts as record headers, in the bytes that they had in MQTT."""
    headers = [
        ("mqtt.timestamp", b"%d" % milliseconds),
        ("mqtt.topic", message.topic_name.encode()),
        ("mqtt.qos", QOS[message.qos]),
        ("mqtt.retained", FLAG[message.retain]),
        ("mqtt.clientId", message.client_id.encode()),
        ("mqtt.brokerId", broker_id),
    ]
    properties = message.properties
    if properties.content_type is not None:
        headers.append(("mqtt.contentType", properties.content_type.encode()))
    if properties.correlation_data is not None:
        headers.append(("mqtt.correlationId", properties.correlation_data))
    if properties.response_topic is not None:
        headers.append(("mqtt.responseTopic", properties.response_topic.encode()))
    if properties.payload_format_indicator is not None:
        headers.append(("mqtt.payloadFormatIndicator", b"%d" % properties.payload_format_indicator))
    if properties.message_expiry_interval is not None:
        headers.append(("mqtt.messageExpiryInterval", b"%d" % properties.message_expiry_interval))
    for name, value in properties.user_properties:
        headers.append((USER_PROPERTY + name, value.encode()))
    return headers


class RecordMapper:
    """Makes records of messages for one Kafka topic: keyed by the MQTT topic, at the publish time, with the facts as
    headers. What a value holds is said by a subclass."""

    form = "JSON"
    """`Format` of the group."""
    is_ready = True
    """Records can be made; False: not yet."""
    repeats_headers = False
    """What the headers hold stands in the value as well, but for the Response Topic, and takes no less room there."""

    def __init__(self, topic: str, broker_id: str = "") -> None:
        self.topic = topic
        self.broker_id = broker_id
        """`Node.Id`; set before the first record."""
        self.mark: tuple[str, bytes] | None = None
        """A further header, the first one."""

    def value(self, message: Message, milliseconds: int) -> bytes:
        """Return the value of the record of `message`, which was published at `milliseconds`. Called in the feeder's
        thread; what it raises becomes a dead letter."""
        raise NotImplementedError

    def record(self, message: Message) -> Record:
        """Return the record of `message`."""
        record = MessageRecord(self, message)
        record.prepare()
        return record


class JsonMapper(RecordMapper):
    """JSON values."""

    repeats_headers = True

    def __init__(self, topic: str, broker_id: str = "", timestamps: TimestampFormat = "iso") -> None:
        super().__init__(topic, broker_id)
        self._timestamps: TimestampFormat = timestamps

    def value(self, message: Message, milliseconds: int) -> bytes:
        """Return the JSON text."""
        return json_value(message, self.broker_id, milliseconds, self._timestamps)


class RawMapper(RecordMapper):
    """The payload and nothing else; all the rest is in key and headers."""

    form = "RAW"

    def value(self, message: Message, milliseconds: int) -> bytes:
        """Return the payload; empty, it is no null, which would be a deletion in a compacted topic."""
        return message.payload


class MessageRecord(Record):
    """The record of one message, made in the feeder's thread: the Trio thread has better things to do."""

    watched = True

    def __init__(self, mapper: RecordMapper, message: Message) -> None:
        self.topic = mapper.topic
        self.message: Message = message
        self._mapper = mapper

    def prepare(self) -> None:
        """Make it of its message, unless that is done."""
        if self.value is not None:
            return
        message, mapper = self.message, self._mapper
        milliseconds = round(message.published_at * 1000)
        value = mapper.value(message, milliseconds)
        self.key = message.topic_name.encode()
        headers = record_headers(message, mapper.broker_id.encode(), milliseconds)
        if mapper.mark is not None:
            headers.insert(0, mapper.mark)
        self.headers = headers
        self.timestamp_ms = milliseconds
        self.value = value
        if mapper.repeats_headers:  # less exact than `measure`, and quicker
            self.size = RECORD_OVERHEAD + len(self.key) + 2 * len(value) + HEADER_NAMES * len(self.headers)
            if (response_topic := message.properties.response_topic) is not None:  # in a header alone
                self.size += len(response_topic.encode())
        else:
            self.size = self.measure()


class PatientRecord(MessageRecord):
    """The same of a group with a spool."""

    patient = True
