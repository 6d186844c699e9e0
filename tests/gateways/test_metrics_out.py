"""The figures of a node, in mqtt.metrics [K12, K17]: on the fake clock, with a producer in memory."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import attrs
import pytest
import trio
from jsonschema import Draft202012Validator, ValidationError
from trio.testing import MockClock

from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.cluster import Cluster
from gateways.kafka.meanings import MEANINGS
from gateways.kafka.metrics_out import MetricsOut
from gateways.kafka.options import KafkaOptions, MetricsOptions, TopicOptions, TopicsOptions
from gateways.kafka.records import Record
from gateways.kafka.schema_files import load_schema
from mqtt_trio.errors import GatewayError
from mqtt_trio.gateway import Figure
from tests.gateways.memory_bus import FakeHost
from tests.record_check.watch import check

VALIDATOR = Draft202012Validator(load_schema("mqtt_metrics.schema.json"))
STARTED = 1_764_230_400.0
"""2025-11-27T08:00:00Z"""
OPTIONS = KafkaOptions(
    metrics=MetricsOptions(enabled=True, interval=10.0, reporters=["kafka"]),
    topics=TopicsOptions(metrics=TopicOptions(name="figures")),
)


@attrs.define
class FakeProducer:
    """Confirms at once, or, while `away`, when it is told to."""

    records: list[Record] = attrs.Factory(list)
    away: bool = False
    stopped: bool = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def offer(self, record: Record) -> None:
        check("metrics", record, record.partition)
        self.records.append(record)
        if not self.away:
            self.settle()

    def settle(self, error: Exception | None = None) -> None:
        done, self.records[-1].done = self.records[-1].done, None
        assert done is not None, "an outcome came twice"
        done(error)

    async def stop(self) -> None:
        await trio.lowlevel.checkpoint()
        self.stopped = True

    def counters(self) -> dict[str, int]:
        return {}


class Host(FakeHost):
    """Has figures of each kind; the number of looks at them is one."""

    looks = 0
    broken = False

    def figures(self) -> Iterator[Figure]:
        self.looks += 1
        yield Figure("mqtt_trio_looks_total", "Looks.", self.looks, kind="counter")
        labels = {"client": "bus-reader", "topic": "monster", "partition": "3"}
        yield Figure("mqtt_trio_kafka_records_lag", "Lag.", 7, labels)
        yield Figure("mqtt_trio_ratio", "No number in JSON.", math.nan)
        if self.broken:
            raise ValueError("planned")


@attrs.define
class World:
    cluster: Cluster
    host: Host
    producer: FakeProducer
    out: MetricsOut
    nursery: trio.Nursery

    @property
    def values(self) -> list[dict[str, Any]]:
        found = []
        for record in self.producer.records:
            found.append(json.loads(record.value or b""))
            VALIDATOR.validate(found[-1])
            assert (record.topic, record.key) == ("figures", b"node-1")
        return found

    @property
    def looks(self) -> list[int]:
        """Which looks at the figures were written."""
        return [value["counters"][0]["value"] for value in self.values]

    @property
    def counted(self) -> tuple[int, int]:
        counters = self.out.counters()
        assert counters.keys() <= MEANINGS.keys()
        return counters["metrics_written"], counters["metrics_left_out"]


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    cluster, producer, host = Cluster(["k"]), FakeProducer(), Host("node-1", bytes(16))
    began = trio.current_time()
    out = MetricsOut(
        OPTIONS,
        cluster,
        host,
        utc=lambda: STARTED + trio.current_time() - began,
        producer=cast(ProducerBridge, producer),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(out.run)
        yield World(cluster, host, producer, out, nursery)
        nursery.cancel_scope.cancel()


async def test_a_record_per_interval(autojump_clock: MockClock) -> None:
    async with world() as w:
        await trio.sleep(9.9)
        assert w.values == []
        await trio.sleep(25)
        assert [value["timestamp"] for value in w.values] == [
            "2025-11-27T08:00:10.000Z",
            "2025-11-27T08:00:20.000Z",
            "2025-11-27T08:00:30.000Z",
        ]
        assert w.values[1] == {
            "timestamp": "2025-11-27T08:00:20.000Z",
            "brokerId": "node-1",
            "interval": 10.0,
            "counters": [{"name": "mqtt_trio_looks_total", "labels": {}, "value": 2}],
            "gauges": [
                {
                    "name": "mqtt_trio_kafka_records_lag",
                    "labels": {"client": "bus-reader", "topic": "monster", "partition": "3"},
                    "value": 7,
                }
            ],
        }
        assert w.counted == (3, 0)


async def test_while_kafka_is_away_only_the_newest_waits(autojump_clock: MockClock) -> None:
    async with world() as w:
        w.producer.away = True
        await trio.sleep(55)
        assert (w.looks, w.counted) == ([1], (0, 3))
        w.producer.away = False
        w.producer.settle()
        assert (w.looks, w.counted) == ([1, 5], (2, 3))
        await trio.sleep(10)
        assert (w.looks, w.counted) == ([1, 5, 6], (3, 3))


async def test_what_kafka_refuses_is_counted_and_told_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with world() as w:
        w.producer.away = True
        for _ in range(3):
            await trio.sleep(10)
            await trio.testing.wait_all_tasks_blocked()
            w.producer.settle(GatewayError("too\nlarge", retriable=False))
        assert (w.looks, w.counted) == ([1, 2, 3], (0, 3))
        assert caplog.messages == ["Kafka did not take a record for figures: too large"]


async def test_a_wrong_figure_ends_nothing(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with world() as w:
        w.host.broken = True
        await trio.sleep(15)
        w.host.broken = False
        await trio.sleep(10)
        assert (w.looks, w.counted) == ([2], (1, 1))
        assert caplog.messages == ["the record for figures could not be made"]


async def test_intervals_that_went_by_are_not_made_up_for(mock_clock: MockClock) -> None:
    async with world() as w:
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(47)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(0)
        await trio.testing.wait_all_tasks_blocked()
        assert len(w.looks) <= 2
        before = len(w.looks)
        mock_clock.jump(10)
        await trio.testing.wait_all_tasks_blocked()
        assert len(w.looks) == before + 1


@pytest.mark.parametrize("away", [False, True])
async def test_a_stop_waits_for_nobody_who_is_away(autojump_clock: MockClock, away: bool) -> None:
    async with world() as w:
        w.producer.away = True
        await trio.sleep(25)
        if away:
            w.cluster.away("bus", "planned")
        await w.out.stop()
        assert w.producer.stopped is not away
        w.producer.settle(GatewayError("closed", retriable=True) if away else None)
        assert w.counted == ((0, 2) if away else (1, 1))
        await trio.sleep(30)
        assert w.looks == [1]


async def test_cancelled_it_writes_no_more(autojump_clock: MockClock) -> None:
    async with world() as w:
        await trio.sleep(15)
        w.nursery.cancel_scope.cancel()
    assert w.counted == (1, 0)
    await trio.sleep(60)
    assert w.host.looks == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"counters": [{"name": "n", "labels": {}, "value": -1}]},
        {"gauges": [{"name": "n", "labels": {}, "value": None}]},
        {"gauges": [{"name": "n", "labels": {"partition": 3}, "value": 1}]},
        {"interval": 0},
        {"timestamp": "2025-11-27T08:00:10Z"},
    ],
)
def test_the_schema_tells_what_is_wrong(wrong: dict[str, Any]) -> None:
    fine = {"timestamp": "2025-11-27T08:00:10.000Z", "brokerId": "n", "interval": 1.5, "counters": [], "gauges": []}
    VALIDATOR.validate(fine)
    with pytest.raises(ValidationError):
        VALIDATOR.validate(fine | wrong)
