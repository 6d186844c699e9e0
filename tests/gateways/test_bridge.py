"""The bridge towards Kafka, with producers in memory that break, hang and refuse."""

from __future__ import annotations

import logging

import pytest
import trio

from gateways.kafka.bridge import Record
from gateways.kafka.cluster import TopicFacts
from mqtt_trio.errors import GatewayError
from tests.gateway_support import LIMIT, told
from tests.gateways.memory_kafka import FakeKafka, producing


async def test_outcomes_come_in_order_and_counters_fit() -> None:
    async with producing(FakeKafka(batch=10)) as setup:
        values = [b"%d" % number for number in range(1005)]
        for value in values:
            setup.offer(value)
        assert setup.bridge.outstanding_records == 1005
        await setup.until(1005)
        assert setup.order == values == setup.kafka.values(0)
        assert setup.bridge.outstanding_records == setup.bridge.outstanding_bytes == 0
        assert setup.bridge.counters() == {
            "records_sent": 1005, "messages_sent": 1005, "records_failed": 0, "records_resent": 0, "rebuilds": 0,
            "threads_left": 0, "threads_hung": 0,
        }  # fmt: skip


async def test_the_window_says_full_and_tells_when_there_is_room() -> None:
    kafka = FakeKafka()
    kafka.hang = True
    async with producing(kafka, window=10) as setup:
        calls: list[str] = []
        bridge = setup.bridge
        bridge.after_drain = lambda: calls.append("drained")
        for number in range(9):
            setup.offer(b"%d" % number)
        fullness = [bridge.full]
        bridge.when_room(lambda: calls.append("at once"))
        assert calls == ["at once"]
        setup.offer(b"9")
        assert [*fullness, bridge.full] == [False, True]
        room = trio.Event()

        def has_room() -> None:
            calls.append("room")
            room.set()

        bridge.when_room(has_room)
        kafka.hang = False
        with trio.fail_after(LIMIT):
            setup.offer(b"10")
            await room.wait()
        await setup.until(11)
        assert calls[-1] == "drained"
        assert calls.count("room") == 1


async def test_waiters_for_room_take_turns() -> None:
    kafka = FakeKafka()
    kafka.hang = True
    async with producing(kafka, window=2) as setup:
        turns: list[str] = []

        def waiter(name: str) -> None:
            turns.append(name)
            for number in range(2):
                setup.offer(b"%s-%d-%d" % (name.encode(), len(turns), number))
            if len(turns) < 6:
                setup.bridge.when_room(lambda: waiter(name))

        setup.offer(b"a")
        setup.offer(b"b")
        for name in ("x", "y"):
            setup.bridge.when_room(lambda name=name: waiter(name))  # type: ignore[misc]
        kafka.hang = False
        setup.offer(b"c")
        await setup.until(3 + 2 * 7)
        assert turns[:6] == ["x", "y"] * 3


async def test_a_broken_producer_is_replaced_without_loss_in_order() -> None:
    kafka = FakeKafka(batch=7)
    kafka.fail_at = {50, 51, 200, 333}
    async with producing(kafka) as setup:
        for number in range(400):
            setup.offer(b"%d" % number, partition=number % 2)
        await setup.until(400)
        assert set(setup.outcomes.values()) == {None}
        for partition in (0, 1):
            assert kafka.values(partition) == [b"%d" % number for number in range(partition, 400, 2)]
        assert setup.bridge.counters()["rebuilds"] == 4


async def test_a_poison_record_fails_alone() -> None:
    kafka = FakeKafka(batch=8)
    async with producing(kafka) as setup:
        values = [b"poison" if number == 20 else b"%d" % number for number in range(40)]
        for value in values:
            setup.offer(value)
        await setup.until(40)
        failed = {value: error for value, error in setup.outcomes.items() if error is not None}
        assert failed.keys() == {b"poison"}
        assert isinstance(failed[b"poison"], GatewayError)
        assert not failed[b"poison"].retriable
        assert kafka.values(0) == [value for value in values if value != b"poison"]


