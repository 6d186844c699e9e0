"""Reading dead letters: what `dlq list` and `dlq redrive` do with a record of mqtt.dlq. Pure, no I/O.

Anybody may write to a Kafka topic, so everything is looked at before it is believed. Keys that this version does not
know are ignored.
"""

from __future__ import annotations

import binascii
import datetime
import re
from base64 import b64decode
from typing import Any, Final

import orjson

from gateways.kafka.dlq import (
    FORMAT_VERSION,
    BusSource,
    DeadLetter,
    KafkaSource,
    LostRecord,
    MqttSource,
    Source,
    Stage,
)
from gateways.kafka.records import Reason
from mqtt_trio.errors import MqttTrioError

HEX_256: Final = re.compile(r"[0-9a-f]{64}")
HEX_128: Final = re.compile(r"[0-9a-f]{32}")
TOPIC: Final = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")
LARGEST: Final = 2**63 - 1


class DeadLetterError(MqttTrioError):
    """These bytes are no dead letter that this version can read."""


def decode_letter(value: bytes | None) -> DeadLetter:
    """Read the value of a record of mqtt.dlq.

    Raises:
      DeadLetterError: it is no dead letter, or one of a later version.
    """
    try:
        table = _table(orjson.loads(value or b""), "the value")
    except orjson.JSONDecodeError as exc:
        raise DeadLetterError(f"no JSON: {exc}") from None
    version = _number(table, "version", least=1)
    if version != FORMAT_VERSION:
        raise DeadLetterError(f"a dead letter of format version {version}, this version reads {FORMAT_VERSION}")
    payload = _table(table.get("payload"), "payload")
    record = table.get("record")
    try:
        stage, reason = Stage(_text(table, "stage")), Reason(_text(table, "reason"))
    except ValueError as exc:
        raise DeadLetterError(str(exc)) from None
    return DeadLetter(
        id=_matching(table, "id", HEX_256),
        dead_at_ms=_milliseconds(table, "timestamp"),
        broker_id=_text(table, "brokerId"),
        stage=stage,
        reason=reason,
        error=_text(table, "error"),
        source=_source(_table(table.get("source"), "source")),
        size=_number(payload, "size"),
        sha256=_matching(payload, "sha256", HEX_256),
        target=_matching(table, "target", TOPIC) if table.get("target") is not None else None,
        record=None if record is None else _record(_table(record, "record")),
        payload=_data(payload.get("data"), "payload.data"),
        redrivable=_flag(table, "redrivable"),
    )


def _source(table: dict[str, Any]) -> Source:
    kind = _text(table, "type")
    if kind == "mqtt":
        return MqttSource(
            topic=_text(table, "topic"),
            client_id=_text(table, "clientId"),
            published_at=_milliseconds(table, "publishedAt") / 1000,
            qos=_number(table, "qos", most=2),
            retain=_flag(table, "retained"),
        )
    topic, partition = _matching(table, "topic", TOPIC), _number(table, "partition", most=2**31 - 1)
    if kind == "kafka":
        return KafkaSource(
            topic=topic,
            partition=partition,
            offset=_number(table, "offset"),
            timestamp_ms=_number(table, "timestamp", least=-LARGEST),
        )
    if kind == "bus":
        return BusSource(
            topic=topic,
            partition=partition,
            instance_id=bytes.fromhex(_matching(table, "instanceId", HEX_128)),
            sequence=_number(table, "sequence"),
            messages=_number(table, "messages"),
        )
    raise DeadLetterError(f"source.type {kind[:40]!r} is unknown")


def _record(table: dict[str, Any]) -> LostRecord:
    headers = table.get("headers", [])
    if not isinstance(headers, list):
        raise DeadLetterError("record.headers is no list")
    pairs: list[tuple[str, bytes]] = []
    for pair in headers:
        match pair:
            case [str(name), content] if (raw := _data(content, "record.headers")) is not None:
                pairs.append((name, raw))
            case _:
                raise DeadLetterError("record.headers holds something else than pairs of a name and data")
    return LostRecord(
        topic=_matching(table, "topic", TOPIC),
        partition=None if table.get("partition") is None else _number(table, "partition", most=2**31 - 1),
        timestamp_ms=None if table.get("timestamp") is None else _number(table, "timestamp", least=-LARGEST),
        key=_data(table.get("key"), "record.key"),
        value=_data(table.get("value"), "record.value"),
        headers=pairs,
    )


def _data(content: object, name: str) -> bytes | None:
    match content:
        case None:
            return None
        case {"text": str(text)}:
            return text.encode()
        case {"base64": str(text)}:
            try:
                return b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise DeadLetterError(f"{name} is no base64") from None
    raise DeadLetterError(f"{name} is neither text nor base64")


def _table(content: object, name: str) -> dict[str, Any]:
    if isinstance(content, dict):
        return content
    raise DeadLetterError(f"{name} is no JSON object")


def _text(table: dict[str, Any], name: str) -> str:
    if isinstance(content := table.get(name), str):
        return content
    raise DeadLetterError(f"{name} is no text")


def _matching(table: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    if pattern.fullmatch(text := _text(table, name)):
        return text
    raise DeadLetterError(f"{name} is not what it should be: {text[:80]!r}")


def _number(table: dict[str, Any], name: str, *, least: int = 0, most: int = LARGEST) -> int:
    content = table.get(name)
    if isinstance(content, int) and not isinstance(content, bool) and least <= content <= most:
        return content
    raise DeadLetterError(f"{name} is no number from {least} to {most}")


def _flag(table: dict[str, Any], name: str) -> bool:
    if isinstance(content := table.get(name), bool):
        return content
    raise DeadLetterError(f"{name} is neither true nor false")


def _milliseconds(table: dict[str, Any], name: str) -> int:
    text = _text(table, name)
    try:
        moment = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.UTC)
    except ValueError:
        raise DeadLetterError(f"{name} is no time: {text[:40]!r}") from None
    return round(moment.timestamp() * 1000)
