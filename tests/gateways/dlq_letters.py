"""Dead letters for tests."""

from __future__ import annotations

from typing import Any

import attrs

from gateways.kafka.dlq import (
    DeadLetter,
    KafkaSource,
    LostRecord,
    MqttSource,
    Stage,
    letter_id,
)
from gateways.kafka.dlq_writer import Pending
from gateways.kafka.records import Reason

T0 = 1_790_000_000_000
"""When the letters of these tests were written: UTC milliseconds."""


def letter(number: int, target: str = "archive", **changes: Any) -> DeadLetter:
    """A letter about message `number`, which can be redriven."""
    topic = f"sensors/{number % 3}"
    record = LostRecord(
        topic=target,
        key=topic.encode(),
        value=b'{"n":%d}' % number,
        headers=[("mqtt.qos", b"1")],
        timestamp_ms=T0 - 1000 + number,
    )
    made = DeadLetter(
        id=letter_id(b"test", target.encode(), b"%d" % number),
        dead_at_ms=T0 + number,
        broker_id="node-1",
        stage=Stage.ARCHIVE,
        reason=Reason.NO_TOPIC,
        error="no topic",
        source=MqttSource(topic=topic, client_id="c", published_at=T0 / 1000, qos=1),
        size=1,
        sha256="0" * 64,
        target=target,
        record=record,
        redrivable=True,
    )
    return attrs.evolve(made, **changes)


def consumed(number: int, source_topic: str = "monster") -> DeadLetter:
    """A letter about a record that was read."""
    source = KafkaSource(topic=source_topic, partition=0, offset=number)
    changes: dict[str, Any] = {"stage": Stage.CONSUME, "reason": Reason.MALFORMED, "source": source, "target": None}
    return attrs.evolve(letter(number), redrivable=False, **changes)


def pending(number: int, target: str = "archive") -> Pending:
    made = letter(number, target)
    assert made.record is not None
    return Pending(made, made.record)