async def test_records_that_cannot_be_sent_at_all_fail_alone() -> None:
    async with producing(FakeKafka()) as setup:
        for value in (b"1", b"x" * 2000, b"2", b"unfit", b"3"):
            setup.offer(value)
        await setup.until(5)
        failed = {value: str(error) for value, error in setup.outcomes.items() if error is not None}
        assert failed.keys() == {b"x" * 2000, b"unfit"}
        assert "topic t takes batches of 1000" in failed[b"x" * 2000]
        assert setup.kafka.values(0) == [b"1", b"2", b"3"]
        assert setup.kafka.opened == 1


async def test_a_producer_that_hangs_is_replaced() -> None:
    kafka = FakeKafka()
    kafka.hang = True
    async with producing(kafka, timeout_ms=300) as setup:
        replaced = trio.Event()
        token = trio.lowlevel.current_trio_token()
        setup.offer(b"0")
        kafka.on_open = lambda: token.run_sync_soon(replaced.set) if kafka.opened > 1 else None
        for number in range(1, 30):
            setup.offer(b"%d" % number)
        with trio.fail_after(LIMIT):
            await replaced.wait()
        kafka.hang = False
        await setup.until(30)
        assert kafka.values(0) == [b"%d" % number for number in range(30)]


async def test_records_for_unknown_topics_wait_and_hold_nobody_up() -> None:
    async with producing(FakeKafka()) as setup:
        for number in range(3):
            setup.offer(b"later-%d" % number, topic="new")
            setup.offer(b"now-%d" % number)
        await setup.until(3)
        assert setup.order == [b"now-0", b"now-1", b"now-2"]
        assert setup.cluster.wanted == {"new"}
        setup.cluster.know("new", TopicFacts(partitions=1))
        await setup.until(6)
        assert setup.order[3:] == [b"later-0", b"later-1", b"later-2"]


async def test_the_key_decides_where_no_partition_is_given() -> None:
    async with producing(FakeKafka()) as setup:
        record = Record("t", None, b"sensors/a", b"v")
        setup.bridge.offer(record)
        setup.offer(b"w")
        await setup.until(1)
        assert record.partition == 2  # what Java's murmur2 gives for this key and 4 partitions


async def test_an_outage_at_the_start_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    kafka = FakeKafka()
    kafka.away = 3
    with caplog.at_level(logging.WARNING):
        async with producing(kafka) as setup:
            setup.offer(b"1")
            await setup.until(1)
            await told(setup.cluster, lambda: not setup.cluster.is_away)
    assert setup.outcomes == {b"1": None}
    assert [record.message for record in caplog.records] == [
        "Kafka at k is away for test: AwayError: nobody answers. MQTT goes on; trying until it is back",
        "Kafka at k is back",
    ]


async def test_stop_sends_what_was_offered() -> None:
    async with producing(FakeKafka(batch=1000)) as setup:
        for number in range(50):
            setup.offer(b"%d" % number)
        with trio.fail_after(LIMIT):
            await setup.bridge.stop()
        assert setup.outcomes == {b"%d" % number: None for number in range(50)}
        late = setup.offer(b"late")
        await setup.until(51)
        assert isinstance(setup.outcomes[b"late"], GatewayError)
        assert late.settled


async def test_stop_that_is_cancelled_gives_every_record_its_outcome() -> None:
    kafka = FakeKafka(batch=1000)
    kafka.hang = True
    async with producing(kafka) as setup:
        for number in range(50):
            setup.offer(b"%d" % number, topic="t" if number % 2 else "unknown")
        with trio.fail_after(LIMIT), trio.move_on_after(0.2) as scope:
            await setup.bridge.stop()
        assert scope.cancelled_caught
        assert len(setup.outcomes) == 50
        assert all(isinstance(error, GatewayError) and error.retriable for error in setup.outcomes.values())


async def test_a_failing_done_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async with producing(FakeKafka()) as setup:

        def done(_error: Exception | None) -> None:
            raise RuntimeError("a bug of the caller")

        setup.bridge.offer(Record("t", 0, None, b"1", done=done))
        setup.offer(b"2")
        await setup.until(1)
    assert "error while an outcome was handed out" in caplog.text
