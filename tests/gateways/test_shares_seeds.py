"""Share groups over three nodes, played at random: each message once for each group [K23].

30 seeds of each kind run always; `SEED=7 scripts/test unit tests/gateways/test_shares_seeds.py` plays one again,
`SEED=100-999` others.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus_settings import BusSettings
from mqtt_trio.testing import ConnectionEndedError, TestClient
from tests.gateways.whole_nodes import WholeCluster, WholeNode, open_cluster

GROUPS = ("$share/g/t/#", "$share/h/t/+")
NAMES = ("one", "two", "three")
KEPT = {"session_expiry_interval": 1_000_000, "clean_start": False}


def seeds() -> list[int]:
    first, _, last = os.environ.get("SEED", "0-29").partition("-")
    return list(range(int(first), int(last or first) + 1))


@attrs.define
class Member:
    """One client of one node, with at most one group."""

    node_id: str
    client_id: str
    topic_filter: str
    kept: bool
    qos: int
    client: TestClient | None = None
    got: list[int] = attrs.Factory(list)

    @property
    def group(self) -> str:
        return self.topic_filter if self.topic_filter in GROUPS else self.client_id


@attrs.define
class Play:
    """One script."""

    seed: int
    cluster: WholeCluster
    kills: bool
    rng: random.Random = attrs.Factory(lambda self: random.Random(self.seed), takes_self=True)
    nodes: dict[str, WholeNode] = attrs.Factory(dict)
    members: list[Member] = attrs.Factory(list)
    publishers: dict[str, TestClient] = attrs.Factory(dict)
    sent: dict[int, int] = attrs.Factory(dict)
    """QoS by number."""
    doubtful: set[int] = attrs.Factory(set)
    """Their publisher got no answer."""
    story: list[str] = attrs.Factory(list)

    def tell(self, text: str) -> None:
        self.story.append(f"{trio.current_time():8.3f} {text}")

    async def begin(self) -> None:
        for name in NAMES:
            await self.start(name)
            self.members.append(Member(name, f"all-{name}", "t/#", True, 2))
        for group in GROUPS:
            for name in NAMES:
                for number in range(self.rng.randrange(3)):
                    kept = self.kills or self.rng.random() < 0.6
                    qos = 2 if kept else 1  # a QoS 2 delivery that has begun ends with its session [MQTT5-4.8.2-5]
                    self.members.append(Member(name, f"{group[7]}-{name}-{number}", group, kept, qos))
        for group in GROUPS:  # somebody is always owed it, and never gives up
            self.members.append(Member(self.rng.choice(NAMES), f"{group[7]}-stays", group, True, 2))
        for member in self.members:
            if "all" in member.client_id or "stays" in member.client_id or self.rng.random() < 0.5:
                await self.join(member)
        await trio.sleep(1)

    async def start(self, name: str) -> None:
        self.nodes[name] = await self.cluster.start(name)
        self.publishers[name] = await self.nodes[name].connect(f"publisher-{name}")

    async def join(self, member: Member) -> None:
        options = KEPT if member.kept else {}
        client = await self.nodes[member.node_id].connect(member.client_id, **options)
        assert client.connack is not None
        if not client.connack.session_present:
            await client.subscribe(member.topic_filter, qos=member.qos)
        member.client = client
        self.tell(f"{member.client_id} joins {member.node_id}")

    async def read(self, member: Member) -> None:
        if member.client is not None:
            numbers = [int(message.payload) for message in await member.client.waiting_messages()]
            member.got += numbers
            if numbers:
                self.tell(f"{member.client_id} gets {numbers}")

    async def leave(self, member: Member) -> None:
        assert member.client is not None
        client, member.client = member.client, None
        if not member.kept and self.rng.random() < 0.3:
            await client.unsubscribe(member.topic_filter)
            member.client = client
            await self.read(member)  # what it was sent stays its own
            member.client = None
        await client.disconnect()
        self.tell(f"{member.client_id} leaves")

    async def publish(self) -> None:
        name = self.rng.choice(NAMES)
        if name not in self.nodes:
            return
        number = len(self.sent)
        qos = self.sent[number] = self.rng.choice([0, 1, 1, 2, 2])
        self.tell(f"{number} at QoS {qos} to {name}")
        if not qos and self.rng.random() < 0.5:  # a run
            self.sent.update(dict.fromkeys(range(number, number + 3), 0))
            for each in range(number, number + 3):
                with suppress(ConnectionEndedError):
                    await self.publishers[name].publish("t/run", b"%d" % each)
            return
        try:
            await self.publishers[name].publish(f"t/{number % 7}", b"%d" % number, qos=qos)
        except ConnectionEndedError:
            self.doubtful.add(number)

    async def kill(self, *, during: bool) -> None:
        name = self.rng.choice(list(self.nodes))
        async with trio.open_nursery() as nursery:
            if during:
                nursery.start_soon(self.publish)
                await trio.sleep(self.rng.choice([0, 0, 0.0005, 0.001, 0.004]))
            node = self.nodes.pop(name)
            await node.kill()
            self.tell(f"{name} is killed")
        for member in self.members:
            if member.node_id == name:
                member.client = None

    async def step(self) -> None:
        rng, roll = self.rng, self.rng.random()
        here = [member for member in self.members if member.node_id in self.nodes]
        member = rng.choice(here)
        if roll < 0.5:
            await self.publish()
        elif roll < 0.65:
            await self.read(member)
        elif roll < 0.85:
            if member.client is None:
                await self.join(member)
            elif "all" not in member.client_id:
                await self.leave(member)
        elif roll < 0.9 and self.kills:
            if len(self.nodes) > 1:
                await self.kill(during=rng.random() < 0.5)
        elif roll < 0.95 and self.kills:
            for name in NAMES:
                if name not in self.nodes:
                    await self.start(name)
                    self.tell(f"{name} is back")
        elif roll > 0.97:
            if self.cluster.kafka.here.is_set():
                self.tell("Kafka goes away")
                self.cluster.kafka.go_away()
            else:
                self.tell("Kafka is back")
                self.cluster.kafka.come_back()
        await trio.sleep(rng.choice([0, 0, 0, 0.001, 0.002, 0.005, 0.1, 3, 30] if roll > 0.6 else [0, 0, 0.001]))

    async def end(self) -> None:
        self.cluster.kafka.come_back()
        for name in NAMES:
            if name not in self.nodes:
                await self.start(name)
        await trio.sleep(30)
        for member in self.members:
            if member.client is None and member.kept:
                await self.join(member)
        for _ in range(5):
            for member in self.members:
                await self.read(member)
            await trio.sleep(3)

    def judge(self) -> None:
        for group in {member.group for member in self.members}:
            got = Counter(number for member in self.members if member.group == group for number in member.got)
            for number, qos in self.sent.items():
                told = f"{number} (QoS {qos}) came {got[number]} times to {group}, seed {self.seed}"
                if qos and number not in self.doubtful:
                    assert got[number] >= 1, "\n".join([*self.story, told])
                if qos == 2 or not self.kills or qos == 0:
                    assert got[number] <= 1, "\n".join([*self.story, told])


@pytest.mark.parametrize("seed", seeds())
async def test_once_while_members_come_and_go_and_kafka_is_away(
    autojump_clock: MockClock, seed: int, tmp_path: Path
) -> None:
    async with open_cluster(BusSettings(on_outage="spool"), tmp_path) as cluster:
        await played(Play(seed, cluster, kills=False), 60)


@pytest.mark.parametrize("seed", seeds())
async def test_once_while_nodes_are_killed(autojump_clock: MockClock, seed: int, tmp_path: Path) -> None:
    """QoS 1 may come twice, when the node of its member was killed before it knew that the member has it."""
    async with open_cluster(BusSettings(ack="store", on_outage="spool"), tmp_path) as cluster:
        cluster.kafka.twice = seed % 3 == 0
        await played(Play(seed, cluster, kills=True), 60)


async def played(play: Play, steps: int) -> None:
    await play.begin()
    for _ in range(steps):
        await play.step()
    await play.end()
    play.judge()
    assert play.sent
