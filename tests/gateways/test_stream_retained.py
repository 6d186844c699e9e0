"""Records of mqtt.messages that set or remove retained messages [K11, K23]: their offsets wait until a kill of the node
cannot take from the cluster what they retain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.group_poller import Membership
from gateways.kafka.stream_in import StreamIn
from mqtt_trio.gateway import ReasonCode
from tests.gateways.test_retained_kills import everywhere
from tests.gateways.test_stream_in import Disk, FakeLetters, World
from tests.gateways.whole_nodes import SOON, WholeCluster, WholeNode, open_cluster

SPOOLED = BusSettings(on_outage="spool")
RECORDS = [
    {"topic": "changed", "payload": "new", "retained": True},
    {"topic": "removed", "payload": "", "retained": True},
    {"topic": "added", "payload": "x", "retained": True},
    {"topic": "twice", "payload": "1", "retained": True, "qos": 2},
    {"topic": "twice", "payload": "2", "retained": True},
    {"topic": "back", "payload": "", "retained": True},
    {"topic": "back", "payload": "again", "retained": True},
]
WANTED = {"changed": b"new", "added": b"x", "twice": b"2", "back": b"again"}
kept_or_not = pytest.mark.parametrize("kept", [True, False], ids=["store", "no-store"])


@attrs.define
class Group:
    """What Kafka knows of the consumer group: how far it is."""

    offset: int = 0
    world: World | None = None

    async def join(self, node: WholeNode, *, records: bool = True) -> World:
        """Let a node read from where the group is."""
        stream = StreamIn(node.memory.host.local_client("stream"), FakeLetters())
        await node.memory.nursery.start(stream.run)
        self.world = World(node.memory, stream, FakeLetters(), Membership(), end=self.offset)
        if records:
            self.world.put(*RECORDS[self.offset :])
        return self.world

    def note(self) -> None:
        """Store the offset, as is done ten times a second: what is done with now."""
        assert self.world is not None
        self.offset = max(self.offset, self.world.done)


async def before(cluster: WholeCluster, *, kept: bool) -> tuple[WholeNode, WholeNode]:
    """Start two nodes, the second one with a store, and have some messages retained."""
    one, two = await cluster.start("one", kept=kept), await cluster.start("two")
    publisher = await two.connect("publisher")
    for topic in ("changed", "removed", "back"):
        await publisher.publish(topic, b"old", qos=1, retain=True)
    await trio.sleep(10)
    return one, two


@kept_or_not
async def test_a_kill_at_every_step(autojump_clock: MockClock, tmp_path: Path, kept: bool) -> None:
    advanced = set()
    for step in range(60):
        async with open_cluster(SPOOLED, tmp_path / str(step)) as cluster:
            one, two = await before(cluster, kept=kept)
            group = Group()
            await group.join(one)
            await trio.sleep(step * 0.0002)
            group.note()
            await one.kill()
            advanced.add(group.offset)
            one = await cluster.start("one", kept=kept)
            await group.join(one)
            assert await everywhere(cluster, one, two) == WANTED, f"step {step}: {group.offset} were done with"
            group.note()
            assert group.offset == len(RECORDS)
    assert {0, len(RECORDS)} <= advanced


@kept_or_not
async def test_a_kill_in_an_outage(autojump_clock: MockClock, tmp_path: Path, kept: bool) -> None:
    """The spool of the bus has the messages for the other nodes; where there is no session store, nothing has what they
    retain, so the records stay in Kafka."""
    async with open_cluster(SPOOLED, tmp_path) as cluster:
        one, two = await before(cluster, kept=kept)
        cluster.kafka.go_away()
        group = Group()
        await group.join(one)
        await trio.sleep(60)
        group.note()
        assert group.offset == (len(RECORDS) if kept else 0)
        await one.kill()
        cluster.kafka.come_back()
        one = await cluster.start("one", kept=kept)
        await group.join(one)
        assert await everywhere(cluster, one, two) == WANTED
        group.note()
        assert group.offset == len(RECORDS)


async def lose(node: WholeNode, topic: str) -> None:
    """Have a node without a retained message that the others have, as when no record could hold it."""
    node.memory.broker.retained.remove(topic)
    node.memory.broker.keeper.retained_gone(topic)
    node.memory.host.commit()
    await trio.sleep(1)


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("settings", [SPOOLED, BusSettings(ack="store", on_outage="spool")], ids=["none", "store"])
async def test_a_client_removes_a_message_that_only_others_have(
    autojump_clock: MockClock, tmp_path: Path, qos: int, settings: BusSettings
) -> None:
    """PUBACK, or PUBCOMP: whatever is killed, the others learn of it."""
    answered = set()
    for step in range(40):
        async with open_cluster(settings, tmp_path / str(step)) as cluster:
            one, two = await before(cluster, kept=True)
            await lose(one, "removed")
            publisher = await one.connect("p")
            acknowledged = False
            with trio.move_on_after(step * 0.0005):
                await publisher.publish("removed", b"", qos=qos, retain=True)
                acknowledged = True
            await one.kill()
            one = await cluster.start("one")
            found = await everywhere(cluster, one, two)
            assert not (acknowledged and "removed" in found), f"step {step}"
            answered.add(acknowledged)
    assert answered == {True, False}


@pytest.mark.parametrize("topic", ["removed", "unknown"])
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_client_that_removes_is_refused_when_the_store_fails(
    autojump_clock: MockClock, tmp_path: Path, qos: int, topic: str
) -> None:
    """At once, and what it sends behind that is answered, too: nothing waits for the end of the outage."""
    async with open_cluster(SPOOLED, tmp_path) as cluster:
        disk = cluster.stores["one"] = Disk()
        one, _ = await before(cluster, kept=True)
        publisher = await one.connect("p")
        disk.broken = True
        began = trio.current_time()
        assert await publisher.publish(topic, b"", qos=qos, retain=True) == ReasonCode.QUOTA_EXCEEDED
        assert await publisher.publish("t", b"not kept", qos=qos) == ReasonCode.SUCCESS
        assert trio.current_time() - began < 1
        disk.broken = False
        await trio.sleep(60)
        assert await publisher.publish(topic, b"", qos=qos, retain=True) == ReasonCode.SUCCESS


@kept_or_not
async def test_what_removes_a_message_that_only_others_have(
    autojump_clock: MockClock, tmp_path: Path, kept: bool
) -> None:
    """Nothing of it is in this node's journal: there is nothing to remove."""
    for step in range(30):
        async with open_cluster(SPOOLED, tmp_path / str(step)) as cluster:
            one, two = await before(cluster, kept=kept)
            await lose(one, "removed")
            group = Group()
            world = await group.join(one, records=False)
            world.put({"topic": "removed", "payload": "", "retained": True})
            await trio.sleep(step * 0.0005)
            group.note()
            await one.kill()
            one = await cluster.start("one", kept=kept)
            world = await group.join(one, records=False)
            if not group.offset:
                world.put({"topic": "removed", "payload": "", "retained": True})
            assert "removed" not in await everywhere(cluster, one, two), f"step {step}: {group.offset}"


async def test_what_kafka_does_not_take_is_a_letter(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with open_cluster(SPOOLED, tmp_path) as cluster:
        one, _ = await before(cluster, kept=False)
        cluster.kafka.refuse = lambda record: record.key == b"t"
        group = Group()
        world = await group.join(one, records=False)
        letters: Any = world.stream._letters
        world.put({"topic": "t", "payload": "x", "retained": True}, {"topic": "u", "payload": "x", "retained": True})
        await trio.sleep(SOON)
        assert world.done == 2
        assert [(offset, redrivable) for offset, _, _, redrivable in letters.letters] == [(0, False)]
