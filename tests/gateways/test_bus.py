"""The bus between several nodes over a Kafka in memory [K4, K21, K23]; test_bus_kafka.py has the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import attrs
import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus import START_TIMEOUT
from gateways.kafka.bus_records import Kind, encode_header, encode_items
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.bus_slots import RECORD_SIZE
from gateways.kafka.partitions import partition_for
from gateways.kafka.retained import MAP_KEY
from mqtt_trio.gateway import FrameRun, Hold, Message, MessageProperties, ReasonCode, Refused
from tests.gateways.memory_bus import LATENCY, NOW, MemoryKafka, Node, make_node, run_node, run_of, start_node

SOON = 0.1
"""Seconds on the fake clock in which everything arrives."""
SMALL = BusSettings(window_messages=10)


@attrs.define
class Cluster:
    kafka: MemoryKafka
    nursery: trio.Nursery

    async def start(self, node_id: str, settings: BusSettings | None = None) -> Node:
        return await start_node(self.nursery, self.kafka, node_id, settings or BusSettings())

    def batches(self) -> list[int]:
        """Number of batch records per partition that has some."""
        batch = int(Kind.BATCH)
        sizes = [
            len([record for record in log if (record.value or b"\0\xff")[1] == batch])
            for (topic, _), log in self.kafka.logs.items()
            if topic == "monster"
        ]
        return [size for size in sizes if size]


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Empty; tests ask for the fake clock themselves (pytest-trio looks for it among a test's own arguments)."""
    async with trio.open_nursery() as nursery:
        yield Cluster(MemoryKafka(), nursery)
        nursery.cancel_scope.cancel()


def partition(topic: str) -> int:
    return partition_for(topic.encode(), 12)


