"""The producer's life: topics that go and come, rights that are missing, threads that end. In memory."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from gateways.kafka import feeder
from gateways.kafka.bridge import Record
from gateways.kafka.cluster import TopicFacts
from gateways.kafka.records import Reason, RecordRefusedError
from tests.gateway_support import LIMIT, told
from tests.gateways.memory_kafka import FakeKafka, Setup, producing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(feeder, "GONE_AFTER", 0.05)
    monkeypatch.setattr(feeder, "LEAVE_AFTER", 0.3)
    monkeypatch.setattr(feeder, "LEAVE_WAIT", 0.3)
    monkeypatch.setattr("gateways.kafka.parking.SETTLED_AFTER", 0.1)


async def wanted(setup: Setup, topic: str) -> None:
    """Wait until somebody misses facts about `topic`."""
    await told(setup.cluster, lambda: topic in setup.cluster.wanted)


async def test_a_topic_that_is_made_again_in_time_costs_nothing(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "LEAVE_AFTER", LIMIT)
    kafka = FakeKafka()
    async with producing(kafka) as setup:
        setup.offer(b"0", topic="t")
        await setup.until(1)
        kafka.deleted.add("t")
        for number in range(1, 10):
            setup.offer(b"%d" % number, topic="t")
        await wanted(setup, "t")  # the topic manager looks, and makes it again
        setup.offer(b"10", topic="t")
        kafka.deleted.clear()
        setup.cluster.know("t", TopicFacts(partitions=4))
        setup.offer(b"11", topic="t")
        await setup.until(12)
        assert kafka.values(0) == [b"%d" % number for number in range(12)]
        assert (kafka.opened, setup.bridge.counters()["rebuilds"]) == (1, 0)


async def test_a_topic_that_stays_away_is_left_and_others_go_on(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    kafka = FakeKafka()
    refused: list[tuple[bytes | None, Reason]] = []
    async with producing(kafka, timeout_ms=600) as setup:
        setup.bridge.on_refused = lambda record, error: refused.append((record.value, error.reason))
        setup.cluster.know("u", TopicFacts(partitions=1))
        kafka.deleted.add("t")
        for number in range(5):
            setup.offer(b"t%d" % number, topic="t")
            setup.offer(b"u%d" % number, topic="u")
        await setup.until(5)
        await wanted(setup, "t")
        setup.cluster.cannot("t", Reason.NO_TOPIC, "topic t cannot be created: the policy says no")
        for number in range(5, 10):
            setup.offer(b"t%d" % number, topic="t")
            setup.offer(b"u%d" % number, topic="u")
        await setup.until(20)
        assert refused == [(b"t%d" % number, Reason.NO_TOPIC) for number in range(10)]
        assert [str(setup.outcomes[b"t%d" % number]) for number in (0, 9)] == [
            "topic t cannot be created: the policy says no"
        ] * 2
        assert [record.value for record in kafka.log] == [b"u%d" % number for number in range(10)]
        assert kafka.opened == 2
        assert "Kafka topic t is gone" in caplog.text
        assert "is away" not in caplog.text
        # Once it is there, it is there.
        kafka.deleted.clear()
        setup.cluster.know("t", TopicFacts(partitions=4))
        setup.offer(b"t10", topic="t")
        await setup.until(21)
        assert setup.outcomes[b"t10"] is None


async def test_nothing_is_given_up_while_kafka_is_away(quick: None) -> None:
    kafka = FakeKafka()
    async with producing(kafka, timeout_ms=100) as setup:
        setup.cluster.away("topics", "nobody answers")
        setup.cluster.cannot("new", Reason.NO_TOPIC, "no")
        setup.offer(b"n", topic="new")
        for number in range(20):
            setup.offer(b"%d" % number)
            await setup.until(number + 1)
            await trio.sleep(0.02)
        assert b"n" not in setup.outcomes
        setup.cluster.back("topics")
        await setup.until(21)
        assert isinstance(setup.outcomes[b"n"], RecordRefusedError)


async def test_what_is_patient_waits_for_its_topic_in_order_and_alone(quick: None) -> None:
    """Also behind an outage of all Kafka: what waits for a topic is no sign that Kafka is away."""
    kafka = FakeKafka()
    async with producing(kafka, timeout_ms=200) as setup:
        cluster = setup.cluster
        cluster.cannot("new", Reason.NO_TOPIC, "no")
        kafka.away = 1
        for number in range(10):
            setup.offer(b"%d" % number, topic="new", patient=number % 2 == 0)
        await told(cluster, lambda: cluster.is_away)
        await told(cluster, lambda: not cluster.is_away)
        await setup.until(5)
        assert sorted(setup.outcomes) == [b"%d" % number for number in range(1, 10, 2)]
        setup.offer(b"t")
        await setup.until(6)
        assert setup.outcomes[b"t"] is None
        setup.offer(b"10", topic="new", patient=True)
        cluster.know("new", TopicFacts(partitions=4))
        setup.offer(b"11", topic="new", patient=True)
        await setup.until(13)
        assert [record.value for record in kafka.log] == [b"t", b"0", b"2", b"4", b"6", b"8", b"10", b"11"]


async def test_a_topic_that_may_not_be_written_holds_nobody_up(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    kafka = FakeKafka(batch=3)
    async with producing(kafka, timeout_ms=500) as setup:
        setup.cluster.know("secret", TopicFacts(partitions=4))
        kafka.denied.add("secret")
        for number in range(6):
            setup.offer(b"s%d" % number, topic="secret")
            setup.offer(b"%d" % number)
        await wanted(setup, "secret")
        await setup.until(6)
        assert kafka.values(0) == [b"%d" % number for number in range(6)]
        kafka.denied.clear()  # somebody gave the right
        setup.cluster.know("secret", TopicFacts(partitions=4))
        await setup.until(12)
        assert [r.value for r in kafka.log if r.topic == "secret"] == [b"s%d" % number for number in range(6)]
        assert set(setup.outcomes.values()) == {None}
        assert "it may not write to topic secret" in caplog.text


async def test_a_producer_whose_thread_ended_is_replaced(quick: None) -> None:
    kafka = FakeKafka()
    async with producing(kafka) as setup:
        kafka.hang = kafka.dead = True
        for number in range(5):
            setup.offer(b"%d" % number)
        replaced = trio.Event()
        token = trio.lowlevel.current_trio_token()
        kafka.on_open = lambda: token.run_sync_soon(replaced.set) if kafka.opened >= 2 else None
        with trio.fail_after(LIMIT):
            await replaced.wait()
        kafka.hang = kafka.dead = False
        await setup.until(5)
        assert kafka.values(0) == [b"%d" % number for number in range(5)]


async def test_a_compacted_topic_gets_no_record_without_a_key() -> None:
    kafka = FakeKafka()
    async with producing(kafka) as setup:
        setup.cluster.know("t", TopicFacts(partitions=4, is_compacted=True))
        setup.offer(b"1")
        await setup.until(1)
        error = setup.outcomes[b"1"]
        assert isinstance(error, RecordRefusedError)
        assert (error.reason, kafka.sent) == (Reason.REFUSED, 0)


async def test_a_lazy_bridge_connects_for_its_first_record() -> None:
    kafka = FakeKafka()
    async with producing(kafka, lazy=True) as setup:
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert kafka.opened == 0
        setup.offer(b"1")
        await setup.until(1)
        assert kafka.opened == 1
        setup.bridge.offer(Record("t", 0, None, b"2"))
        with trio.fail_after(LIMIT):
            await setup.bridge.stop()
        assert [record.value for record in kafka.log] == [b"1", b"2"]


async def test_a_lazy_bridge_that_never_had_work_stops_at_once() -> None:
    kafka = FakeKafka()
    async with producing(kafka, lazy=True) as setup:
        with trio.fail_after(1):
            await setup.bridge.stop()
    assert kafka.opened == 0


async def test_troubles_are_told_once_and_end_with_facts() -> None:
    async with producing(FakeKafka()) as setup:
        cluster = setup.cluster
        cluster.cannot("x", Reason.DENIED, "one")
        first = cluster.trouble("x")
        cluster.cannot("x", Reason.NO_TOPIC, "two")
        second = cluster.trouble("x")
        assert first is not None
        assert second is not None
        assert (second.since, second.text, second.reason) == (first.since, "two", Reason.NO_TOPIC)
        cluster.know("x", TopicFacts(partitions=1))
        assert cluster.trouble("x") is None
        cluster.want("x")  # known already: nobody has to look
        assert "x" not in cluster.wanted


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.watchdog.LOOK_INTERVAL", 0.05)
    monkeypatch.setattr("gateways.kafka.watchdog.SILENCE", 0.5)
    monkeypatch.setattr(feeder, "IDLE_WAIT", 0.05)


async def test_a_thread_that_hangs_is_replaced_in_order(impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    kafka = FakeKafka(batch=3)
    async with producing(kafka) as setup:
        kafka.hold_up = hold_up = threading.Event()
        setup.offer(b"new", topic="parked")
        values = [b"%d" % number for number in range(7)] + [b"hang"] + [b"%d" % number for number in range(8, 20)]
        for value in values:
            setup.offer(value)
        await setup.until(20)
        setup.cluster.know("parked", TopicFacts(partitions=1))
        await setup.until(21)
        assert set(setup.outcomes.values()) == {None}
        sent = [record.value for record in kafka.log if record.topic == "t"]
        assert list(dict.fromkeys(sent)) == values  # what was in flight may be there twice
        counters = setup.bridge.counters()
        assert (counters["threads_hung"], counters["threads_left"]) == (1, 1)
        hold_up.set()  # it returns after all, and touches nothing
        with trio.fail_after(LIMIT):
            while setup.bridge.counters()["threads_left"]:  # noqa: ASYNC110  what is waited for has no event
                await trio.sleep(0.01)
        setup.offer(b"21")
        await setup.until(22)
        assert len(kafka.log) == len(sent) + 2
    assert "Kafka producer test hangs while sending" in caplog.text
    assert "has ended after all" in caplog.text


async def test_threads_that_are_left_behind_are_bounded(
    impatient: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateways.kafka.watchdog.MOST_LEFT", 2)
    hold_up, kafka = threading.Event(), FakeKafka()
    stuck: list[int] = []

    def never() -> None:
        stuck.append(threading.get_ident())
        hold_up.wait()

    kafka.on_open = never  # as a resolver that does not answer
    async with producing(kafka) as setup:
        setup.offer(b"1")
        with trio.fail_after(LIMIT):
            while "it is not replaced" not in caplog.text:  # noqa: ASYNC110  what is waited for has no event
                await trio.sleep(0.01)
        assert len(set(stuck)) == 3
        assert setup.bridge.counters()["threads_left"] == 2
        hold_up.set()
        await setup.until(1)
        assert [record.value for record in kafka.log] == [b"1"]
        with trio.fail_after(LIMIT):
            await setup.bridge.stop()


async def test_a_thread_that_hangs_at_the_end_costs_no_outcome(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateways.kafka.watchdog.SILENCE", LIMIT)
    monkeypatch.setattr("gateways.kafka.bridge.CLOSE_GRACE", 0.1)
    kafka = FakeKafka()
    async with producing(kafka) as setup:
        kafka.hold_up = hold_up = threading.Event()
        for value in (b"1", b"hang", b"2"):
            setup.offer(value)
        await setup.until(1)
        with trio.fail_after(LIMIT), trio.move_on_after(0.1):
            await setup.bridge.stop()
        failed = {value for value, error in setup.outcomes.items() if error is not None}
        assert failed == {b"hang", b"2"}
        hold_up.set()
