"""Messages out of an archive topic, as other programs get them [K14]: pure, no I/O."""

from __future__ import annotations

from typing import Final

import attrs

from gateways.kafka.reading import Archived
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.gateway import NO_PROPERTIES, MessageProperties

FORMATS: Final = ("JSON", "AVRO", "RAW")


@attrs.frozen(kw_only=True)
class Coordinates:
    """Where a record is in Kafka."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    """The record's time, UTC milliseconds since the epoch."""


@attrs.frozen(kw_only=True)
class ArchivedMessage:
    """One MQTT message out of an archive topic."""

    topic_name: str
    payload: bytes
    """As it was published: bytes, not text."""
    qos: int = 0
    retain: bool = False
    """The RETAIN flag as its publisher set it."""
    client_id: str = ""
    """Client Identifier of the publisher; empty where the record does not say."""
    broker_id: str = ""
    """`Node.Id` of the broker that the message was published to; empty where the record does not say."""
    published_at: float
    """UTC seconds since the epoch, with milliseconds; the record's time where it does not say."""
    properties: MessageProperties = NO_PROPERTIES
    kafka: Coordinates


def archived_message(archived: Archived, record: ConsumedRecord) -> ArchivedMessage:
    """Return what `record`, which says `archived`, is for other programs."""
    message = archived.message
    return ArchivedMessage(
        topic_name=message.topic_name,
        payload=message.payload,
        qos=message.qos,
        retain=message.retain,
        client_id=message.client_id,
        broker_id=archived.broker_id,
        published_at=message.published_at,
        properties=message.properties,
        kafka=Coordinates(
            topic=record.topic, partition=record.partition, offset=record.offset, timestamp_ms=record.timestamp_ms
        ),
    )
