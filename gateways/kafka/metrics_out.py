"""The figures of this node, one JSON record in mqtt.metrics per interval [K12, K17]; `schemas/mqtt_metrics.schema.json`
describes it.

They are those of /metrics. One record is on its way to Kafka and the newest waits behind it; what a newer one replaces
is left out and counted.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import orjson
import trio

from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.cluster import Cluster
from gateways.kafka.cluster_watch import stop_unless_away
from gateways.kafka.dlq import clean_text, iso_time
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import Record
from gateways.kafka.thread_counters import thread_counters
from gateways.kafka.topic_plan import DEFAULTS
from mqtt_trio.gateway import Figure, GatewayHost

log = logging.getLogger("gateways.kafka")

PRODUCER: Final = "metrics"
WINDOW_BYTES: Final = 8 * 1024 * 1024
"""Never reached: one record is handed over at a time."""


def sorted_by_kind(figures: Iterable[Figure]) -> dict[str, list[dict[str, Any]]]:
    """Return counters and gauges as they stand in a record; what is no number in JSON is left out."""
    found: dict[str, list[dict[str, Any]]] = {"counters": [], "gauges": []}
    for figure in figures:
        if math.isfinite(figure.value):
            one = {"name": figure.name, "labels": dict(figure.labels), "value": figure.value}
            found[f"{figure.kind}s"].append(one)
    return found


class MetricsOut:
    """Writes the figures of one node. Trio thread only."""

    def __init__(
        self,
        options: KafkaOptions,
        cluster: Cluster,
        host: GatewayHost,
        *,
        utc: Callable[[], float] = time.time,
        producer: ProducerBridge | None = None,
    ) -> None:
        """`utc`: seconds since the epoch; `producer` is for tests."""
        self.topic = options.topics.metrics.name or DEFAULTS["metrics"].name
        self.interval = options.metrics.interval
        self.written = self.left_out = 0
        self._cluster = cluster
        self._host = host
        self._utc = utc
        self._newest: Record | None = None
        self._on_its_way = self._stopping = False
        self._told = ""
        self._producer = producer or ProducerBridge(
            options,
            cluster,
            name=PRODUCER,
            compression="gzip",
            window_records=1,
            window_bytes=WINDOW_BYTES,
            lazy=True,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write a record per interval until cancelled, the first one after an interval; `started()` at once. After a
        pause of the loop, intervals that went by are not made up for."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._producer.run)
            task_status.started()
            due = trio.current_time()
            while True:
                due = max(due + self.interval, trio.current_time())
                await trio.sleep_until(due)
                self._write()

    def _write(self) -> None:
        if self._stopping:
            return
        try:
            record = self._make_record()
        except Exception:  # a wrong figure is no reason to end the node
            self.left_out += 1
            log.exception("the record for %s could not be made", self.topic)
            return
        if self._newest is not None:
            self.left_out += 1
        self._newest = record
        self._offer()

    def _make_record(self) -> Record:
        milliseconds = round(self._utc() * 1000)
        head = {"timestamp": iso_time(milliseconds), "brokerId": self._host.node_id, "interval": self.interval}
        value = orjson.dumps(head | sorted_by_kind(self._host.figures()))
        return Record(self.topic, None, self._host.node_id.encode(), value, (), milliseconds, self._done, messages=0)

    def _offer(self) -> None:
        if self._newest is not None and not self._on_its_way:
            record, self._newest, self._on_its_way = self._newest, None, True
            self._producer.offer(record)

    def _done(self, error: Exception | None) -> None:
        self._on_its_way = False
        if error is None:
            self.written += 1
            self._told = ""
        else:
            self.left_out += 1
            if not self._stopping and (text := clean_text(str(error))) != self._told:
                self._told = text
                log.warning("Kafka did not take a record for %s: %s", self.topic, text)
        self._offer()

    async def stop(self) -> None:
        """Ship what is on its way, close. Bounded by the caller's cancel scope; while Kafka is away nobody waits."""
        self._stopping = True
        if self._newest is not None:
            self._newest = None
            self.left_out += 1
        await stop_unless_away(self._cluster, self._producer)

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "metrics_written": self.written,
            "metrics_left_out": self.left_out,
            **thread_counters("metrics_producer", self._producer.counters()),
        }
