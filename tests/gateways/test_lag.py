"""How far a reader is behind [K17]: in records and in seconds, while it reads and while it stands still."""

from __future__ import annotations

import threading
import time

import attrs
import pytest
import trio

from gateways.kafka.bridge import SLOTS, ConsumerBridge
from gateways.kafka.cluster import Cluster
from gateways.kafka.lag import SKEW_WINDOW, Behind, Lag
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import ConsumedRecord
from tests.gateway_support import LIMIT
from tests.gateways.test_consumer_bridge import FakeConsumer

P = ("t", 0)
NONE = Behind(0, 0.0)


@attrs.define
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lag(clock: Clock) -> Lag:
    return Lag(utc=clock)


def record(offset: int, at: float, partition: int = 0) -> ConsumedRecord:
    return ConsumedRecord("t", partition, offset, None, b"", [], int(at * 1000))


def test_who_has_everything_is_not_behind(lag: Lag, clock: Clock) -> None:
    lag.look({P: 5}, {P: 5})
    clock.now += 100
    assert lag.behind() == {P: NONE}


def test_a_record_waits_since_it_was_written(lag: Lag, clock: Clock) -> None:
    lag.look({P: 5}, {P: 5})
    clock.now += 10
    waiting = [record(5, clock.now), record(6, clock.now + 3)]
    clock.now += 60
    assert lag.behind(waiting) == {P: Behind(1, 60.0)}, "what the last look did not see is one at least"
    lag.look({P: 7}, {P: 9}, fresh=False)
    assert lag.behind(waiting) == {P: Behind(4, 60.0)}
    assert lag.behind(waiting[1:]) == {P: Behind(3, 57.0)}


def test_a_record_that_was_written_late_does_not_make_its_reader_late(lag: Lag, clock: Clock) -> None:
    lag.look({P: 5}, {P: 5})
    hours_old = record(5, clock.now - 7200)
    clock.now += 2
    assert lag.behind([hours_old]) == {P: Behind(1, 2.0)}


def test_what_was_handed_over_and_not_processed_is_behind(lag: Lag, clock: Clock) -> None:
    waiting = [record(5, clock.now), record(6, clock.now)]
    clock.now += 30
    lag.look({P: 7}, {P: 7})  # the thread that reads has nothing left; who processes stands still
    assert lag.behind(waiting) == {P: Behind(2, 30.0)}


def test_what_is_still_in_kafka_waits_since_the_record_before_it(lag: Lag, clock: Clock) -> None:
    lag.handed(P, int((clock.now - 20) * 1000))
    lag.look({P: 5}, {P: 500})
    assert lag.behind() == {P: Behind(495, 20.0)}
    clock.now += 40
    assert lag.behind() == {P: Behind(495, 60.0)}, "it goes on while nobody looks"


def test_what_is_still_in_kafka_waits_since_everything_was_read(lag: Lag, clock: Clock) -> None:
    lag.handed(P, int((clock.now - 7200) * 1000))
    lag.look({P: 5}, {P: 5})
    clock.now += 1
    lag.look({P: 5}, {P: 6}, fresh=False)
    clock.now += 9
    assert lag.behind() == {P: Behind(1, 10.0)}


def test_an_answer_that_did_not_come_says_nothing(lag: Lag, clock: Clock) -> None:
    lag.look({P: 5}, {P: 5})
    clock.now += 50
    lag.look({P: 5}, {P: 5}, fresh=False)
    clock.now += 1
    lag.look({P: 5}, {P: 7})
    assert lag.behind() == {P: Behind(2, 51.0)}


def test_at_the_start_it_counts_from_the_first_look(lag: Lag, clock: Clock) -> None:
    lag.look({P: 0}, {P: None})
    assert lag.behind() == {P: NONE}
    clock.now += 1
    lag.look({P: 0}, {P: 10})
    clock.now += 1
    assert lag.behind() == {P: Behind(10, 2.0)}


@pytest.mark.parametrize("timestamp", [-1, 0, 1, 2**62])
def test_any_timestamp_is_taken(lag: Lag, clock: Clock, timestamp: int) -> None:
    strange = ConsumedRecord("t", 0, 5, None, b"", [], timestamp)
    lag.look({P: 5}, {P: 6}, fresh=False)
    clock.now += 5
    assert lag.behind([strange])[P].records == 1
    assert lag.behind([strange])[P].seconds >= 0
    lag.handed(P, timestamp)
    lag.look({P: 6}, {P: 8}, fresh=False)
    clock.now += 5
    assert lag.behind()[P].seconds >= 0


def test_an_end_that_lies_in_front_of_the_position_is_none_behind(lag: Lag) -> None:
    lag.look({P: 5}, {P: 3})
    assert lag.behind() == {P: NONE}


