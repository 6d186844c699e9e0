"""Announcements, and two nodes with one Node.Id [K21]."""

from __future__ import annotations

import attrs
import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus_records import Flag, Header, Kind
from gateways.kafka.node_facts import NodeFacts
from gateways.kafka.nodes import ANNOUNCE_INTERVAL, GRACE, SILENCE, Nodes
from mqtt_trio.errors import StartError
from tests.gateways.memory_bus import MemoryKafka, start_node

FACTS = NodeFacts("here", 1, 1000.0)


class Sent:
    """Stands for the producer."""

    def __init__(self) -> None:
        self.records: list[tuple[Kind, NodeFacts]] = []

    def __call__(self, kind: Kind, facts: NodeFacts, settled: object) -> None:
        self.records.append((kind, facts))

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind, _ in self.records]


def header(kind: Kind, instance: bytes, node_id: str = "n") -> Header:
    return Header(kind, instance, node_id, 1, Flag.NONE, 0)


def other(offset: int, *, partition: int = 3, target: bytes = bytes(16), started_at: float = 2000.0) -> NodeFacts:
    return NodeFacts("there", 2, started_at, partition, offset, target)


A, B, C = (bytes((number,)) * 16 for number in (1, 2, 3))


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def nodes(sent: Sent) -> Nodes:
    """A node whose HELLO lies at offset 10 of partition 3."""
    nodes = Nodes("n", A, FACTS, sent)
    nodes.read_back(Kind.HELLO, 3, 10)
    return nodes


async def test_later_hello_is_answered(nodes: Nodes, sent: Sent) -> None:
    nodes.heard(header(Kind.HELLO, B), FACTS, 3, 11)
    assert sent.records == [(Kind.ALIVE, attrs.evolve(FACTS, hello_partition=3, hello_offset=10, target=B))]
    assert not nodes.conflict.is_set()


async def test_a_flood_of_hellos_gets_one_answer(nodes: Nodes, sent: Sent) -> None:
    for offset in range(11, 100):
        nodes.heard(header(Kind.HELLO, B), FACTS, 3, offset)
    assert sent.kinds == [Kind.ALIVE]


async def test_other_ids_are_no_conflict(nodes: Nodes, sent: Sent) -> None:
    nodes.heard(header(Kind.HELLO, B, "m"), FACTS, 3, 11)
    nodes.heard(header(Kind.ANNOUNCE, B, "m"), other(5), 3, 12)
    assert not sent.records
    assert not nodes.conflict.is_set()
    assert nodes.known[B].node_id == "m"


async def test_alive_of_an_earlier_node_ends_this_one(nodes: Nodes) -> None:
    nodes.heard(header(Kind.ALIVE, B), other(5, target=A), 3, 12)
    assert nodes.conflict.is_set()
    text = nodes.conflict_text
    assert "'n'" in text
    assert "host there, pid 2, running since 1970-01-01T00:33:20Z" in text
    assert B.hex() in text


async def test_announcement_of_an_earlier_node_ends_this_one(nodes: Nodes) -> None:
    nodes.heard(header(Kind.ANNOUNCE, B), other(5), 3, 12)
    assert nodes.conflict.is_set()


@pytest.mark.parametrize("kind", [Kind.ANNOUNCE, Kind.ALIVE])
async def test_words_of_a_node_that_was_killed_mean_nothing(nodes: Nodes, sent: Sent, kind: Kind) -> None:
    nodes.heard(header(kind, B), other(5, target=A), 3, 9)  # before our own HELLO at 10
    assert not nodes.conflict.is_set()
    assert not sent.records


async def test_alive_for_somebody_else_means_nothing(nodes: Nodes) -> None:
    nodes.heard(header(Kind.ALIVE, B), other(5, target=C), 3, 12)
    assert not nodes.conflict.is_set()


async def test_doubled_hello_does_not_turn_the_order(nodes: Nodes, sent: Sent) -> None:
    """A(10), B(12), A again (15): B may take A for the later one; A knows better and says so."""
    nodes.read_back(Kind.HELLO, 3, 15)
    assert nodes.facts.hello_offset == 10
    nodes.heard(header(Kind.ALIVE, B), other(12, target=A), 3, 16)
    assert not nodes.conflict.is_set()
    assert sent.kinds == [Kind.ALIVE]


