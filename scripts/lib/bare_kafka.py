"""What kafka-python alone can do: a loop that does for each record what an archive group in Kafka has to do.

    bare_kafka.py SERVERS TOPIC SECONDS PAYLOAD_BYTES

Prints JSON: records that Kafka confirmed per second, and CPU of this process per record in microseconds. The record is
made by the gateway's own encoder (JSON value, headers, key), goes to an explicit partition with a callback, every
twentieth is followed by the same invitation to other threads, and as many may be unconfirmed as the gateway allows. The
producer's options are the gateway's; everything else is kafka-python as its documentation shows it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, Final

from kafka import KafkaProducer

from gateways.kafka.mapping import JsonMapper
from gateways.kafka.partitions import partition_for
from mqtt_trio.broker.message import Message

WINDOW: Final = 20_000
YIELD_EVERY: Final = 20
PUBLISHERS: Final = 20
WARM_UP: Final = 1.0
"""Seconds before the measurement."""
OPTIONS: Final[dict[str, Any]] = {
    "acks": "all",
    "linger_ms": 5,
    "batch_size": 256 * 1024,
    "max_request_size": 8 * 1024 * 1024,
    "compression_type": "gzip",
    "request_timeout_ms": 10_000,
    "delivery_timeout_ms": 60_000,
}


class Loop:
    """The loop and its counts."""

    def __init__(self, servers: str, topic: str, size: int) -> None:
        self.topic = topic
        self.confirmed = self.sent = 0
        self.failed: Exception | None = None
        self._producer = KafkaProducer(bootstrap_servers=servers, **OPTIONS)
        self._partitions = len(self._producer.partitions_for(topic))
        self._mapper = JsonMapper(topic, "bench")
        self._payload = b"x" * size
        self._room = threading.Event()

    def run(self, until: float) -> None:
        """Send until an instant of the monotonic clock."""
        topics = [f"bench/{number}" for number in range(PUBLISHERS)]
        while time.monotonic() < until:
            if self.failed is not None:
                raise self.failed
            if self.sent - self.confirmed >= WINDOW:
                self._room.clear()
                self._room.wait(0.01)
                continue
            for number in range(YIELD_EVERY):
                message = Message(topics[number % PUBLISHERS], self._payload, 1, False, client_id="bench")
                message.published_at = time.time()
                record = self._mapper.record(message)
                partition = partition_for(record.key or b"", self._partitions)
                future = self._producer.send(
                    self.topic, record.value, record.key, list(record.headers), partition, record.timestamp_ms
                )
                future.add_callback(self._confirm)
                future.add_errback(self._fail)
            self.sent += YIELD_EVERY
            time.sleep(0)

    def _confirm(self, _metadata: object) -> None:
        self.confirmed += 1
        if not self.confirmed % 1000:
            self._room.set()

    def _fail(self, error: Exception) -> None:
        self.failed = error


def main() -> None:
    """Measure and print."""
    servers, topic, seconds, size = sys.argv[1:]
    loop = Loop(servers, topic, int(size))
    loop.run(time.monotonic() + WARM_UP)
    began, cpu, confirmed = time.monotonic(), time.process_time(), loop.confirmed
    loop.run(began + float(seconds))
    count, elapsed = loop.confirmed - confirmed, time.monotonic() - began
    figures = {"records_per_s": count / elapsed, "cpu_us_per_record": (time.process_time() - cpu) / count * 1e6}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
