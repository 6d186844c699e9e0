"""Count, average, least and greatest value of each sensor in windows of five minutes, and values out of range [K15].

    pip install 'quixstreams>=3.28,<4'
    python examples/sensor_streams.py --servers localhost:9092 --from mqtt.archive

Reads a topic of MQTT messages in JSON and writes two others, each record keyed by its MQTT topic:

- `mqtt.aggregates`: topic, windowStart, windowEnd (milliseconds since the epoch), count, avg, min, max; one record for
  each window of a topic, when it is over.
- `mqtt.anomalies`: topic, value, timestamp; one record for each value above 100 or below 0.

Time is that of the records, which is when their messages were published. What is no number is skipped, and counted;
`counts` tells of it once a minute and at the end. Everything is done exactly once: killed and started again, the
program goes on where its last transaction ended, and whoever reads the results with `read_committed` sees them once.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import math
import re
import time
from collections import Counter
from datetime import timedelta
from typing import Any

from quixstreams import Application
from quixstreams.dataframe.windows import Count, Max, Mean, Min
from quixstreams.models import TopicConfig

PREFIX = "sensors/"
WINDOW = timedelta(minutes=5)
GRACE = timedelta(minutes=1)
"""How late a record may come behind later ones of its partition, to be counted in a window that has ended."""
LOW, HIGH = 0.0, 100.0
NUMBER = re.compile(r"\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
COUNTS_INTERVAL = 60.0
"""Seconds between two lines about what was skipped."""

log = logging.getLogger("sensor_streams")


def number_of(payload: str) -> float | None:
    """Return the number that a payload is; None: it is none."""
    if NUMBER.fullmatch(payload) is None or not math.isfinite(value := float(payload)):
        return None
    return value


def reading_of(value: bytes | None) -> tuple[dict[str, Any] | None, str]:
    """Return topic and value of a sensor's record; or None, and why it is left out."""
    try:
        message = json.loads(value or b"")
        topic, payload = message["topic"], message["payload"]
        if message.get("payloadEncoding") == "base64":
            payload = base64.b64decode(payload).decode()
        if not topic.startswith(PREFIX):
            return None, "other topics"
        number = number_of(payload)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "no message"
    return (None, "no number") if number is None else ({"topic": topic, "value": number}, "")


class Counts:
    """How many records were read, and why some were left out."""

    def __init__(self) -> None:
        self.counter: Counter[str] = Counter()
        self.told_at = time.monotonic()

    def read(self, value: bytes | None) -> dict[str, Any] | None:
        """Do what `reading_of` does, and count."""
        found, reason = reading_of(value)
        self.counter[reason or "readings"] += 1
        if time.monotonic() - self.told_at > COUNTS_INTERVAL:
            self.tell()
        return found

    def late(self, *_: Any, **_more: Any) -> bool:
        """Count a reading whose window is over already."""
        self.counter["late"] += 1
        return False  # quixstreams need not log each of them

    def tell(self) -> None:
        """Say how many there were."""
        self.told_at = time.monotonic()
        log.info("counts %s", json.dumps(dict(sorted(self.counter.items()))))


def with_window(value: dict[str, Any], key: str, _timestamp: int, _headers: object) -> dict[str, Any]:
    """Return a window's record under the names that it is written with."""
    found = {name: value[name] for name in ("count", "avg", "min", "max")}
    return {"topic": key, "windowStart": value["start"], "windowEnd": value["end"], **found}


def with_time(value: dict[str, Any], _key: str, timestamp: int, _headers: object) -> dict[str, Any]:
    """Return an anomaly's record."""
    return {**value, "timestamp": timestamp}


def build(app: Application, arguments: argparse.Namespace, counts: Counts) -> None:
    """Describe what becomes of the records."""
    results = TopicConfig(num_partitions=arguments.partitions, replication_factor=arguments.replication_factor)
    source = app.topic(arguments.source, key_deserializer="str", value_deserializer="bytes")
    aggregates = app.topic(arguments.aggregates, key_serializer="str", value_serializer="json", config=results)
    anomalies = app.topic(arguments.anomalies, key_serializer="str", value_serializer="json", config=results)

    readings = app.dataframe(source).apply(counts.read).filter(lambda reading: reading is not None)

    outside = readings.filter(lambda reading: reading["value"] > HIGH or reading["value"] < LOW)
    outside.apply(with_time, metadata=True).to_topic(anomalies)

    windows = readings.tumbling_window(WINDOW, grace_ms=GRACE, on_late=counts.late)
    aggregated = windows.agg(count=Count(), avg=Mean("value"), min=Min("value"), max=Max("value"))
    aggregated.final(closing_strategy="partition").apply(with_window, metadata=True).to_topic(aggregates)


def main() -> None:
    """Read the arguments and run until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Windows and anomalies of sensor values.")
    parser.add_argument("--servers", default="localhost:9092", help="host:port, several separated by commas")
    parser.add_argument("--from", dest="source", default="mqtt.archive", metavar="TOPIC")
    parser.add_argument("--aggregates", default="mqtt.aggregates", metavar="TOPIC")
    parser.add_argument("--anomalies", default="mqtt.anomalies", metavar="TOPIC")
    parser.add_argument("--group", default="sensor-streams", help="where it goes on; also names its topics of state")
    parser.add_argument("--state", default="sensor-streams-state", metavar="DIR", help="made again from Kafka if lost")
    parser.add_argument("--partitions", type=int, default=12, help="of the two topics, where they are not there yet")
    parser.add_argument("--replication-factor", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    counts = Counts()
    app = Application(
        arguments.servers,
        consumer_group=arguments.group,
        auto_offset_reset="earliest",
        state_dir=arguments.state,
        processing_guarantee="exactly-once",
        commit_interval=1.0,
        loglevel="WARNING",
    )
    build(app, arguments, counts)
    try:
        app.run()
    finally:
        counts.tell()


if __name__ == "__main__":
    main()
