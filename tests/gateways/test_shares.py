"""Share groups with members on several nodes: who serves, who waits, what is passed on [K23]."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus_choices import GroupNews, encode_choices, encode_news, hash_of
from gateways.kafka.bus_groups import Group, GroupTable, next_turn
from gateways.kafka.bus_records import Kind, decode_header, decode_items, encode_header, encode_message
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.bus_slots import Slot
from gateways.kafka.partitions import partition_for
from mqtt_trio.broker.session import Delivery, Session
from mqtt_trio.broker.store import MemoryStore
from mqtt_trio.gateway import Message
from mqtt_trio.testing import TestClient
from tests.gateways.memory_bus import NOW
from tests.gateways.whole_nodes import SOON, WholeCluster, WholeNode, drain, open_cluster

KEPT = {"session_expiry_interval": 1_000_000, "clean_start": False}
GROUP = "$share/g/t/#"
NAMES = ("one", "two", "three")


@pytest.fixture
async def cluster() -> AsyncIterator[WholeCluster]:
    async with open_cluster() as cluster:
        yield cluster


async def start(cluster: WholeCluster) -> list[WholeNode]:
    return [await cluster.start(name) for name in NAMES]


async def numbers(*clients: TestClient) -> list[list[int]]:
    return [[int(message.payload) for message in await drain(client)] for client in clients]


def every(got: list[list[int]]) -> list[int]:
    return sorted(number for each in got for number in each)


def placed(topic: str = "t/1") -> tuple[str, int]:
    return "monster", partition_for(topic.encode(), 12)


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_each_message_goes_to_one_member_of_the_cluster(
    autojump_clock: MockClock, cluster: WholeCluster, qos: int
) -> None:
    nodes = await start(cluster)
    members = [await node.connect(f"m-{node.node_id}", GROUP) for node in nodes]
    members.append(await nodes[2].connect("another", GROUP))
    plain = await nodes[1].connect("plain", "t/#")
    await trio.sleep(SOON)
    publishers = [await node.connect("publisher-" + node.node_id) for node in nodes]
    for number in range(240):
        await publishers[number % 3].publish(f"t/{number % 5}", b"%d" % number, qos=qos)
        await trio.sleep(0.001)  # or messages at QoS 0 would make runs, which go whole
    got = await numbers(*members, plain)
    assert every(got[:4]) == list(range(240))
    assert [len(each) for each in got[:4]] == [60] * 4, "by the connected members of each node"
    assert sorted(got[4]) == list(range(240))
    assert all(node.counters()["bus_groups_passed_on"] == 0 for node in nodes)


async def test_a_node_without_members_sends_runs_whole(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two, _ = await start(cluster)
    member = await two.connect("member", GROUP)
    publisher = await one.connect("publisher")
    await trio.sleep(SOON)
    await publisher.publish("t/1", b"0")  # the fast lane learns the topic
    await trio.sleep(SOON)
    for number in range(1, 6):
        await publisher.publish("t/1", b"%d" % number)
    assert await numbers(member) == [[0, 1, 2, 3, 4, 5]]


async def test_topics_without_groups_go_the_short_way(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two, _ = await start(cluster)
    assert isinstance(one.bus.route("t/1"), Slot)
    member = await two.connect("member", GROUP, "$share/own/$SYS/#")
    await trio.sleep(SOON)
    assert not isinstance(one.bus.route("t/1"), Slot)
    assert one.bus.route("t/1") is one.bus.route("t/1"), "or runs would be cut, and audiences made anew"
    assert isinstance(one.bus.route("u/1"), Slot)
    assert one.bus.route("$SYS/broker/uptime") is None
    assert list(one.bus.shares.table.groups) == [GROUP]
    await member.disconnect()
    await trio.sleep(SOON)
    for node in (one, two):
        assert isinstance(node.bus.route("t/1"), Slot)
        assert node.counters()["bus_groups"] == 0


async def test_what_waits_goes_to_members_elsewhere(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    """Nobody was there, so it waits where it was published; then a member comes to another node."""
    one, two, three = await start(cluster)
    away = await one.connect("away", GROUP, **KEPT)
    await away.disconnect()
    await trio.sleep(SOON)
    publisher = await two.connect("publisher")
    for number in range(10):
        await publisher.publish("t/1", b"%d" % number, qos=1 + number % 2)
    await trio.sleep(SOON)
    assert one.memory.broker.metrics.messages_queued == 10
    member = await three.connect("member", GROUP)
    assert every(await numbers(member)) == list(range(10))
    assert one.memory.broker.metrics.messages_queued == 0
    assert one.counters()["bus_groups_passed_on"] == 10
    assert not [row for row in stored(cluster, "one") if row]
    back = await one.connect("away", **KEPT)
    assert await numbers(back) == [[]]


async def test_what_no_record_can_hold_stops_nobody(
    autojump_clock: MockClock, cluster: WholeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateways.kafka.bus_records.MAX_PROPERTIES", 2)
    one, two, _ = await start(cluster)
    await (await one.connect("away", GROUP, **KEPT)).disconnect()
    publisher = await one.connect("publisher")
    for number in range(3):
        pairs = (("k", "v"),) * (3 if number == 1 else 1)
        await publisher.publish("t/1", b"%d" % number, qos=1, user_properties=pairs)
    await trio.sleep(SOON)
    member = await two.connect("member", GROUP)
    assert await numbers(member) == [[0, 2]]
    await publisher.publish("t/1", b"3", qos=1)
    assert await numbers(member) == [[3]]
    assert one.counters()["bus_messages_failed"] == 1, "where it waited; on its way out it was a packet"


def stored(cluster: WholeCluster, node_id: str) -> list[object]:
    store = cluster.stores[node_id]
    assert isinstance(store, MemoryStore)
    return list(store.state.deliveries.values())


async def test_what_a_member_leaves_unacknowledged_goes_to_members_elsewhere(
    autojump_clock: MockClock, cluster: WholeCluster
) -> None:
    one, two, _ = await start(cluster)
    leaving = await one.connect("leaving", GROUP, qos=1)
    publisher = await one.connect("publisher")
    await trio.sleep(SOON)
    for number in range(5):
        await publisher.publish("t/1", b"%d" % number, qos=1)
    await trio.sleep(SOON)
    member = await two.connect("member", GROUP)
    await trio.sleep(SOON)
    await leaving.disconnect()
    assert await numbers(member) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_node_that_was_chosen_too_late_passes_on(
    autojump_clock: MockClock, cluster: WholeCluster, qos: int
) -> None:
    one, two, three = await start(cluster)
    leaving, staying = await two.connect("leaving", GROUP), await three.connect("staying", GROUP)
    publisher = await one.connect("publisher")
    await trio.sleep(SOON)
    two.consumer.gate = trio.Event()
    for number in range(20):
        await publisher.publish("t/1", b"%d" % number, qos=qos)
        await trio.sleep(0.001)
    await trio.sleep(SOON)
    await leaving.disconnect()
    two.consumer.gate.set()
    assert every(await numbers(staying)) == list(range(20))
    passed_on = two.counters()["bus_groups_passed_on"]
    assert passed_on == 10 if qos else passed_on > 0  # at QoS 0 a whole run may have been for one node
    assert all(node.counters()["bus_groups_homeless"] == 0 for node in (one, two, three))


@pytest.mark.parametrize("kept", [True, False])
async def test_what_a_dead_node_was_chosen_for_waits_for_it(
    autojump_clock: MockClock, cluster: WholeCluster, kept: bool
) -> None:
    one, two, three = await start(cluster)
    member = await two.connect("member", GROUP, **(KEPT if kept else {}))
    staying = await three.connect("staying", GROUP)
    publisher = await one.connect("publisher")
    await trio.sleep(SOON)
    await two.kill()
    for number in range(20):
        await publisher.publish("t/1", b"%d" % number, qos=1)
    before = await numbers(staying)
    assert len(before[0]) == 10, "the others do not know yet"
    await trio.sleep(30)
    await publisher.publish("t/1", b"20", qos=1)
    await publisher.publish("t/1", b"21", qos=1)
    assert await numbers(staying) == [[20, 21]], "now they do"
    two = await cluster.start("two")
    after = await numbers(staying)
    rest = sorted(set(range(20)) - set(before[0]))
    assert sorted(after[0]) == (rest if kept else [])
    assert two.counters()["bus_groups_homeless"] == (0 if kept else 10)
    del member


async def test_nobody_but_a_node_that_is_away_keeps_the_group(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    """Also when the publisher's node, or both, had a restart in between: it is noted in the store."""
    one, two, three = await start(cluster)
    for node in (two, three):
        await (await node.connect(f"m-{node.node_id}", GROUP, **KEPT)).disconnect()
    await trio.sleep(SOON)
    await two.kill()
    await three.stop()
    await trio.sleep(60)
    for life in range(3):
        publisher = await one.connect("publisher")
        for number in range(3):
            await publisher.publish("t/1", b"%d" % (3 * life + number), qos=2)
        await trio.sleep(SOON)
        await one.kill()
        one = await cluster.start("one")
    await trio.sleep(60)
    two, three = await cluster.start("two"), await cluster.start("three")
    members = [await node.connect(f"m-{node.node_id}", **KEPT) for node in (two, three)]
    assert every(await numbers(*members)) == list(range(9))


