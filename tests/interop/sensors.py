"""Sensor values for stream processors, and what has to come out of them [K15], computed without any library."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from typing import Any, Final

import attrs
from kafka import KafkaProducer

from gateways.kafka.admin import Admin
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.options import KafkaOptions
from gateways.kafka.topic_plan import TopicPlan
from gateways.kafka.topics import survey
from mqtt_trio.gateway import Message

WINDOW_MS: Final = 5 * 60 * 1000
LASTS: Final = 17 * 60
"""Seconds from the first value to the last one."""
SKIPPED: Final = (b"on", b"", b"\xff\xfe", b'{"value": 1}', b"nan", b"0x10", b"1_000", b"Infinity", b"1d")
"""Payloads that are no numbers."""
Window = tuple[str, int]
"""MQTT topic and start, milliseconds since the epoch."""


@attrs.frozen
class Aggregate:
    """What a window comes to."""

    count: int
    avg: float
    min: float
    max: float


@attrs.define
class Readings:
    """Messages on an archive topic."""

    messages: list[Message] = attrs.field(factory=list)
    closing: list[Message] = attrs.field(factory=list)
    """Much later ones of the same topics: windows before them are over."""

    def aggregates(self) -> dict[Window, Aggregate]:
        """Return what all windows come to that are over."""
        values: dict[Window, list[float]] = {}
        for message in self.messages:
            if (value := number_of(message)) is not None:
                at = round(message.published_at * 1000)
                values.setdefault((message.topic_name, at - at % WINDOW_MS), []).append(value)
        return {w: Aggregate(len(v), round(sum(v) / len(v), 9), min(v), max(v)) for w, v in values.items()}

    def anomalies(self) -> list[tuple[str, float, int]]:
        """Return topic, value and time of what is out of range."""
        return sorted(
            (message.topic_name, value, round(message.published_at * 1000))
            for message in self.messages
            if (value := number_of(message)) is not None and not 0 <= value <= 100
        )


def number_of(message: Message) -> float | None:
    """Return a sensor's value."""
    if not message.topic_name.startswith("sensors/") or message.payload in SKIPPED:
        return None
    return float(message.payload)


def make_readings(sensors: int = 8, count: int = 600) -> Readings:
    """Make values of some sensors, and what lies between such values."""
    rng = random.Random(5)
    start = round(time.time()) - 3600
    readings = Readings()
    for number in range(count):
        topic = f"sensors/room-{rng.randrange(sensors)}/temperature"
        value = rng.choice([rng.uniform(0, 100), rng.uniform(-20, 120), 100, 0])
        payload = f"{value:.3f}".encode()
        kind = rng.random()
        if kind < 0.1:
            payload = rng.choice(SKIPPED)
        elif kind < 0.2:
            topic = "other/topic"
        at = start + number * LASTS / count
        readings.messages.append(Message(topic, payload, 1, client_id="device", published_at=round(at, 3)))
    names = sorted({message.topic_name for message in readings.messages if message.topic_name.startswith("sensors/")})
    readings.closing = [Message(name, b"50", 1, client_id="device", published_at=start + 3000) for name in names]
    return readings


def write(servers: str, topic: str, messages: Sequence[Message], *garbage: bytes) -> None:
    """Write them as our archive does; make the topic where it is missing."""
    assert survey(lambda: Admin(KafkaOptions(servers=servers)), [TopicPlan(name=topic, partitions=4)]).refused == {}
    mapper = JsonMapper(topic, "node-1")
    producer = KafkaProducer(bootstrap_servers=servers)
    for value in garbage:
        producer.send(topic, value, b"garbage")
    for record in map(mapper.record, messages):
        headers = list(record.headers)
        producer.send(topic, record.value, record.key, headers, timestamp_ms=record.timestamp_ms)
    producer.flush(60)
    producer.close()


def aggregates_of(records: Sequence[Any]) -> dict[Window, Aggregate]:
    """Return the last that records say of each window."""
    found: dict[Window, Aggregate] = {}
    for record in records:
        value = json.loads(record.value)
        assert record.key.decode() == value["topic"]
        assert value["windowEnd"] - value["windowStart"] == WINDOW_MS
        numbers = value["count"], round(value["avg"], 9), value["min"], value["max"]
        found[value["topic"], value["windowStart"]] = Aggregate(*numbers)
    return found


def anomalies_of(records: Sequence[Any]) -> list[tuple[str, float, int]]:
    """Return what records say of values out of range."""
    values = [json.loads(record.value) for record in records]
    return sorted((value["topic"], value["value"], value["timestamp"]) for value in values)