async def test_publish_reaches_every_other_node_once_and_never_its_own(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    one, two, three = [await cluster.start(name) for name in ("one", "two", "three")]
    run = run_of("a/b", b"1", b"2", client_id="device")
    one.run_published(run, "a/b")
    two.publish("c", b"3", qos=2)
    await trio.sleep(SOON)
    from_two = Message("c", b"3", 2, client_id="two", published_at=NOW)
    assert one.seen == [from_two]
    assert two.seen == [run]
    assert sorted(three.seen, key=repr) == sorted([run, from_two], key=repr)
    assert one.bus.counters()["bus_messages_sent"] == 2
    assert one.bus.counters()["bus_messages_received"] == 1
    assert one.bus.counters()["bus_messages_waiting"] == 0


async def test_everything_of_a_message_survives(autojump_clock: MockClock, cluster: Cluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    properties = MessageProperties(
        payload_format_indicator=0,
        message_expiry_interval=7,
        content_type="application/json",
        response_topic="answers/here",
        correlation_data=bytes(range(256)),
        user_properties=(("k", "1"), ("k", "2"), ("", "")),
    )
    message = Message("a", bytes(range(256)), 1, True, properties, "device", NOW + 1e-6)
    route = one.bus.route("a")
    assert route is not None
    route.take(message)
    await trio.sleep(SOON)
    assert two.seen == [message]


async def test_order_within_a_partition_holds_for_runs_and_messages(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    expected = []
    for number in range(60):
        payload = bytes((number,))
        if number % 3:
            one.run_published(run_of("a", payload), "a")
        else:
            one.publish("a", payload)
        expected.append(payload)
        if number % 10 == 9:
            await trio.sleep(0.002)
    await trio.sleep(SOON)
    assert len(two.seen) < 60  # runs came together
    got = b"".join(
        item.payload if isinstance(item, Message) else bytes(item.frames[index] for index in last_bytes(item))
        for item in two.seen
    )
    assert got == b"".join(expected)


def last_bytes(run: FrameRun) -> list[int]:
    size = len(run.frames) // run.count
    return [size * (number + 1) - 1 for number in range(run.count)]


async def test_sys_topics_stay_on_their_node(autojump_clock: MockClock, cluster: Cluster) -> None:
    one = await cluster.start("one")
    assert one.bus.route("$SYS/broker/uptime") is None
    assert one.bus.route("$SYS") is None
    assert one.bus.route("$SYSTEM") is not None
    assert one.bus.route("a") is one.bus.route("a")


async def test_one_record_per_partition_and_linger(autojump_clock: MockClock, cluster: Cluster) -> None:
    one = await cluster.start("one")
    for _ in range(50):
        one.publish("a")
        one.publish("a")
    await trio.sleep(0.0029)
    assert not cluster.batches()
    await trio.sleep(0.0002 + LATENCY)
    assert cluster.batches() == [1]


async def test_full_slot_does_not_wait_for_the_linger(autojump_clock: MockClock, cluster: Cluster) -> None:
    one = await cluster.start("one", BusSettings(linger=1.0))
    one.publish("a", bytes(RECORD_SIZE))
    await trio.sleep(2 * LATENCY)
    assert cluster.batches() == [1]


async def test_idle_bus_writes_announcements_only(autojump_clock: MockClock, cluster: Cluster) -> None:
    await cluster.start("one")
    before = len(cluster.kafka.records("monster"))
    await trio.sleep(60)
    assert len(cluster.kafka.records("monster")) - before == 12
    assert not cluster.batches()


async def test_what_a_retry_doubled_is_dropped(autojump_clock: MockClock, cluster: Cluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    cluster.kafka.twice = True
    for number in range(5):
        one.publish("a", bytes((number,)), retain=True)
        await trio.sleep(SOON)
    assert two.payloads == [bytes((number,)) for number in range(5)]
    assert two.bus.counters()["bus_records_doubled"] == 5
    assert two.bus.counters()["bus_records_missing"] == 0
    assert two.host.local.retained == one.host.local.retained


async def test_lost_records_are_counted(autojump_clock: MockClock, cluster: Cluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    one.publish("a")
    await trio.sleep(SOON)
    cluster.kafka.refuse = lambda record: True
    one.publish("a")
    await trio.sleep(SOON)
    cluster.kafka.refuse = lambda record: False
    one.publish("a")
    await trio.sleep(SOON)
    assert len(two.seen) == 2
    assert two.bus.counters()["bus_records_missing"] == 1
    assert one.bus.counters()["bus_messages_failed"] == 1
    assert one.bus.counters()["bus_messages_waiting"] == 0


async def test_garbage_is_counted_and_stops_nobody(
    autojump_clock: MockClock, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    head = encode_header(Kind.BATCH, b"x" * 16, "foreign", 1)
    body = encode_items([run_of("a", b"1")])
    number = partition("a")
    values = [None, b"", b"{}", b"\x02", head + body[:-1], b"\x03" + (head + body)[1:], b"\x03new"]
    values += [encode_header(Kind.ANNOUNCE, b"y" * 16, "foreign", 1) + b"short"]
    for value in values:
        cluster.kafka.append("monster", number, None, value)
        cluster.kafka.append("mqtt.retained", number, b"a", value or b"")
    for value in (None, b"", encode_header(Kind.PARTITIONS, b"x" * 16, "foreign", 0) + bytes(4)):
        cluster.kafka.append("mqtt.retained", 0, MAP_KEY, value)
    cluster.kafka.append("mqtt.retained", 1, MAP_KEY, encode_header(Kind.PARTITIONS, b"x" * 16, "f", 0) + b"\0\0\0\1")
    cluster.kafka.append("monster", 0, None, encode_header(Kind.PARTITIONS, b"x" * 16, "foreign", 1) + b"\0\0\0\1")
    for key in (None, b"", b"\xff", b"a/#"):
        cluster.kafka.append("mqtt.retained", number, key, None)
    one.publish("a", b"good")
    await trio.sleep(SOON)
    assert two.payloads == [b"good"]
    counters = two.bus.counters()
    assert counters["bus_records_malformed"] == 6
    assert counters["bus_records_unknown_version"] == 3
    assert counters["retained_records_malformed"] + counters["retained_records_unknown_version"] == 16
    assert [record.getMessage() for record in caplog.records if "format version 3" in record.getMessage()] == [
        "bus record of format version 3, this node reads 2: such records are left out until this node is upgraded"
    ] * 2  # once a node


async def test_a_record_that_cannot_be_delivered_stops_nobody(
    autojump_clock: MockClock, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")

    def broken(runs: object) -> None:
        raise ValueError("no topic")

    monkeypatch.setattr(two.host.local, "publish_runs", broken)
    one.run_published(run_of("a", b"1"), "a")
    await trio.sleep(SOON)
    one.publish("a", b"2")
    await trio.sleep(SOON)
    assert two.payloads == [b"2"]
    assert two.bus.counters()["bus_records_undelivered"] == 1


async def test_large_message_travels_in_parts(autojump_clock: MockClock, cluster: Cluster) -> None:
    cluster.kafka = MemoryKafka(max_message_bytes=10_000)
    one, two = await cluster.start("one"), await cluster.start("two")
    payload = bytes(range(256)) * 400
    one.publish("a", b"before", qos=1)
    one.publish("a", payload, qos=1)
    one.publish("a", b"behind", qos=1)
    await trio.sleep(SOON)
    assert two.payloads == [b"before", payload, b"behind"]
    sizes = [len(record.value or b"") for record in cluster.kafka.log("monster", partition("a"))]
    assert max(sizes) <= 10_000
    assert one.bus.counters()["bus_messages_sent"] == 3
    assert one.bus.counters()["bus_bytes_waiting"] == 0


async def test_node_that_comes_between_two_parts_skips_the_rest(autojump_clock: MockClock, cluster: Cluster) -> None:
    cluster.kafka = MemoryKafka(max_message_bytes=10_000)
    one = await cluster.start("one")
    one.publish("a", bytes(30_000))
    await trio.sleep(SOON)
    log = cluster.kafka.log("monster", partition("a"))
    parts = [record.value for record in log]
    two = await cluster.start("two")
    cluster.kafka.append("monster", partition("a"), None, parts[-1])
    one.publish("a", b"next")
    await trio.sleep(SOON)
    assert two.payloads == [b"next"]
    assert two.bus.counters()["bus_records_malformed"] == 1


# --- Kafka away


async def test_full_window_drops_qos_0_and_counts_it_exactly(autojump_clock: MockClock, cluster: Cluster) -> None:
    one, two = await cluster.start("one", SMALL), await cluster.start("two")
    cluster.kafka.go_away()
    for number in range(100):
        assert one.run_published(run_of("a", bytes((number,))), "a") is None
        await trio.sleep(0.001)
    assert one.bus.counters()["bus_messages_dropped"] == 90
    cluster.kafka.come_back()
    await trio.sleep(SOON)
    assert sum(run.count for run in two.seen if isinstance(run, FrameRun)) == 10
    one.publish("a", b"again")
    await trio.sleep(SOON)
    assert two.payloads[-1] == b"again"


async def test_full_window_holds_acknowledgements_and_loses_nothing(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    one, two = await cluster.start("one", SMALL), await cluster.start("two")
    cluster.kafka.go_away()
    released: list[int] = []
    for number in range(25):
        answer = one.publish("a", bytes((number,)), qos=1)
        if number < 10:
            assert answer is None
        else:
            assert isinstance(answer, Hold)
            answer.when_released(lambda number=number: released.append(number))  # type: ignore[misc]
        await trio.sleep(0.01)
    assert one.host.stopped == [True]
    assert not released
    cluster.kafka.come_back()
    await trio.sleep(SOON)
    assert released == list(range(10, 25))
    assert one.host.stopped == [True, False]
    assert two.payloads == [bytes((number,)) for number in range(25)]
    assert one.bus.counters()["bus_messages_held"] == 15
    assert one.bus.counters()["bus_messages_dropped"] == 0


async def test_four_times_the_window_is_refused(autojump_clock: MockClock, cluster: Cluster) -> None:
    one = await cluster.start("one", SMALL)
    cluster.kafka.go_away()
    answers = [one.publish("a", qos=1) for _ in range(45)]
    assert answers[40:] == [Refused(ReasonCode.QUOTA_EXCEEDED)] * 5
    assert one.bus.counters()["bus_messages_refused"] == 5


async def test_window_in_bytes(autojump_clock: MockClock, cluster: Cluster) -> None:
    one = await cluster.start("one", BusSettings(window_bytes=10_000))
    cluster.kafka.go_away()
    assert one.publish("a", bytes(10_000), qos=1) is None
    assert isinstance(one.publish("a", b"", qos=1), Hold)
    cluster.kafka.come_back()
    await trio.sleep(SOON)
    assert one.bus.counters()["bus_bytes_waiting"] == 0


async def test_node_starts_without_kafka_and_joins_later(
    autojump_clock: MockClock, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    two = await cluster.start("two")
    two.publish("kept", b"before", retain=True)
    await trio.sleep(SOON)
    cluster.kafka.go_away()
    began = trio.current_time()
    one = await cluster.start("one")
    assert trio.current_time() - began == pytest.approx(START_TIMEOUT)
    assert "waiting for Kafka" in one.bus.describe()[0]
    assert "starts without the bus" in caplog.text
    one.publish("a", b"waited", qos=1)
    await trio.sleep(100)
    cluster.kafka.come_back()
    await trio.sleep(1)
    assert one.bus.ready
    assert two.payloads == [b"waited"]
    assert one.host.local.retained["kept"].payload == b"before"


async def test_stop_ships_what_waits(autojump_clock: MockClock, cluster: Cluster) -> None:
    one, two = await cluster.start("one", BusSettings(linger=1.0)), await cluster.start("two")
    one.publish("a", b"last", qos=1, retain=True)
    await one.bus.stop()
    await trio.sleep(SOON)
    assert two.payloads == [b"last"]
    assert two.host.local.retained["a"].payload == b"last"


async def test_stop_without_kafka_is_bounded_and_lets_acknowledgements_go(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    one = await cluster.start("one", SMALL)
    cluster.kafka.go_away()
    holds = [one.publish("a", qos=1) for _ in range(12)][10:]
    began = trio.current_time()
    with trio.move_on_after(2):
        await one.bus.stop()
    assert trio.current_time() - began == pytest.approx(2)
    assert all(isinstance(hold, Hold) and hold.released for hold in holds)


async def test_describe_names_what_counts(autojump_clock: MockClock, cluster: Cluster) -> None:
    one = make_node(cluster.kafka, "one")
    assert "waiting for Kafka" in one.bus.describe()[0]
    await cluster.nursery.start(run_node, one)
    await cluster.start("two")
    await trio.sleep(SOON)
    assert one.bus.describe() == [
        "bus: topic monster, 12 partitions, linger 3 ms, 1 other node",
        "retained messages of the cluster: topic mqtt.retained",
    ]


async def test_messages_go_to_partitions_that_exist(autojump_clock: MockClock, cluster: Cluster) -> None:
    """Kafka was away when the slots were made, and its topic has fewer partitions than configured."""
    cluster.kafka = MemoryKafka(partitions=5)
    cluster.kafka.go_away()
    one = await cluster.start("one")
    for number in range(50):
        one.publish(f"t/{number}")
    cluster.kafka.come_back()
    await trio.sleep(SOON)
    two = await cluster.start("two")
    for number in range(50):
        one.publish(f"t/{number}")
    await trio.sleep(SOON)
    assert len(two.seen) == 50
    assert max(number for _, number in cluster.kafka.logs) == 4


# --- retained messages


async def test_late_node_gets_retained_messages_and_no_old_traffic(autojump_clock: MockClock, cluster: Cluster) -> None:
    one = await cluster.start("one")
    for number in range(30):
        one.publish(f"r/{number}", b"first", retain=True)
        one.publish(f"r/{number}", b"kept", retain=True)
    one.publish("r/0", b"", retain=True)
    one.publish("live", b"x")
    await trio.sleep(SOON)
    two = await cluster.start("two")
    assert two.seen == []
    assert {topic: message.payload for topic, message in two.host.local.retained.items()} == {
        f"r/{number}": b"kept" for number in range(1, 30)
    }
    assert two.host.local.retained == one.host.local.retained


async def test_own_record_on_its_way_wins_over_older_ones(autojump_clock: MockClock, cluster: Cluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    one.consumer.gate = trio.Event()
    two.publish("a", b"two", retain=True)
    await trio.sleep(SOON)
    one.publish("a", b"one", retain=True)
    await trio.sleep(SOON)
    one.consumer.gate.set()
    await trio.sleep(SOON)
    assert one.host.local.retained["a"].payload == b"one"
    assert two.host.local.retained["a"].payload == b"one"


async def test_record_that_fails_gives_way_to_the_log(autojump_clock: MockClock, cluster: Cluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    one.consumer.gate = trio.Event()
    two.publish("a", b"two", retain=True)
    await trio.sleep(SOON)
    cluster.kafka.refuse = lambda record: True
    one.publish("a", b"one", retain=True)
    one.consumer.gate.set()
    await trio.sleep(SOON)
    assert one.host.local.retained["a"].payload == b"two"
    assert one.bus.counters()["retained_records_failed"] == 1


@pytest.mark.parametrize("seed", range(20))
async def test_nodes_converge_whatever_the_order(autojump_clock: MockClock, cluster: Cluster, seed: int) -> None:
    import random

    rng = random.Random(seed)
    nodes = [await cluster.start(f"n{number}") for number in range(3)]
    cluster.kafka.twice = bool(seed % 2)
    for step in range(200):
        node = rng.choice(nodes)
        node.publish(f"t/{rng.randrange(3)}", rng.choice([b"", str(step).encode()]), qos=1, retain=True)
        if rng.random() < 0.2 and node.consumer.gate.is_set():
            node.consumer.gate = trio.Event()
        if rng.random() < 0.2:
            rng.choice(nodes).consumer.gate.set()
        await trio.sleep(rng.choice([0, 0.001, 0.003, 0.01]))
    for node in nodes:
        node.consumer.gate.set()
    await trio.sleep(1)
    nodes.append(await cluster.start("late"))
    first = nodes[0].host.local.retained
    assert all(node.host.local.retained == first for node in nodes)
    assert not any(node.bus.retained._own for node in nodes)


async def test_retained_messages_that_wait_give_way_to_newer_ones(
    autojump_clock: MockClock, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateways.kafka.retained.MAX_OUTSTANDING", 2)
    one, two = await cluster.start("one"), await cluster.start("two")
    cluster.kafka.go_away()
    for number in range(100):
        one.publish(f"t/{number % 4}", str(number).encode(), retain=True)
        await trio.sleep(0.01)
    cluster.kafka.come_back()
    await trio.sleep(SOON)
    assert {topic: message.payload for topic, message in two.host.local.retained.items()} == {
        f"t/{number % 4}": str(number).encode() for number in range(96, 100)
    }
    assert len(cluster.kafka.records("mqtt.retained")) < 10
    assert one.bus.counters()["bus_bytes_waiting"] == 0


async def test_retained_message_beyond_the_window_is_counted(autojump_clock: MockClock, cluster: Cluster) -> None:
    one = await cluster.start("one", SMALL)
    cluster.kafka.go_away()
    for number in range(15):
        one.publish(f"t/{number}", retain=True)
    assert one.bus.counters()["retained_messages_dropped"] == 5


async def test_retained_message_too_large_for_kafka_removes_the_old_one(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    cluster.kafka = MemoryKafka(max_message_bytes=10_000)
    one, two = await cluster.start("one"), await cluster.start("two")
    one.publish("a", b"small", retain=True)
    await trio.sleep(SOON)
    one.publish("a", bytes(20_000), retain=True)
    await trio.sleep(SOON)
    assert "a" not in two.host.local.retained
    assert two.payloads == [b"small", bytes(20_000)]
    assert one.bus.counters()["retained_messages_too_large"] == 1