async def test_while_kafka_is_away_the_members_here_get_it(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with open_cluster(BusSettings(on_outage="spool"), tmp_path) as cluster:
        one, two, three = await start(cluster)
        here, there = await one.connect("here", GROUP), await two.connect("there", GROUP)
        publishers = [await node.connect(f"publisher-{node.node_id}") for node in (one, three)]
        await trio.sleep(SOON)
        cluster.kafka.go_away()
        for number in range(20):
            await publishers[number % 2].publish("t/1", b"%d" % number, qos=1)
        assert await numbers(here, there) == [list(range(0, 20, 2)), []]
        await trio.sleep(100)
        cluster.kafka.come_back()
        got = await numbers(here, there)
        assert every(got) == list(range(1, 20, 2)), "of the node that has no members"
        assert await numbers(here, there) == [[], []]


@pytest.mark.parametrize("on_outage", ["drop", "reject"])
async def test_what_other_nodes_never_get_is_for_the_members_here(
    autojump_clock: MockClock, tmp_path: Path, on_outage: str
) -> None:
    async with open_cluster(BusSettings(on_outage=on_outage), tmp_path) as cluster:
        one, two, _ = await start(cluster)
        await two.connect("there", GROUP)
        here = await one.connect("here", GROUP)
        publisher = await one.connect("publisher")
        await trio.sleep(SOON)
        cluster.kafka.go_away()
        for number in range(4):
            await publisher.publish("t/1", b"%d" % number, qos=1)
        assert await numbers(here) == [[0, 1, 2, 3] if on_outage == "drop" else []]


async def test_a_group_that_the_writer_has_not_heard_of(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    """It begins on two nodes at once, and the publisher's hears of neither: the first one in the log serves it."""
    one, two, three = await start(cluster)
    publisher = await one.connect("publisher")
    one.consumer.gate = trio.Event()
    members = [await node.connect(f"m-{node.node_id}", GROUP) for node in (two, three)]
    for number in range(10):
        await publisher.publish("t/1", b"%d" % number, qos=1)
    got = await numbers(*members)
    assert every(got) == list(range(10))
    assert [] in got
    one.consumer.gate.set()
    await trio.sleep(SOON)
    for number in range(10, 20):
        await publisher.publish("t/1", b"%d" % number, qos=1)
    got = await numbers(*members)
    assert every(got) == list(range(10, 20))
    assert [] not in got


async def test_what_is_undecided_waits_for_the_log(
    autojump_clock: MockClock, cluster: WholeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, _ = await start(cluster)
    publisher = await one.connect("publisher")
    one.consumer.gate = two.consumer.gate = trio.Event()
    for number in range(6):
        await publisher.publish("t/1", b"%d" % number, qos=number % 3)
    await trio.sleep(SOON)
    two.bus.shares.joined = False  # its word about the group comes later
    member = await two.connect("member", GROUP)
    two.consumer.gate.set()
    await trio.sleep(SOON)
    assert two.counters()["bus_groups_undecided"] == 6
    assert await numbers(member) == [[]]
    monkeypatch.setattr("gateways.kafka.bus_shares.MAX_UNDECIDED", 6)
    await publisher.publish("t/1", b"6", qos=1)
    assert await numbers(member) == [[6]], "no more than so many wait"
    assert two.counters()["bus_groups_decided_early"] == 1
    two.bus.shares.joined = True
    two.bus.sender.arm()
    assert every(await numbers(member)) == list(range(6))
    assert two.counters()["bus_groups_undecided"] == 0


async def test_an_announcement_that_kafka_refuses_is_told_again(
    autojump_clock: MockClock, cluster: WholeCluster
) -> None:
    one, two, _ = await start(cluster)
    cluster.kafka.refuse = lambda record: (record.value or b"\0\0")[1] == Kind.GROUPS
    member = await two.connect("member", GROUP)
    await trio.sleep(SOON)
    assert one.counters()["bus_groups"] == 0
    cluster.kafka.refuse = lambda record: False
    await trio.sleep(2)
    assert one.counters()["bus_groups"] == 1
    publisher = await one.connect("publisher")
    await publisher.publish("t/1", b"0", qos=1)
    assert await numbers(member) == [[0]]


async def test_a_will_in_the_middle_of_a_delivery(
    autojump_clock: MockClock, cluster: WholeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery may end a client, whose Will goes out before the delivery is over: each has a choice of its own."""
    one, two, three = await start(cluster)
    members = [await node.connect(f"m-{node.node_id}", GROUP, "$share/h/t/#") for node in (one, two)]
    plain = await one.connect("plain")
    await plain.subscribe("t/#", subscription_identifier=1)  # its copies go out one by one
    publishers = [await node.connect(f"publisher-{node.node_id}") for node in (one, three)]
    await trio.sleep(SOON)
    broker = one.memory.broker
    send, wills = broker.sender.send, iter(range(1000, 2000))

    def ending(session: Session, delivery: Delivery, encodings: Any, now: float) -> None:
        if session.client_id == "plain" and delivery.message.topic_name != "t/will":
            will = Message("t/will", b"%d" % next(wills), 1, published_at=NOW)
            broker.publish(will, now, tapped=True)
        send(session, delivery, encodings, now)

    monkeypatch.setattr(broker.sender, "send", ending)
    for number in range(40):
        await publishers[number % 2].publish("t/1", b"%d" % number, qos=1)
    got = every(await numbers(*members))
    expected = [*range(40), *range(1000, 1040)]
    assert got == sorted(2 * expected), "once for each of the two groups"


async def test_retained_messages_are_not_for_groups(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two, three = await start(cluster)
    publisher = await one.connect("publisher")
    await publisher.publish("t/1", b"0", qos=1, retain=True)
    await trio.sleep(SOON)
    members = [await node.connect(f"m-{node.node_id}", GROUP) for node in (two, three)]
    assert await numbers(*members) == [[], []]
    await publisher.publish("t/1", b"1", qos=1, retain=True)
    assert every(await numbers(*members)) == [1]
    plain = await three.connect("plain", "t/#")
    assert await numbers(plain) == [[1]]


async def test_foreign_records_about_groups(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    """Garbage is counted; a group that is gone has nobody; hops come to an end."""
    one, two, _ = await start(cluster)
    member = await one.connect("member", GROUP)
    await trio.sleep(SOON)
    sequence = iter(range(1, 100))

    def write(kind: Kind, body: bytes, partition: int = 0) -> None:
        value = encode_header(kind, b"x" * 16, "foreign", next(sequence)) + body
        cluster.kafka.append("monster", partition, None, value)

    good = encode_news(GroupNews("$share/other/t/#", 3))
    for body in (b"", b"\x09", b"\0" + good[:-1], b"\0" + good + b"\xff"):
        write(Kind.GROUPS, body)
    await trio.sleep(SOON)
    assert one.counters()["bus_records_malformed"] == 4
    write(Kind.GROUPS, b"\x01" + good)
    message = encode_message(Message("t/1", b"0", 1, published_at=NOW))
    node, number = hash_of("one"), hash_of(GROUP)
    for pairs in ({number: hash_of("two")}, {hash_of("$share/gone/t/#"): node, number: hash_of("two")}):
        head = encode_choices([group.to_bytes(8, "big") + to.to_bytes(8, "big") for group, to in pairs.items()])
        write(Kind.BATCH, head + message, placed()[1])
    await trio.sleep(SOON)
    assert await numbers(member) == [[0, 0]], "two has no members, so it passed both on"
    assert two.counters()["bus_groups_passed_on"] == 2
    assert one.counters()["bus_groups_homeless"] == 1
    head = encode_choices([number.to_bytes(8, "big") + hash_of("two").to_bytes(8, "big")], hops=255)
    write(Kind.BATCH, head + message, placed()[1])
    assert await numbers(member) == [[]]
    assert two.counters()["bus_groups_homeless"] == 1
    assert one.counters()["bus_records_undelivered"] == two.counters()["bus_records_undelivered"] == 0


async def test_choices_survive_in_the_log(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two, _ = await start(cluster)
    await two.connect("member", GROUP)
    publisher = await one.connect("publisher")
    await trio.sleep(SOON)
    await publisher.publish("t/1", b"0", qos=2)
    await trio.sleep(SOON)
    value = cluster.kafka.log(*placed())[-1].value or b""
    (item,) = decode_items(value, decode_header(value).body_start)
    assert getattr(item, "choices", None) == {hash_of(GROUP): hash_of("two")}


# --- the table


def told(table: GroupTable, node: str, *ready: int, offset: int = 0) -> None:
    news = [GroupNews(f"$share/{number}/t", count, waits=not count) for number, count in enumerate(ready)]
    table.told(node, node.encode().ljust(16), news, offset, whole=True)


def shares_of(table: GroupTable, group: Group, rounds: int) -> Counter[int]:
    return Counter(next_turn(table.turns(group)).node for _ in range(rounds))


def test_turns_go_by_weight() -> None:
    table = GroupTable("me")
    told(table, "a", 3)
    told(table, "b", 1)
    group = table.groups["$share/0/t"]
    assert shares_of(table, group, 8) == {hash_of("a"): 6, hash_of("b"): 2}
    table.own_changed(group.name, 4, waits=False, kept=False)
    assert shares_of(table, group, 16) == {hash_of("a"): 6, hash_of("b"): 2, table.node: 8}
    assert [turn.node for turn in table.turns(group, away=True)] == [table.node]
    table.seen("a", b"a".ljust(16), live=False)
    assert shares_of(table, group, 10) == {hash_of("b"): 2, table.node: 8}
    table.own_changed(group.name, 0, waits=True, kept=True)
    assert shares_of(table, group, 4) == {hash_of("b"): 4}
    told(table, "b", 0)
    assert shares_of(table, group, 4) == {table.node: 4}


def test_a_new_life_replaces_the_old_one() -> None:
    table = GroupTable("me")
    told(table, "a", 1, 1)
    table.told("a", b"new".ljust(16), [GroupNews("$share/1/t", 2)], 9, whole=True)
    assert list(table.groups) == ["$share/1/t"]
    told(table, "b", 1)
    for _ in range(9):
        table.seen("b", b"new".ljust(16), live=True)
    assert list(table.groups) == ["$share/1/t"], "a life that says nothing of groups has none"
    assert len(table.router.match("t")) == 1


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.bus_groups.MAX_PLACES", 5)
    table = GroupTable("me")
    told(table, "a", *[1] * 8)
    assert (len(table.groups), table.left_out) == (5, 3)
    assert not table.own_changed("$share/mine/t", 1, waits=False, kept=False)
    told(table, "a", 1)
    assert table.own_changed("$share/mine/t", 1, waits=False, kept=False)
    monkeypatch.setattr("gateways.kafka.bus_groups.MAX_NAMES", 2000)
    assert not table.own_changed("$share/deep/" + "a/" * 100 + "#", 1, waits=False, kept=False)
    table.forget("a")
    table.own_gone(table.groups["$share/mine/t"])
    assert (table.groups, table.by_hash, table._places, table._names_size, table.router.count) == ({}, {}, 0, 0, 0)


def test_notes_that_are_none_are_removed() -> None:
    first = GroupTable("me", {})
    news = [GroupNews("$share/kept/t", kept=True, since=7), GroupNews("$share/clean/t", 1)]
    first.told("a", b"a" * 16, news, 9, whole=True)
    marks = {name: mark for name, mark in first.marks().items() if mark is not None}
    assert len(marks) == 1
    assert first.marks() == {}
    (name,) = marks
    second = GroupTable("me", {**marks, "kafka.share/x": b"", "kafka.share/y": marks[name][:-3], "other": b"1"})
    assert list(second.groups) == ["$share/kept/t"]
    assert second.groups["$share/kept/t"].places["a"].since == 7
    assert second.marks() == {"kafka.share/x": None, "kafka.share/y": None}
    assert [turn.node for turn in second.turns(second.groups["$share/kept/t"])] == [hash_of("a")]
    second.forget("a")
    assert second.marks() == {name: None}