def test_skew(lag: Lag, clock: Clock) -> None:
    partitions = {("t", 0): 0, ("t", 1): 0, ("few", 0): 0, ("few", 1): 0}
    lag.look(partitions, partitions)
    clock.now += SKEW_WINDOW / 2
    lag.look(partitions, {("t", 0): 50, ("t", 1): 50, ("few", 0): 5, ("few", 1): 0})
    clock.now += SKEW_WINDOW / 2
    lag.look(partitions, {("t", 0): 90, ("t", 1): 30, ("few", 0): 19, ("few", 1): 0})
    assert lag.skew == {"t": 1.5, "few": 1.0}, "nineteen records on two partitions say nothing"
    clock.now += SKEW_WINDOW
    lag.look(partitions, {("t", 0): 90, ("t", 1): 90, ("few", 0): 19, ("few", 1): 20})
    assert lag.skew == {"t": 2.0, "few": 2.0}


@attrs.define
class Stopped:
    """A bridge whose records nobody takes."""

    kafka: dict[tuple[str, int], list[bytes]]
    room: trio.Event = attrs.field(factory=trio.Event)
    taken: list[ConsumedRecord] = attrs.field(factory=list)
    consumers: list[FakeConsumer] = attrs.field(factory=list)
    blind: bool = False

    def open(self) -> FakeConsumer:
        consumer = FakeConsumer(self.kafka, [])
        consumer.blind = self.blind
        self.consumers.append(consumer)
        return consumer

    def bridge(self) -> ConsumerBridge:
        bridge = ConsumerBridge(
            KafkaOptions(), Cluster(["k"]), [("t", "beginning")], self.taken.extend, open_consumer=self.open
        )
        bridge.room = self.room.wait
        return bridge


async def until_behind(bridge: ConsumerBridge, records: int) -> Behind:
    with trio.fail_after(LIMIT):
        while (behind := bridge.lag().get(P, NONE)).records != records:  # noqa: ASYNC110  another thread looks
            await trio.sleep(0.01)
    return behind


async def test_lag_grows_while_nobody_takes_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.reader_figures.LOOK_INTERVAL", 0.05)
    monkeypatch.setattr("gateways.kafka.poller.LOOK_INTERVAL", 0.05)
    stopped = Stopped({P: [b"x"] * (256 * (SLOTS + 2))})
    bridge = stopped.bridge()
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        await until_behind(bridge, 256 * (SLOTS + 2))
        stopped.kafka[P] += [b"y"] * 500
        behind = await until_behind(bridge, 256 * (SLOTS + 2) + 500)
        assert behind.seconds >= 0
        assert stopped.taken == []
        stopped.room.set()
        await until_behind(bridge, 0)
        assert len(stopped.taken) == 256 * (SLOTS + 2) + 500
        nursery.cancel_scope.cancel()


async def test_who_cannot_ask_still_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.reader_figures.BLIND_INTERVAL", 0.05)
    asked = threading.Event()

    def latest_ends(self: FakeConsumer, _partitions: object) -> dict[tuple[str, int], int]:
        asked.set()
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(FakeConsumer, "latest_ends", latest_ends)
    stopped = Stopped({P: [b"x"] * (256 * (SLOTS + 2))})
    bridge = stopped.bridge()
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        assert await trio.to_thread.run_sync(asked.wait, LIMIT)
        stopped.room.set()
        with trio.fail_after(LIMIT):
            await bridge.caught_up.wait()
        nursery.cancel_scope.cancel()
    assert len(stopped.taken) == 256 * (SLOTS + 2)
    assert bridge.counters()["rebuilds"] == 0


async def test_failed_fetches_are_counted_over_all_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.poller.LOOK_INTERVAL", 0.02)
    stopped = Stopped({P: [b"x"]})
    stopped.room.set()
    bridge = stopped.bridge()

    async def until_failed(count: int) -> None:
        with trio.fail_after(LIMIT):
            while bridge.report().failed_fetches != count:  # noqa: ASYNC110  another thread counts
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.caught_up.wait()
        stopped.consumers[0].failed = 2
        await until_failed(2)
        stopped.consumers[0].failed = 3
        stopped.consumers[0].faults.append(RuntimeError("its third failure"))
        await until_failed(3)
        with trio.fail_after(LIMIT):
            while len(stopped.consumers) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
        stopped.consumers[1].faults.append(RuntimeError("one that no fetch told of"))
        await until_failed(4)
        nursery.cancel_scope.cancel()
    assert bridge.report().failed_fetch_rate == pytest.approx(4 / 300)
    assert bridge.counters()["rebuilds"] == 2


def test_records_in_the_hands_of_the_poller_are_old_at_once() -> None:
    """A stopped reader's seconds come from the timestamps of what it holds."""
    lag = Lag()
    now = time.time()
    lag.look({P: 0}, {P: 1})
    assert lag.behind([record(0, now - 60)])[P].seconds == pytest.approx(60, abs=1)
