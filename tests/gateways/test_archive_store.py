"""Archive groups that share a producer whose Kafka is in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from gateways.kafka.archive import PART_RECORDS, KafkaArchiveStore
from gateways.kafka.cluster import TopicFacts
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.records import Reason
from mqtt_trio.gateway import Message, Outcome
from tests.gateway_support import LIMIT
from tests.gateways.memory_kafka import FakeKafka, Setup, producing

WINDOW = 10


@asynccontextmanager
async def two_stores(kafka: FakeKafka, *, spooled: bool) -> AsyncIterator[tuple[Setup, list[KafkaArchiveStore]]]:
    """Stores of the topics `closed`, which may not be written to, and `open`."""
    async with producing(kafka, window=WINDOW, timeout_ms=60_000) as setup, trio.open_nursery() as nursery:
        setup.cluster.know("open", TopicFacts(partitions=1))
        setup.cluster.cannot("closed", Reason.DENIED, "no right to write")
        stores = [KafkaArchiveStore(setup.bridge, JsonMapper(name), spooled=spooled) for name in ("closed", "open")]
        for store in stores:
            await nursery.start(store.run)
        yield setup, stores
        nursery.cancel_scope.cancel()


def payloads(kafka: FakeKafka, topic: str) -> list[int]:
    return [int(json.loads(record.value or b"")["payload"]) for record in kafka.log if record.topic == topic]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await trio.sleep(0.005)


@pytest.mark.parametrize("rounds", [1, 3])
async def test_what_waits_for_its_topic_takes_no_room_from_others(rounds: int) -> None:
    kafka = FakeKafka()
    closed_outcomes: list[Outcome] = []
    open_outcomes: list[Outcome] = []
    async with two_stores(kafka, spooled=True) as (setup, (closed, other)):
        for number in range(rounds):
            batch = [Message("a", b"%d" % n) for n in range(20 * number, 20 * number + 20)]
            closed.submit(batch, closed_outcomes.append)
        other.submit([Message("b", b"%d" % n) for n in range(30)], open_outcomes.append)
        await until(lambda: len(open_outcomes) == 1)
        assert open_outcomes == [{}]
        assert closed_outcomes == []
        assert payloads(kafka, "open") == list(range(30))
        setup.cluster.know("closed", TopicFacts(partitions=1))
        await until(lambda: len(closed_outcomes) == rounds)
        assert closed_outcomes == [{}] * rounds
        assert payloads(kafka, "closed") == list(range(20 * rounds))
        assert (setup.bridge.outstanding_records, setup.bridge.outstanding_bytes) == (0, 0)
        assert not setup.bridge.full


@pytest.mark.parametrize("count, size", [(4 * PART_RECORDS, 0), (PART_RECORDS, 4000)], ids=["records", "bytes"])
async def test_a_batch_that_is_larger_than_the_window_goes_through_it_in_parts(count: int, size: int) -> None:
    """WindowMessages and WindowBytes of [Kafka] bound what Kafka has not confirmed, not what a group may ship."""
    kafka = FakeKafka()
    outcomes: list[Outcome] = []
    async with producing(kafka, window=WINDOW if not size else 100_000) as setup, trio.open_nursery() as nursery:
        setup.cluster.know("open", TopicFacts(partitions=1))
        store = KafkaArchiveStore(setup.bridge, JsonMapper("open"))
        await nursery.start(store.run)
        store.submit([Message("a", b"%d" % n + b" " * size) for n in range(count)], outcomes.append)
        assert setup.bridge.full
        assert 0 < setup.bridge.outstanding_records < count
        await until(lambda: len(outcomes) == 1)
        assert outcomes == [{}]
        assert payloads(kafka, "open") == list(range(count))
        assert setup.bridge.counters()["records_sent"] == count
        assert (setup.bridge.outstanding_records, setup.bridge.outstanding_bytes) == (0, 0)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("count", [20, 3 * PART_RECORDS])
async def test_a_topic_that_is_closed_under_load_gives_its_room_back(count: int) -> None:
    kafka = FakeKafka()
    outcomes: list[Outcome] = []
    async with two_stores(kafka, spooled=True) as (setup, (closed, other)):
        setup.cluster.know("closed", TopicFacts(partitions=1))
        await until(lambda: closed.trouble() is None)
        kafka.denied.add("closed")
        closed.submit([Message("a", b"%d" % n) for n in range(count)], outcomes.append)
        assert setup.bridge.full
        await until(lambda: "closed" in setup.cluster.wanted)
        setup.cluster.cannot("closed", Reason.DENIED, "no right to write")
        await until(lambda: not setup.bridge.full)
        assert setup.bridge.outstanding_records == 0
        other.submit([Message("b", b"%d" % n) for n in range(30)], outcomes.append)
        await until(lambda: len(outcomes) == 1)
        assert payloads(kafka, "open") == list(range(30))
        kafka.denied.clear()
        setup.cluster.know("closed", TopicFacts(partitions=1))
        await until(lambda: len(outcomes) == 2)
        assert payloads(kafka, "closed") == list(range(count))
        assert (setup.bridge.outstanding_records, setup.bridge.outstanding_bytes) == (0, 0)