async def test_rank_is_the_start_time_where_the_topic_grew(nodes: Nodes, sent: Sent) -> None:
    nodes.heard(header(Kind.ANNOUNCE, B), other(1, partition=7), 7, 2)
    assert not nodes.conflict.is_set()
    assert sent.kinds == [Kind.ALIVE]
    nodes.heard(header(Kind.ANNOUNCE, C), other(1, partition=7, started_at=10.0), 7, 3)
    assert nodes.conflict.is_set()


async def test_node_without_rank_neither_objects_nor_ends(sent: Sent) -> None:
    nodes = Nodes("n", A, FACTS, sent)
    nodes.heard(header(Kind.HELLO, B), FACTS, 3, 11)
    nodes.heard(header(Kind.ANNOUNCE, B), other(11), 3, 12)
    assert not sent.records
    assert not nodes.conflict.is_set()


async def test_second_node_ends_and_first_stays(autojump_clock: MockClock) -> None:
    kafka = MemoryKafka()
    async with trio.open_nursery() as nursery:
        first = await start_node(nursery, kafka, "one")
        began = trio.current_time()
        second = await start_node(nursery, kafka, "one")
        assert isinstance(second.error, StartError)
        assert "Node.Id 'one' is taken" in str(second.error)
        assert first.host.instance_id.hex() in str(second.error)
        assert trio.current_time() - began < GRACE
        await trio.sleep(3 * ANNOUNCE_INTERVAL)
        assert not first.ended.is_set()
        third = await start_node(nursery, kafka, "two")
        assert third.error is None
        nursery.cancel_scope.cancel()


async def test_of_two_that_start_together_one_stays(autojump_clock: MockClock) -> None:
    kafka = MemoryKafka()
    started: list[object] = []

    async def start(nursery: trio.Nursery) -> None:
        started.append(await start_node(nursery, kafka, "one"))

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as both:
            both.start_soon(start, nursery)
            both.start_soon(start, nursery)
        errors = [node.error for node in started]  # type: ignore[attr-defined]
        assert sorted(type(error).__name__ for error in errors) == ["NoneType", "StartError"]
        nursery.cancel_scope.cancel()


async def test_restart_after_kill_is_no_second_node(autojump_clock: MockClock) -> None:
    kafka = MemoryKafka()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            node = await start_node(nursery, kafka, "one")
            assert node.error is None
            await trio.sleep(ANNOUNCE_INTERVAL)
            node.kill()
            await node.ended.wait()
        assert node.error is None


async def test_conflict_shows_when_kafka_comes_later(autojump_clock: MockClock) -> None:
    kafka = MemoryKafka()
    kafka.go_away()
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as both:
            nodes = []

            async def start() -> None:
                nodes.append(await start_node(nursery, kafka, "one"))

            both.start_soon(start)
            both.start_soon(start)
        assert [node.error for node in nodes] == [None, None]
        kafka.come_back()
        await trio.sleep(3 * ANNOUNCE_INTERVAL)
        errors = [node.error for node in nodes]
        assert sorted(type(error).__name__ for error in errors) == ["NoneType", "StartError"]
        nursery.cancel_scope.cancel()


async def test_nodes_come_go_and_fall_silent(autojump_clock: MockClock) -> None:
    kafka = MemoryKafka()
    async with trio.open_nursery() as nursery:
        one = await start_node(nursery, kafka, "one")
        two = await start_node(nursery, kafka, "two")
        three = await start_node(nursery, kafka, "three")
        await trio.sleep(ANNOUNCE_INTERVAL)
        assert sorted(node.node_id for node in one.bus.nodes.known.values()) == ["three", "two"]
        await two.bus.stop()
        await trio.sleep(1)
        assert [node.node_id for node in one.bus.nodes.known.values()] == ["three"]
        three.kill()
        await trio.sleep((SILENCE + 2) * ANNOUNCE_INTERVAL)
        assert not one.bus.nodes.known
        nursery.cancel_scope.cancel()


async def test_announcements_do_not_pile_up(autojump_clock: MockClock) -> None:
    kafka = MemoryKafka()
    async with trio.open_nursery() as nursery:
        one = await start_node(nursery, kafka, "one")
        kafka.go_away()
        await trio.sleep(100 * ANNOUNCE_INTERVAL)
        kafka.come_back()
        before = len(kafka.records("monster"))
        await trio.sleep(1)
        assert len(kafka.records("monster")) - before <= 1
        assert one.error is None
        nursery.cancel_scope.cancel()
