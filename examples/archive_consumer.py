"""Read archived MQTT messages with kafka-python alone: no Trio, no mqtt_trio.

    pip install 'kafka-python[crc32c]>=3.0.12,<3.1' lz4
    python examples/archive_consumer.py --servers localhost:9092 --topic mqtt.archive --group my-program

Each message is printed as a line of JSON. The offset behind it is stored after it was printed, so that a program that
is killed repeats a message and never loses one. SIGTERM and Ctrl-C end it in order.
"""

from __future__ import annotations

import argparse
import base64
import json
import signal
import sys
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.structs import OffsetAndMetadata


def message_of(value: bytes) -> dict[str, Any]:
    """Return a record's value with the payload as bytes; raises ValueError where it holds no message."""
    message = json.loads(value)
    if not isinstance(message, dict) or not isinstance(message.get("payload"), str):
        raise ValueError("no object with a payload")  # noqa: TRY004
    payload = message["payload"]
    is_text = message.get("payloadEncoding") is None
    message["payload"] = payload.encode() if is_text else base64.b64decode(payload)
    return message


def process(message: dict[str, Any]) -> None:
    """What your program does with a message."""
    shown = {**message, "payload": message["payload"].decode(errors="backslashreplace")}
    print(json.dumps(shown), flush=True)


class Stop:
    """Whether somebody wants the program to end."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, *_: object) -> None:
        """End behind the record in hand."""
        self._asked = True

    def wanted(self) -> bool:
        """Return whether somebody asked."""
        return self._asked


def run(consumer: KafkaConsumer, stop: Stop) -> None:
    """Process, then store, one record after the other."""
    while not stop.wanted():
        for partition, records in consumer.poll(timeout_ms=500).items():
            for record in records:
                if stop.wanted():
                    return
                try:
                    message = message_of(record.value or b"")
                except ValueError as exc:
                    where = f"{record.topic}-{record.partition}@{record.offset}"
                    print(f"{where} holds no message and is skipped: {exc}", file=sys.stderr)
                else:
                    process(message)
                store(consumer, partition, record.offset + 1)


def store(consumer: KafkaConsumer, partition: TopicPartition, offset: int) -> None:
    """Store where to go on."""
    consumer.commit({partition: OffsetAndMetadata(offset, "", -1)}, timeout_ms=10_000)


def main() -> None:
    """Read the arguments, then the topic."""
    parser = argparse.ArgumentParser(description="Print archived MQTT messages, at least once.")
    parser.add_argument("--servers", default="localhost:9092", help="host:port, several separated by commas")
    parser.add_argument("--topic", default="mqtt.archive")
    parser.add_argument("--group", required=True, help="where offsets are stored; members of a group share the work")
    arguments = parser.parse_args()
    stop = Stop()
    with KafkaConsumer(
        arguments.topic,
        bootstrap_servers=arguments.servers.split(","),
        group_id=arguments.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    ) as consumer:
        run(consumer, stop)


if __name__ == "__main__":
    main()
