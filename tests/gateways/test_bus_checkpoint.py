"""A node goes on where it was: what came while it was away, once, to those who are owed it [K5, S1]."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus_positions import MAX_LIVES, MAX_WRITERS, NOTED_WRITERS, Begun, Position, Positions
from gateways.kafka.partitions import partition_for
from gateways.kafka.poller import Began
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.errors import StoreError
from tests.gateways.memory_bus import MemoryKafka
from tests.gateways.whole_nodes import SOON, WholeCluster, WholeNode, drain, open_cluster

KEPT = {"session_expiry_interval": 1_000_000, "clean_start": False}


@pytest.fixture
async def cluster() -> AsyncIterator[WholeCluster]:
    async with open_cluster() as cluster:
        yield cluster


async def leave_behind(node: WholeNode, client_id: str, *filters: str, qos: int = 2) -> None:
    """Have a client subscribe and go, with a session that stays."""
    client = await node.connect(client_id, *filters, qos=qos, **KEPT)
    await client.disconnect()
    await trio.sleep(SOON)


async def heard(node: WholeNode, client_id: str) -> list[bytes]:
    """What waits for a session."""
    client = await node.connect(client_id, **KEPT)
    assert client.connack is not None
    assert client.connack.session_present
    messages = await drain(client)
    await client.disconnect()
    return [message.payload for message in messages]


def own_store(cluster: WholeCluster, node_id: str) -> MemoryStore:
    store = cluster.stores[node_id]
    assert isinstance(store, MemoryStore)
    return store


async def test_a_session_gets_what_came_while_its_node_was_away(
    autojump_clock: MockClock, cluster: WholeCluster
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t/#")
    await leave_behind(two, "at most once", "t/#", qos=0)
    publisher = await one.connect("publisher")
    await two.kill()
    for number in range(30):
        await publisher.publish(f"t/{number % 5}", b"%d" % number, qos=number % 3)
    await trio.sleep(100)
    two = await cluster.start("two")
    assert two.counters()["bus_messages_of_backlog"] == 20
    late = await two.connect("late", "t/#")
    await publisher.publish("t/0", b"live", qos=1)
    assert [message.payload for message in await drain(late)] == [b"live"]
    assert await heard(two, "at most once") == []
    got = [int(payload) for payload in await heard(two, "kept") if payload != b"live"]
    assert sorted(got) == [number for number in range(30) if number % 3]
    for topic in range(5):
        for qos in (1, 2):
            in_order = [number for number in got if number % 5 == topic and number % 3 == qos]
            assert in_order == sorted(in_order)


@pytest.mark.parametrize("seed", range(12))
async def test_kills_at_any_instant_lose_and_double_nothing(
    autojump_clock: MockClock, cluster: WholeCluster, seed: int
) -> None:
    """QoS 2 as well: the position is committed in the batch of what lies in front of it."""
    rng = random.Random(seed)
    cluster.kafka.twice = seed % 3 == 0
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t/#")
    publisher = await one.connect("publisher")
    got: list[bytes] = []
    for number in range(150):
        await publisher.publish(f"t/{number % 4}", b"%d" % number, qos=1 + number % 2)
        if rng.random() < 0.1:
            await trio.sleep(rng.choice([0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01, 1.5]))
            await two.kill()
            if rng.random() < 0.5:
                await trio.sleep(rng.choice([0.01, 3, 30]))
            two = await cluster.start("two")
            if rng.random() < 0.3:
                got += await heard(two, "kept")
        await trio.sleep(rng.choice([0, 0, 0.0007, 0.002]))
    await trio.sleep(SOON)
    got += await heard(two, "kept")
    numbers = [int(payload) for payload in got]
    assert Counter(numbers) == Counter(range(150))
    for topic in range(4):  # of which each has one QoS
        of_topic = [number for number in numbers if number % 4 == topic]
        assert of_topic == sorted(of_topic)


async def test_what_this_node_wrote_before_it_was_killed_is_its_own(
    autojump_clock: MockClock, cluster: WholeCluster
) -> None:
    """Its sessions had that when it was published."""
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(one, "kept", "t")
    await leave_behind(two, "kept elsewhere", "t")
    publisher = await one.connect("publisher")
    one.consumer.gate = trio.Event()  # it does not read what it wrote before it dies
    for number in range(5):
        await publisher.publish("t", b"%d" % number, qos=2)
    await trio.sleep(SOON)
    await one.kill()
    for life in range(3):
        one = await cluster.start("one")
        assert one.counters()["bus_messages_of_backlog"] == 0
        publisher = await one.connect("publisher")
        one.consumer.gate = trio.Event()
        await publisher.publish("t", b"life %d" % life, qos=2)
        await trio.sleep(SOON)
        await one.kill()
    one = await cluster.start("one")
    expected = [b"0", b"1", b"2", b"3", b"4", b"life 0", b"life 1", b"life 2"]
    assert await heard(one, "kept") == expected
    assert await heard(two, "kept elsewhere") == expected


async def test_a_node_that_stops_in_order_misses_nothing_either(
    autojump_clock: MockClock, cluster: WholeCluster
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t")
    publisher = await one.connect("publisher")
    await publisher.publish("t", b"before", qos=2)
    await two.stop()
    await publisher.publish("t", b"meanwhile", qos=2)
    await trio.sleep(500)
    two = await cluster.start("two")
    assert await heard(two, "kept") == [b"before", b"meanwhile"]


async def test_a_node_that_was_away_for_too_long_begins_anew(
    autojump_clock: MockClock, cluster: WholeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t/#")
    publisher = await one.connect("publisher")
    await two.kill()
    for number in range(50):
        await publisher.publish(f"t/{number}", b"old", qos=1)
    await trio.sleep(3601)
    for _ in range(2):  # and does not find the rest of it later
        two = await cluster.start("two")
        assert two.counters()["bus_messages_of_backlog"] == 0
        await publisher.publish("t/1", b"new", qos=1)
        await trio.sleep(20)
        await two.kill()
    two = await cluster.start("two")
    assert await heard(two, "kept") == [b"new", b"new"]
    assert caplog.text.count("longer than [Kafka.Bus] CheckpointAge (3600 s)") == 1


async def test_quiet_partitions_are_not_read_from_their_beginning(
    autojump_clock: MockClock, cluster: WholeCluster
) -> None:
    one = await cluster.start("one")
    publisher = await one.connect("publisher")
    for number in range(50):
        await publisher.publish(f"t/{number}", b"old", qos=1)
    await trio.sleep(SOON)
    two = await cluster.start("two")
    await leave_behind(two, "kept", "t/#")
    await publisher.publish("t/1", b"new", qos=1)
    await trio.sleep(SOON)
    await two.kill()
    two = await cluster.start("two")
    assert await heard(two, "kept") == [b"new"]


async def test_what_kafka_deleted_meanwhile_is_told(
    autojump_clock: MockClock, cluster: WholeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t")
    await trio.sleep(20)
    await two.kill()
    publisher = await one.connect("publisher")
    place = "monster", partition_for(b"t", 12)
    for number in range(10):
        await publisher.publish("t", b"%d" % number, qos=1)
        await trio.sleep(SOON)
    cluster.kafka.first[place] = len(cluster.kafka.log(*place)) - 4
    two = await cluster.start("two")
    assert await heard(two, "kept") == [b"6", b"7", b"8", b"9"]
    assert "records of the bus were deleted by Kafka" in caplog.text


async def test_partitions_that_came_while_the_node_was_away(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        cluster.kafka = MemoryKafka(partitions=2)
        one, two = await cluster.start("one"), await cluster.start("two")
        await leave_behind(two, "kept", "t/#")
        await two.kill()
        await one.stop()
        cluster.kafka.grow(12)
        one = await cluster.start("one")
        publisher = await one.connect("publisher")
        for number in range(40):
            await publisher.publish(f"t/{number}", b"%d" % number, qos=2)
        await trio.sleep(SOON)
        two = await cluster.start("two")
        assert sorted(map(int, await heard(two, "kept"))) == list(range(40))


@pytest.mark.parametrize("between", [False, True])
async def test_a_body_in_parts_survives_a_kill_in_its_middle(autojump_clock: MockClock, between: bool) -> None:
    """What lies between its parts, and was delivered, is not delivered again when they are read once more."""
    async with open_cluster() as cluster:
        cluster.kafka = MemoryKafka(max_message_bytes=10_000)
        one, two = await cluster.start("one"), await cluster.start("two")
        await leave_behind(two, "kept", "t")
        other = await cluster.start("other")
        publisher, another = await one.connect("publisher"), await other.connect("another")
        await two.kill()
        await publisher.publish("t", bytes(50_000), qos=2)
        await trio.sleep(SOON)
        log = cluster.kafka.log("monster", partition_for(b"t", 12))
        parts = log[-6:]
        del log[-6:]
        two = await cluster.start("two")
        for number, part in enumerate(parts):
            cluster.kafka.append("monster", part.partition, None, part.value)
            await trio.sleep(1.5)
            if between:
                await another.publish("t", b"%d" % number, qos=2)
                await trio.sleep(1.5)
            if number in (2, 4):
                await two.kill()
                two = await cluster.start("two")
        await trio.sleep(SOON)
        got = await heard(two, "kept")
        numbers = [b"%d" % number for number in range(6)] if between else []
        assert [payload for payload in got if len(payload) < 100] == numbers
        assert [payload for payload in got if len(payload) > 100] == [bytes(50_000)]


async def test_a_copy_behind_a_kill_is_known_for_one(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t")
    publisher = await one.connect("publisher")
    await publisher.publish("t", b"once", qos=2)
    await trio.sleep(SOON)
    log = cluster.kafka.log("monster", partition_for(b"t", 12))
    await two.kill()
    cluster.kafka.append("monster", log[-1].partition, None, log[-1].value)
    two = await cluster.start("two")
    cluster.kafka.append("monster", log[-1].partition, None, log[-1].value)
    await trio.sleep(SOON)
    assert await heard(two, "kept") == [b"once"]
    assert two.counters()["bus_records_doubled"] == 2


async def test_a_topic_that_is_made_again_is_live_again(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    """Its offsets begin anew, in front of where this life began."""
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t")
    publisher = await one.connect("publisher")
    for number in range(5):
        await publisher.publish("t", b"%d" % number, qos=2)
        await trio.sleep(SOON)
    await two.kill()
    two = await cluster.start("two")
    listener = await two.connect("listener", "t")
    log = cluster.kafka.log("monster", partition_for(b"t", 12))
    log.clear()
    two.consumer.positions["monster", partition_for(b"t", 12)] = 0
    await publisher.publish("t", b"again", qos=2)
    assert [message.payload for message in await drain(listener)] == [b"again"]
    await two.kill()
    two = await cluster.start("two")
    assert await heard(two, "kept") == [b"0", b"1", b"2", b"3", b"4", b"again"]


async def test_a_topic_that_is_made_again_while_its_node_is_away(
    autojump_clock: MockClock, cluster: WholeCluster
) -> None:
    """It is longer than where the checkpoint stood: only its identity tells."""
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t")
    publisher = await one.connect("publisher")
    for number in range(3):
        await publisher.publish("t", b"%d" % number, qos=2)
        await trio.sleep(SOON)
    assert await heard(two, "kept") == [b"0", b"1", b"2"]
    await trio.sleep(10)
    await two.kill()
    key = "monster", partition_for(b"t", 12)
    cluster.kafka.log(*key).clear()
    cluster.kafka.identity = "second"
    one.consumer.positions[key] = 0
    one.consumer.on_another("monster", "second")
    for number in range(10, 20):
        await publisher.publish("t", b"%d" % number, qos=2)
        await trio.sleep(SOON)
    two = await cluster.start("two")
    assert await heard(two, "kept") == [b"%d" % number for number in range(10, 20)]
    await publisher.publish("t", b"20", qos=2)
    await trio.sleep(10)
    for name, node in (("one", one), ("two", two)):
        await node.kill()
        node = await cluster.start(name)
        if name == "two":
            assert await heard(node, "kept") == [b"20"], "nothing comes again"


async def test_kafka_that_comes_late_brings_the_backlog_to_those_who_are_owed_it(
    autojump_clock: MockClock, cluster: WholeCluster
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "kept", "t")
    await leave_behind(two, "away", "t")
    publisher = await one.connect("publisher")
    await two.kill()
    await publisher.publish("t", b"missed", qos=1)
    await trio.sleep(SOON)
    cluster.kafka.go_away()
    two = await cluster.start("two")
    kept = await two.connect("kept", **KEPT)
    clean = await two.connect("clean", "t")
    new = await two.connect("new", "t", **KEPT)
    cluster.kafka.come_back()
    assert [message.payload for message in await drain(kept, 5)] == [b"missed"]
    assert await drain(clean) == []
    assert await drain(new) == []
    assert await heard(two, "away") == [b"missed"]


async def test_kafka_hears_of_a_position_once_the_store_has_it(
    autojump_clock: MockClock, cluster: WholeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await trio.sleep(20)
    assert two.consumer.committed["monster", 0] > 0
    place = "monster", partition_for(b"t", 12)
    before = two.consumer.committed.get(place, 0)

    def broken(batch: Batch) -> None:
        raise StoreError("planned: no space")

    publisher = await one.connect("publisher")
    with monkeypatch.context() as patch:
        patch.setattr(own_store(cluster, "two"), "commit", broken)
        await publisher.publish("t", b"1", qos=1)
        await trio.sleep(60)
        assert two.consumer.committed.get(place, 0) == before
    await trio.sleep(60)
    assert two.consumer.committed[place] == before + 1


async def test_a_node_without_a_store_begins_at_the_end(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two", kept=False)
    publisher = await one.connect("publisher")
    await publisher.publish("t", b"1", qos=1)
    await trio.sleep(20)
    assert two.consumer.committed, "tools see how far it is all the same"
    await two.kill()
    await publisher.publish("t", b"2", qos=1)
    two = await cluster.start("two", kept=False)
    assert two.counters()["bus_messages_of_backlog"] == 0


async def test_an_idle_node_commits_now_and_then(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one = await cluster.start("one")
    await trio.sleep(10)
    before = one.memory.broker.metrics.store_commits
    await trio.sleep(60)
    assert 10 <= one.memory.broker.metrics.store_commits - before <= 13


async def test_clients_that_moved_meanwhile_are_known_to_have(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    await leave_behind(two, "cleaned", "t")
    await leave_behind(two, "kept", "t")
    await trio.sleep(10)
    await two.kill()
    await one.connect("cleaned", clean_start=True)
    await one.connect("kept", clean_start=False)
    await trio.sleep(10)
    two = await cluster.start("two")
    assert sorted(two.memory.broker.connections.sessions) == ["kept"]


# --- marks


def marks_of(positions: Positions) -> dict[str, bytes]:
    return {name: value for name, value in positions.marks().items() if value is not None}


def test_positions_are_read_back() -> None:
    now = 1000.0
    first = Positions("t", b"1" * 16, {}, age=100, utc=lambda: now)
    first.begin({0: Began(5, 5), 1: Began(7, 7)})
    first.of(0).writers = {b"w" * 18: 3, b"v" * 18: 4}
    first.of(0).passed(9)
    first.of(0).begun[b"w" * 18] = Begun(8, now)
    marks = marks_of(first)
    assert marks_of(first).keys() == {"kafka.bus/t"}, "what has not changed is not written again"
    second = Positions("t", b"2" * 16, marks, age=100, utc=lambda: now + 100)
    assert second.offsets == {0: 8, 1: 7}
    assert second.lives == (b"1" * 16,)
    assert (second.of(0).applied, second.of(0).writers) == (10, {b"w" * 18: 3, b"v" * 18: 4})
    second.begin({0: Began(8, 12), 1: Began(7, 7)})
    third = Positions("t", b"3" * 16, marks | marks_of(second), age=100, utc=lambda: now)
    assert third.lives == (b"2" * 16, b"1" * 16)
    assert Positions("other", b"3" * 16, marks, age=100, utc=lambda: now).offsets == {}


def test_a_begun_body_is_not_waited_for_for_ever() -> None:
    position = Position(next=50, applied=50, begun={b"w" * 18: Begun(8, 1000.0)})
    assert Position.of_mark(position.mark(1500.0)).next == 8
    assert Position.of_mark(position.mark(1700.0)).next == 50


def test_a_moved_offset_makes_records_new_again() -> None:
    positions = Positions("t", b"1" * 16, {}, age=100, utc=lambda: 0.0)
    positions.of(0).writers = {b"w" * 18: 3}
    positions.of(0).next = positions.of(0).applied = 10
    positions.begin({0: Began(4, 12, moved=True)})
    assert (positions.of(0).applied, positions.of(0).writers) == (4, {})


@pytest.mark.parametrize(
    "marks",
    [
        {"kafka.bus/t": b""},
        {"kafka.bus/t": b"\x02" + bytes(8)},
        {"kafka.bus/t": b"\x01" + bytes(9)},
        {"kafka.bus/t": b"\x01" + bytes(8), "kafka.bus/t/0": b"short"},
        {"kafka.bus/t": b"\x01" + bytes(8), "kafka.bus/t/0": b"\x01" + bytes(17) + b"\1"},
        {"kafka.bus/t": b"\x01" + bytes(8), "kafka.bus/t/zero": b"\x01" + bytes(18)},
    ],
)
def test_marks_that_are_none_are_not_used(marks: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    positions = Positions("t", b"1" * 16, marks, age=1e12, utc=lambda: 0.0)
    assert positions.offsets == {}
    assert "cannot be read and is not used" in caplog.text
    positions.begin({0: Began(3, 3)})
    assert Positions("t", b"2" * 16, marks_of(positions), age=1e12, utc=lambda: 0.0).offsets == {0: 3}


def test_what_is_remembered_is_bounded() -> None:
    assert NOTED_WRITERS < MAX_WRITERS
    position = Position(writers={b"%018d" % number: number for number in range(1000)})
    again = Position.of_mark(position.mark(0.0))
    assert list(again.writers.values()) == list(range(1000 - NOTED_WRITERS, 1000))
    marks: dict[str, bytes] = {}
    for life in range(3 * MAX_LIVES):
        positions = Positions("t", b"%016d" % life, marks, age=1e12, utc=lambda: 0.0)
        marks |= marks_of(positions)
    assert len(marks["kafka.bus/t"]) < 1024
    assert positions.lives[0] == b"%016d" % (3 * MAX_LIVES - 2)
