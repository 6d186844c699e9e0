"""Reading from a checkpoint: where it begins, and what is said about it [K5]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import trio

from gateways.kafka.bridge import ConsumerBridge
from gateways.kafka.cluster import Cluster
from gateways.kafka.options import KafkaOptions
from gateways.kafka.poller import Assignment, Began
from gateways.kafka.records import ConsumedRecord
from tests.gateway_support import LIMIT
from tests.gateways.test_consumer_bridge import FakeConsumer

Group = dict[tuple[str, int], tuple[int, str]]


class Reading:
    """A bridge that reads topic t, which has ten records in each partition, from a checkpoint."""

    def __init__(self, offsets: dict[int, int], *, partitions: int = 2, group: Group | None = None) -> None:
        self.kafka = {("t", number): [b"%d" % value for value in range(10)] for number in range(partitions)}
        self.consumer = FakeConsumer(self.kafka, [], group=group)
        self.records: list[ConsumedRecord] = []
        assignments: list[Assignment] = [("t", offsets)]
        self.bridge = ConsumerBridge(
            KafkaOptions(), Cluster(["k"]), assignments, self.records.extend, open_consumer=lambda: self.consumer
        )

    async def read(self) -> list[tuple[int, int]]:
        """Read up to the end; return partition and offset of each record."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.bridge.run)
            with trio.fail_after(LIMIT):
                await self.bridge.caught_up.wait()
            nursery.cancel_scope.cancel()
        return sorted((record.partition, record.offset) for record in self.records)


async def test_it_goes_on_at_the_checkpoint_and_knows_where_the_present_begins() -> None:
    reading = Reading({0: 7, 1: 10})
    assert await reading.read() == [(0, 7), (0, 8), (0, 9)]
    assert reading.bridge.began == {("t", 0): Began(7, 10), ("t", 1): Began(10, 10)}


async def test_without_a_checkpoint_it_begins_at_the_end_and_says_where_that_was() -> None:
    reading = Reading({})
    assert await reading.read() == []
    assert reading.bridge.began == {("t", 0): Began(10, 10), ("t", 1): Began(10, 10)}


async def test_partitions_that_came_since_are_read_from_their_beginning() -> None:
    reading = Reading({0: 10}, partitions=2)
    assert await reading.read() == [(1, offset) for offset in range(10)]
    assert reading.bridge.began["t", 1] == Began(0, 10)


async def test_what_kafka_has_deleted_is_counted() -> None:
    reading = Reading({0: 2, 1: 8})
    reading.consumer.first = 5
    assert await reading.read() == [(0, 5), (0, 6), (0, 7), (0, 8), (0, 9), (1, 8), (1, 9)]
    assert reading.bridge.began["t", 0] == Began(5, 10, missing=3)


async def test_a_topic_that_was_made_anew_is_read_from_its_end(caplog: pytest.LogCaptureFixture) -> None:
    reading = Reading({0: 99, 1: 10})
    assert await reading.read() == []
    assert reading.bridge.began["t", 0] == Began(10, 10)
    assert "t-0 ends at 10, in front of the checkpoint 99" in caplog.text


async def test_a_topic_that_was_made_anew_and_is_longer_is_known_by_its_identity(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also when the first attempt fails behind that look."""
    reading = Reading({0: 7, 1: 3}, group={("t", 0): (5, "")})
    reading.bridge.expect("t", "an earlier one")
    first_offsets, failures = reading.consumer.first_offsets, [ConnectionError("once")]

    def fail_once(partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        if failures:
            raise failures.pop()
        return first_offsets(partitions)

    reading.consumer.first_offsets = fail_once  # type: ignore[method-assign]
    assert await reading.read() == [(number, offset) for number in (0, 1) for offset in range(10)]
    assert reading.bridge.began == {("t", number): Began(0, 10, another=True) for number in (0, 1)}
    assert reading.bridge.identity("t") == "0"
    assert caplog.text.count("deleted and made again") == 1


async def test_the_topic_of_the_checkpoint_goes_on() -> None:
    reading = Reading({0: 7, 1: 10})
    reading.bridge.expect("t", "0")
    assert await reading.read() == [(0, 7), (0, 8), (0, 9)]


@pytest.mark.parametrize("note", ["", "mqtt-trio 9", "somebody"])
async def test_an_offset_that_somebody_has_moved_counts(note: str) -> None:
    reading = Reading({0: 9, 1: 9}, group={("t", 0): (7, note), ("t", 1): (4, "mqtt-trio 4")})
    assert await reading.read() == [(0, 7), (0, 8), (0, 9), (1, 9)]
    assert reading.bridge.began == {("t", 0): Began(7, 10, moved=True), ("t", 1): Began(9, 10)}


async def test_offsets_are_stored_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.poller.LOOK_INTERVAL", 0.0)
    reading = Reading({0: 9, 1: 10})
    async with trio.open_nursery() as nursery:
        await nursery.start(reading.bridge.run)
        with trio.fail_after(LIMIT):
            await reading.bridge.caught_up.wait()
            reading.bridge.commit({("t", 0): 10})
            while not reading.consumer.group:  # noqa: ASYNC110  it happens in a thread
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert reading.consumer.group == {("t", 0): (10, "mqtt-trio 10")}


async def test_a_group_that_may_not_be_used_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.poller.LOOK_INTERVAL", 0.0)
    reading = Reading({0: 9, 1: 10})

    def denied(*_arguments: object) -> Group:
        raise RuntimeError("GroupAuthorizationFailedError")

    monkeypatch.setattr(reading.consumer, "committed", denied)
    monkeypatch.setattr(reading.consumer, "commit", denied)
    async with trio.open_nursery() as nursery:
        await nursery.start(reading.bridge.run)
        with trio.fail_after(LIMIT):
            await reading.bridge.caught_up.wait()
            reading.bridge.commit({("t", 0): 10})
            reading.kafka["t", 0].append(b"10")
            while len(reading.records) < 2:  # noqa: ASYNC110  it happens in a thread
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert reading.bridge.counters()["rebuilds"] == 0
