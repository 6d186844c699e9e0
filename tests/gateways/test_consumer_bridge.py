"""The bridge from Kafka, with consumers in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest
import trio

from gateways.kafka.bridge import SLOTS, ConsumerBridge
from gateways.kafka.client_metrics import ClientFigures
from gateways.kafka.cluster import Cluster, TopicFacts
from gateways.kafka.handover import Handover
from gateways.kafka.options import KafkaOptions
from gateways.kafka.poller import Poller
from gateways.kafka.records import ConsumedRecord
from tests.gateway_support import LIMIT, told


class Hang(Exception):
    """A poll that does not return before the consumer is closed by another thread."""

    def __init__(self) -> None:
        self.released = threading.Event()


class FakeConsumer:
    """Reads a log in memory: `kafka[partition]` are values, offsets their indexes."""

    def __init__(
        self,
        kafka: dict[tuple[str, int], list[bytes]],
        faults: list[Exception],
        lives: dict[str, int] | None = None,
        group: dict[tuple[str, int], tuple[int, str]] | None = None,
    ) -> None:
        self.group: dict[tuple[str, int], tuple[int, str]] = {} if group is None else group
        self.first = 0
        self.blind = False
        self.failed = 0
        self.kafka = kafka
        self.lives = lives if lives is not None else {}
        """How often each topic was deleted and made again."""
        self.faults = faults
        self.at: dict[tuple[str, int], int] = {}
        self.connected = True
        self.closed = threading.Event()
        self.stuck: threading.Event | None = None

    def partitions(self, topic: str) -> list[int]:
        return sorted(number for name, number in self.kafka if name == topic)

    def identity(self, topic: str) -> str | None:
        return str(self.lives.get(topic, 0))

    def first_offsets(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        return dict.fromkeys(partitions, self.first)

    def end_offsets(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        return {p: len(self.kafka[p]) for p in partitions}

    def latest_ends(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        if self.blind:
            raise ConnectionError("nobody answers")
        return self.end_offsets(partitions)

    def figures(self) -> ClientFigures:
        return ClientFigures(failed_fetches=self.failed, answered_at=time.monotonic())

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        self.at = dict(offsets)

    def poll(self, timeout: float) -> list[ConsumedRecord]:
        if self.faults:
            fault = self.faults.pop()
            if isinstance(fault, Hang):
                self.stuck = fault.released
                fault.released.wait()  # as kafka-python's endless loop: no time-out ends it
            raise fault
        found = []
        for partition, offset in self.at.items():
            values = self.kafka.get(partition, [])[offset:]
            found += [ConsumedRecord(*partition, offset + i, None, v, [], 0) for i, v in enumerate(values)]
            self.at[partition] = offset + len(values)
        if not found:
            self.closed.wait(min(timeout, 0.01))
        return found

    def position(self, partition: tuple[str, int]) -> int:
        return self.at[partition]

    def highwater(self, partition: tuple[str, int]) -> int | None:
        return len(self.kafka.get(partition, []))

    def committed(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], tuple[int, str]]:
        return {p: self.group[p] for p in partitions if p in self.group}

    def commit(self, offsets: Mapping[tuple[str, int], tuple[int, str]]) -> None:
        self.group.update(offsets)

    def close(self) -> None:
        self.closed.set()
        if self.stuck is not None:
            self.stuck.set()


@attrs.define
class Reading:
    kafka: dict[tuple[str, int], list[bytes]]
    faults: list[Exception] = attrs.field(factory=list)
    lives: dict[str, int] = attrs.field(factory=dict)
    lists: list[list[ConsumedRecord]] = attrs.field(factory=list)
    changed: trio.Event = attrs.field(factory=trio.Event)
    told: list[str] = attrs.field(factory=list)

    def on_records(self, records: list[ConsumedRecord]) -> None:
        self.lists.append(records)
        self.told.append("records")
        self.changed.set()

    def values(self) -> list[bytes | None]:
        return [record.value for records in self.lists for record in records]

    async def until(self, count: int) -> None:
        with trio.fail_after(LIMIT):
            while len(self.values()) < count:
                self.changed = trio.Event()
                await self.changed.wait()

    def bridge(self, *assignments: tuple[str, str], cluster: Cluster | None = None) -> ConsumerBridge:
        return ConsumerBridge(
            KafkaOptions(), cluster or Cluster(["k"]), assignments, self.on_records,  # type: ignore[arg-type]
            on_positions_known=lambda: self.told.append("known"),
            on_caught_up=lambda: self.told.append("caught up"),
            open_consumer=lambda: FakeConsumer(self.kafka, self.faults, self.lives),
        )  # fmt: skip


async def test_live_topics_start_at_the_end_and_history_at_the_beginning() -> None:
    reading = Reading({("live", 0): [b"old"], ("kept", 0): [b"1", b"2"], ("kept", 1): []})
    bridge = reading.bridge(("live", "end"), ("kept", "beginning"))
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()
            reading.kafka["live", 0].append(b"new")
            await bridge.caught_up.wait()
        await reading.until(3)
        nursery.cancel_scope.cancel()
    assert sorted(value for value in reading.values() if value) == [b"1", b"2", b"new"]
    assert reading.told[0] == "known"
    assert "records" in reading.told[: reading.told.index("caught up")]


async def test_a_failing_consumer_is_replaced_and_goes_on_where_it_was(caplog: pytest.LogCaptureFixture) -> None:
    reading = Reading({("live", 0): []})
    bridge = reading.bridge(("live", "end"))
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()
        for number in range(3):
            reading.faults.append(RuntimeError("lost"))
            reading.kafka["live", 0] += [b"%d-%d" % (number, i) for i in range(10)]
            await reading.until(10 * number + 10)
        with trio.fail_after(LIMIT):
            while bridge.counters()["records_received"] < 30:  # noqa: ASYNC110  the thread counts what it has handed over
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert reading.values() == reading.kafka["live", 0]
    assert [record.offset for records in reading.lists for record in records] == list(range(30))
    assert bridge.counters() == {"records_received": 30, "rebuilds": 3, "threads_hung": 0, "threads_left": 0}
    assert caplog.messages.count("Kafka consumer bus is replaced: RuntimeError: lost") == 3


async def test_a_thread_that_hangs_is_replaced_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateways.kafka.watchdog.LOOK_INTERVAL", 0.05)
    monkeypatch.setattr("gateways.kafka.watchdog.SILENCE", 0.5)
    reading = Reading({("live", 0): []})
    bridge = reading.bridge(("live", "end"))
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()
        reading.kafka["live", 0] += [b"1", b"2"]
        await reading.until(2)
        hang = Hang()
        reading.faults.append(hang)
        reading.kafka["live", 0] += [b"3", b"4"]
        await reading.until(4)
        with trio.fail_after(LIMIT):  # the call that hung was brought to its end
            await trio.to_thread.run_sync(hang.released.wait)
        nursery.cancel_scope.cancel()
    assert reading.values() == [b"1", b"2", b"3", b"4"]
    assert bridge.counters()["threads_hung"] == 1
    assert "Kafka consumer bus hangs while waiting for records" in caplog.text


async def test_lists_are_bounded() -> None:
    reading = Reading({("live", 0): []})
    bridge = reading.bridge(("live", "end"))
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()
        big = [b"x" * 50_000] * 100 + [b"y"] * 5000
        reading.kafka["live", 0] += big
        await reading.until(len(big))
        nursery.cancel_scope.cancel()
    assert reading.values() == big
    assert max(len(records) for records in reading.lists) <= 256
    sizes = [sum(len(record.value or b"") for record in records) for records in reading.lists]
    assert max(sizes) < 128 * 1024 + 50_000


def test_a_slow_reader_holds_the_poller_up() -> None:
    kafka = {("kept", 0): [b"%d" % number for number in range(5000)]}
    room, refused, done = threading.Semaphore(3), threading.Event(), threading.Event()
    items: list[Any] = []

    def hand_over(_poller: Poller, item: Any) -> bool:
        if not room.acquire(blocking=False):
            refused.set()
            return False
        items.append(item)
        if sum(map(len, items)) == 5000:
            done.set()
        return True

    poller = Poller("test", lambda: FakeConsumer(kafka, []), Cluster(["k"]), [("kept", "beginning")], hand_over)
    thread = threading.Thread(target=poller.run)
    thread.start()
    try:
        assert refused.wait(LIMIT)
        assert len(items) == 3
        assert poller.received == 3 * 256
        room.release(100)
        assert done.wait(LIMIT)
    finally:
        poller.abort()
        thread.join(LIMIT)
    assert [record.value for item in items for record in item] == kafka["kept", 0]


async def test_while_there_is_no_room_records_stay_in_kafka(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [b"%d" % number for number in range(256 * 3 * SLOTS)]
    reading, room, asked = Reading({("kept", 0): values}), trio.Event(), 0
    refused, hand_over = threading.Event(), Handover.hand_over

    def watched(self: Handover[Poller, Any], poller: Poller, item: Any) -> bool:
        taken = hand_over(self, poller, item)
        if not taken:
            refused.set()
        return taken

    monkeypatch.setattr(Handover, "hand_over", watched)
    bridge = reading.bridge(("kept", "beginning"))

    async def wait() -> None:
        nonlocal asked
        asked += 1
        await room.wait()

    bridge.room = wait
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()  # that is no record
        assert await trio.to_thread.run_sync(refused.wait, LIMIT)
        assert reading.lists == []
        assert bridge.counters()["records_received"] == SLOTS * 256
        room.set()
        await reading.until(len(values))
        nursery.cancel_scope.cancel()
    assert reading.values() == values
    assert asked == 3 * SLOTS


async def test_a_topic_that_is_missing_is_waited_for() -> None:
    reading, cluster = Reading({("kept", 0): []}), Cluster(["k"])
    bridge = reading.bridge(("live", "end"), ("kept", "beginning"), cluster=cluster)
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        await told(cluster, lambda: "live" in cluster.wanted)
        assert not bridge.positions_known.is_set()
        reading.kafka["live", 0] = [b"old"]
        with trio.fail_after(LIMIT):
            await bridge.caught_up.wait()
        nursery.cancel_scope.cancel()
    assert reading.told == ["known", "caught up"]


async def test_partitions_that_come_later_are_read_from_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.poller.LOOK_INTERVAL", 0.0)
    reading = Reading({("live", 0): [b"old"]})
    bridge = reading.bridge(("live", "end"))
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()
        reading.kafka["live", 1] = [b"first", b"second"]
        await reading.until(2)
        nursery.cancel_scope.cancel()
    assert reading.values() == [b"first", b"second"]


async def test_a_topic_that_was_deleted_and_made_again_is_read_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateways.kafka.poller.LOOK_INTERVAL", 0.0)
    reading, cluster = Reading({("live", 0): [b"old"] * 5, ("kept", 0): []}), Cluster(["k"])
    cluster.know("live", TopicFacts(partitions=1))
    bridge = reading.bridge(("live", "end"), ("kept", "beginning"), cluster=cluster)
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()
        reading.kafka["live", 0].append(b"before")
        await reading.until(1)
        del reading.kafka["live", 0]
        await told(cluster, lambda: "live" in cluster.wanted)  # whoever keeps topics makes it again
        reading.lives["live"] = 1
        reading.kafka["live", 0] = [b"behind", b"it"]
        await reading.until(3)
        nursery.cancel_scope.cancel()
    assert reading.values() == [b"before", b"behind", b"it"]
    assert "Kafka topic live was deleted and made again" in caplog.text
    assert bridge.counters()["rebuilds"] == 0


async def test_an_error_of_the_reader_ends_the_bridge() -> None:
    def on_records(_records: list[ConsumedRecord]) -> None:
        raise KeyError("bug")

    kafka = {("kept", 0): [b"1"]}
    bridge = ConsumerBridge(
        KafkaOptions(), Cluster(["k"]), [("kept", "beginning")], on_records,
        open_consumer=lambda: FakeConsumer(kafka, []),
    )  # fmt: skip
    with trio.fail_after(LIMIT), pytest.raises(ExceptionGroup) as caught:
        await bridge.run()
    assert caught.group_contains(KeyError)
