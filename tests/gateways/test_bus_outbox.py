"""What PUBACK promises of the bus, and what becomes of messages while Kafka is away [K22, S1]."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus_outgoing import NOTES, Outgoing
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.partitions import partition_for
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.errors import StoreError
from mqtt_trio.gateway import ReasonCode
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.packets import PubAck, Publish
from mqtt_trio.testing import ConnectionEndedError, NothingCameError, TestClient
from tests.gateways.honest import KEPT, Honest
from tests.gateways.whole_nodes import SOON, WholeCluster, WholeNode, drain, open_cluster

STORE = BusSettings(ack="store")
SPOOL = BusSettings(on_outage="spool")
BOTH = BusSettings(ack="store", on_outage="spool")


async def leave_behind(node: WholeNode, client_id: str, *filters: str) -> None:
    client = await node.connect(client_id, *filters, **KEPT)
    await client.disconnect()
    await trio.sleep(SOON)


async def heard(node: WholeNode, client_id: str) -> list[int]:
    client = await node.connect(client_id, **KEPT)
    messages = await drain(client)
    await client.disconnect()
    return [int(message.payload) for message in messages]


def store_of(cluster: WholeCluster, node_id: str) -> MemoryStore:
    store = cluster.stores[node_id]
    assert isinstance(store, MemoryStore)
    return store


def notes(cluster: WholeCluster, node_id: str) -> list[str]:
    """Records that a node's store has noted and not forgotten."""
    marks = store_of(cluster, node_id).state.marks
    return [name for name, value in marks.items() if name.startswith(NOTES) and value is not None]


def in_kafka(cluster: WholeCluster, topic: str = "t") -> int:
    """Records of the partition of a topic."""
    return len(cluster.kafka.log("monster", partition_for(topic.encode(), 12)))


# --- Ack


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("qos", [1, 2])
async def test_the_answer_comes_when_kafka_has_the_message(autojump_clock: MockClock, kept: bool, qos: int) -> None:
    async with open_cluster(attrs.evolve(STORE, ack_timeout=100)) as cluster:
        one, two = await cluster.start("one", kept=kept), await cluster.start("two")
        publisher = await one.connect("publisher")
        listener, at_home = await two.connect("listener", "t"), await one.connect("at home", "t")
        cluster.kafka.go_away()
        await publisher.send(Publish("t", b"1", QoS(qos), packet_id=1))
        assert (await at_home.next_message()).payload == b"1", "subscribers of the node do not wait"
        with pytest.raises(NothingCameError):
            await publisher.next_packet(timeout=60)
        assert in_kafka(cluster) == 0
        cluster.kafka.come_back()
        await publisher.next_packet(timeout=1)
        assert in_kafka(cluster) == 1
        assert (await listener.next_message()).payload == b"1"
        assert one.counters()["bus_messages_waiting"] == 0
        await trio.sleep(5)
        if kept:
            assert notes(cluster, "one") == []


async def test_by_default_it_comes_at_once(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        one = await cluster.start("one")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        began = trio.current_time()
        for qos in (1, 2):
            await publisher.publish("t", b"1", qos=qos)
        assert trio.current_time() - began < 0.001


@pytest.mark.parametrize("version", [ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0])
async def test_a_record_that_kafka_refuses_is_refused(autojump_clock: MockClock, version: ProtocolVersion) -> None:
    async with open_cluster(STORE) as cluster:
        one = await cluster.start("one")
        publisher = await one.connect("publisher", version=version)
        cluster.kafka.refuse = lambda record: record.messages > 0
        await publisher.send(Publish("t", b"1", QoS(1), packet_id=1))
        if version == ProtocolVersion.MQTT_5_0:
            answer = await publisher.expect(PubAck)
            assert answer.reason_code is ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
        else:
            await publisher.closed()
        assert one.counters()["bus_messages_failed"] == 1
        assert one.counters()["bus_messages_waiting"] == 0


@attrs.define
class Campaign:
    """An honest publisher at node one, sessions at both nodes, nodes that are killed, a Kafka that comes and goes."""

    cluster: WholeCluster
    rng: random.Random
    nodes: dict[str, WholeNode] = attrs.Factory(dict)

    async def start(self) -> None:
        for name in ("one", "two"):
            self.nodes[name] = await self.cluster.start(name)
            await leave_behind(self.nodes[name], f"kept at {name}", "t/#")

    async def connect(self) -> TestClient:
        while True:
            try:
                return await self.nodes["one"].connect("publisher", **KEPT)
            except (ConnectionEndedError, NothingCameError):
                await trio.sleep(0.01)

    async def kill(self, name: str) -> None:
        await self.nodes[name].kill()
        await trio.sleep(self.rng.choice([0.0, 0.001, 0.01, 1, 20]))
        self.nodes[name] = await self.cluster.start(name)

    async def disturb(self, outages: bool) -> None:
        rng = self.rng
        while True:
            await trio.sleep(rng.choice([0.0005, 0.001, 0.003, 0.005, 0.01, 0.03, 0.5, 2]))
            what = rng.random()
            if what < 0.4:
                await self.kill("one")
            elif what < 0.6:
                await self.kill("two")
            elif what < 0.8 and outages:
                self.cluster.kafka.go_away()
                await trio.sleep(rng.choice([0.001, 0.01, 0.5, 30]))
                if rng.random() < 0.5:
                    await self.kill(rng.choice(["one", "two"]))
                self.cluster.kafka.come_back()

    async def run(self, count: int, *, outages: bool) -> Honest:
        publisher = Honest(self.connect, window=self.rng.choice([1, 5, 20]))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.disturb, outages)
            for first in range(0, count, 20):
                numbers = range(first, min(first + 20, count))
                await publisher.publish(*numbers, topic=topic_of, qos=qos_of)
                await trio.sleep(self.rng.choice([0, 0.002, 0.5]))
            nursery.cancel_scope.cancel()
        self.cluster.kafka.come_back()
        for name, node in self.nodes.items():
            if node.scope.cancel_called:
                await node.ended.wait()
                self.nodes[name] = await self.cluster.start(name)
        await trio.sleep(30)
        return publisher


def topic_of(number: int) -> str:
    return f"t/{number % 3}"


def qos_of(number: int) -> int:
    return 1 + number // 3 % 2


def check(got: Sequence[int], publisher: Honest, count: int) -> None:
    """Everything is there, at QoS 2 once, first occurrences in order."""
    assert sorted(publisher.acknowledged) == list(range(count))
    counts = Counter(got)
    lost = [number for number in publisher.acknowledged if not counts[number]]
    doubled = [number for number, times in counts.items() if times > 1 and qos_of(number) == 2]
    assert (lost, doubled) == ([], [])
    for topic in range(3):
        for qos in (1, 2):
            firsts = dict.fromkeys(n for n in got if n % 3 == topic and qos_of(n) == qos)
            assert list(firsts) == sorted(firsts)


@pytest.mark.parametrize("seed", range(10))
async def test_kills_of_both_nodes_lose_and_double_nothing(autojump_clock: MockClock, seed: int) -> None:
    """Done when 3, with a Kafka that stays: what is acknowledged reaches the sessions of both nodes."""
    async with open_cluster(STORE) as cluster:
        cluster.kafka.twice = seed % 3 == 0
        campaign = Campaign(cluster, random.Random(seed))
        await campaign.start()
        publisher = await campaign.run(200, outages=False)
        for name, node in campaign.nodes.items():
            check(await heard(node, f"kept at {name}"), publisher, 200)
        assert notes(cluster, "one") == []


@pytest.mark.parametrize("seed", range(10))
async def test_kills_and_outages_lose_and_double_nothing(autojump_clock: MockClock, seed: int, tmp_path: Path) -> None:
    """Done when 3: Kafka restarts meanwhile, and the spool takes what it cannot."""
    async with open_cluster(BOTH, tmp_path) as cluster:
        campaign = Campaign(cluster, random.Random(1000 + seed))
        await campaign.start()
        publisher = await campaign.run(200, outages=True)
        for name, node in campaign.nodes.items():
            check(await heard(node, f"kept at {name}"), publisher, 200)
        await trio.sleep(10)
        assert notes(cluster, "one") == []
        counters = campaign.nodes["one"].counters()
        assert (counters["bus_spool_messages"], counters["bus_messages_waiting"]) == (0, 0)


# --- OnOutage


def publishes(client: TestClient, count: int, **more: Any) -> list[Publish]:
    return [Publish("t", b"%d" % number, QoS(1), packet_id=number + 1, **more) for number in range(count)]


@pytest.mark.parametrize("settings", [SPOOL, BOTH])
@pytest.mark.parametrize("killed", [False, True])
async def test_an_outage_goes_over_the_spool(
    autojump_clock: MockClock, tmp_path: Path, settings: BusSettings, killed: bool
) -> None:
    """More than the window holds, in order, at QoS 1 and 2, over a kill of the node as well."""
    settings = attrs.evolve(settings, window_messages=1000)
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        await leave_behind(two, "kept", "t/#")
        publisher = await one.connect("publisher", **KEPT)
        cluster.kafka.go_away()
        for number in range(3000):
            await publisher.publish(f"t/{number % 3}", b"%d" % number, qos=1 + number % 2)
        await trio.sleep(5)
        assert one.counters()["bus_messages_waiting"] == 0
        assert one.counters()["bus_spool_messages"] >= 3000 / 2
        assert one.counters()["bus_publishers_stopped"] == 0
        if killed:
            await one.kill()
            one = await cluster.start("one")
            assert one.counters()["bus_messages_resumed"] == 3000
            publisher = await one.connect("publisher", **KEPT)
        for number in range(3000, 3100):
            await publisher.publish(f"t/{number % 3}", b"%d" % number, qos=1 + number % 2)
        cluster.kafka.come_back()
        for number in range(3100, 3200):
            await publisher.publish(f"t/{number % 3}", b"%d" % number, qos=1 + number % 2)
        await trio.sleep(20)
        got = await heard(two, "kept")
        assert Counter(got) == Counter(range(3200))
        for each in range(6):
            of_one_kind = [number for number in got if number % 6 == each]
            assert of_one_kind == sorted(of_one_kind)
        counters = one.counters()
        assert counters["bus_spool_messages"] == counters["bus_messages_waiting"] == counters["bus_spool_lost"] == 0
        assert not one.bus.outbox.spooling


async def test_what_was_on_its_way_when_kafka_went_away_is_written_as_well(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with open_cluster(SPOOL, tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        await leave_behind(two, "kept", "t")
        publisher = await one.connect("publisher")
        trouble, cluster.kafka.watchers = list(cluster.kafka.watchers), []
        one.bus.outbox.trouble = lambda: None  # nobody has noticed yet
        cluster.kafka.go_away()
        for number in range(10):
            await publisher.publish("t", b"%d" % number, qos=1)
            await trio.sleep(0.01)
        assert one.counters()["bus_messages_waiting"] == 10
        one.bus.outbox.trouble = cluster.kafka.trouble
        for look in trouble:
            look()
        await trio.sleep(SOON)
        await one.kill()
        cluster.kafka.watchers = trouble
        cluster.kafka.come_back()
        await cluster.start("one")
        await trio.sleep(SOON)
        assert await heard(two, "kept") == list(range(10))


@pytest.mark.parametrize("settings", [SPOOL, BOTH])
async def test_a_window_that_is_full_when_the_outage_is_noticed_stops_nobody(
    autojump_clock: MockClock, tmp_path: Path, settings: BusSettings
) -> None:
    settings = attrs.evolve(settings, window_messages=100)
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one", kept=False), await cluster.start("two")
        await leave_behind(two, "kept", "t")
        early, late = await one.connect("early"), await one.connect("late")
        watchers, cluster.kafka.watchers = list(cluster.kafka.watchers), []
        one.bus.outbox.trouble = lambda: None  # nobody has noticed yet
        cluster.kafka.go_away()
        for publish in publishes(early, 150):
            await early.send(publish)
        await trio.sleep(SOON)
        assert one.counters()["bus_messages_waiting"] == 150
        assert one.counters()["bus_messages_held"] == 50
        one.bus.outbox.trouble, cluster.kafka.watchers = cluster.kafka.trouble, watchers
        for look in watchers:
            look()
        for _ in range(150):
            await early.expect(PubAck)
        for number in range(150, 450):
            await late.publish("t", b"%d" % number, qos=1)
        await trio.sleep(SOON)
        assert one.counters()["bus_messages_waiting"] == 0
        cluster.kafka.come_back()
        await trio.sleep(SOON)
        assert await heard(two, "kept") == list(range(450))
        assert one.counters()["bus_messages_waiting"] == one.counters()["bus_spool_messages"] == 0
        assert one.bus.outbox.spool is not None
        assert one.bus.outbox.spool._aside_messages == one.bus.outbox.spool._aside_size == 0


@pytest.mark.parametrize("settings", [SPOOL, BOTH])
async def test_a_node_that_is_stopped_in_an_outage_leaves_nothing_behind(
    autojump_clock: MockClock, tmp_path: Path, settings: BusSettings
) -> None:
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        await leave_behind(two, "kept", "t")
        publisher = await one.connect("publisher")
        for number in range(5):
            await publisher.publish("t", b"%d" % number, qos=2)
        cluster.kafka.go_away()
        for number in range(5, 10):
            await publisher.publish("t", b"%d" % number, qos=2)
        began = trio.current_time()
        with trio.move_on_after(10):
            await one.bus.stop()
        assert trio.current_time() - began <= 10
        assert one.memory.storage is not None
        await one.memory.storage.stop()
        await one.kill()
        cluster.kafka.come_back()
        await cluster.start("one")
        await trio.sleep(SOON)
        assert await heard(two, "kept") == list(range(10))


async def test_a_start_without_kafka_goes_over_the_spool(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with open_cluster(BOTH, tmp_path) as cluster:
        two = await cluster.start("two")
        await leave_behind(two, "kept", "t")
        cluster.kafka.go_away()
        for life in range(3):
            one = await cluster.start("one")
            publisher = await one.connect("publisher")
            await publisher.publish("t", b"%d" % (2 * life), qos=2)
            await publisher.publish("t", b"%d" % (2 * life + 1), qos=2)
            await one.kill()
        one = await cluster.start("one")
        cluster.kafka.come_back()
        await trio.sleep(30)
        assert await heard(two, "kept") == list(range(6))


async def test_a_full_spool_stops_publishers_and_loses_nothing(autojump_clock: MockClock, tmp_path: Path) -> None:
    settings = attrs.evolve(SPOOL, window_messages=100, spool_bytes=512 * 1024)
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        await leave_behind(two, "kept", "t")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        acknowledged = 0
        payload = bytes(1000)

        async def publish() -> None:
            nonlocal acknowledged
            for number in range(1000):
                await publisher.publish("t", b"%d" % number + payload, qos=1)
                acknowledged += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            await trio.sleep(60)
            assert 100 < acknowledged < 700
            assert one.counters()["bus_messages_held"] > 0
            directory = tmp_path / "one" / "spool-bus-monster"
            assert sum(path.stat().st_size for path in directory.iterdir()) <= 512 * 1024 + 4096
            cluster.kafka.come_back()
        await trio.sleep(60)
        client = await two.connect("kept", **KEPT)
        assert [int(message.payload[:-1000]) for message in await drain(client)] == list(range(1000))


@pytest.mark.parametrize("version", [ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0])
async def test_reject(autojump_clock: MockClock, version: ProtocolVersion) -> None:
    async with open_cluster(BusSettings(on_outage="reject")) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        listener = await two.connect("listener", "t")
        at_home = await one.connect("at home", "t")
        cluster.kafka.go_away()
        for qos in (1, 2):
            publisher = await one.connect(f"publisher {qos}", version=version)
            await publisher.send(Publish("t", b"no", QoS(qos), packet_id=1))
            if version == ProtocolVersion.MQTT_5_0:
                answer = await publisher.next_packet()
                assert getattr(answer, "reason_code", None) is ReasonCode.QUOTA_EXCEEDED
            else:
                await publisher.closed()
        assert one.counters()["bus_messages_rejected"] == 2
        cluster.kafka.come_back()
        publisher = await one.connect("publisher", version=version)
        await publisher.publish("t", b"yes", qos=1)
        assert [message.payload for message in await drain(listener)] == [b"yes"]
        assert [message.payload for message in await drain(at_home)] == [b"yes"], "nobody has what was refused"


async def test_drop(autojump_clock: MockClock) -> None:
    async with open_cluster(BusSettings(on_outage="drop")) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        listener = await two.connect("listener", "t")
        at_home = await one.connect("at home", "t")
        publisher = await one.connect("publisher")
        await publisher.publish("t", b"before", qos=1)
        await trio.sleep(SOON)
        cluster.kafka.go_away()
        for _ in range(7):
            await publisher.publish("t", b"dropped", qos=2)
        assert one.counters()["bus_messages_turned_away"] == 7
        cluster.kafka.come_back()
        await publisher.publish("t", b"behind", qos=1)
        assert [message.payload for message in await drain(listener)] == [b"before", b"behind"]
        assert len(await drain(at_home)) == 9


async def test_qos_0_keeps_to_the_window(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with open_cluster(attrs.evolve(SPOOL, window_messages=10), tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        listener = await two.connect("listener", "t")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        for number in range(50):
            await publisher.publish("t", b"%d" % number, qos=0)
            await publisher.publish("t", b"sure %d" % number, qos=1)
            await trio.sleep(0.05)
        cluster.kafka.come_back()
        got = [message.payload for message in await drain(listener, 5)]
        assert [payload for payload in got if payload.startswith(b"sure")] == [b"sure %d" % n for n in range(50)]
        assert len(got) + one.counters()["bus_messages_dropped"] == 100


async def test_a_store_that_fails_lets_nothing_out(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not noted does not leave: a kill would make two messages of it."""
    async with open_cluster(STORE) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        listener = await two.connect("listener", "t")
        publisher = await one.connect("publisher", **KEPT)
        await trio.sleep(5)

        def broken(batch: Batch) -> None:
            raise StoreError("planned: no space")

        with monkeypatch.context() as patch:
            patch.setattr(store_of(cluster, "one"), "commit", broken)
            await publisher.send(Publish("t", b"1", QoS(2), packet_id=1))
            with pytest.raises(NothingCameError):
                await publisher.next_packet(timeout=20)
            assert in_kafka(cluster) == 0
            other = await one.connect("other")
            await other.send(Publish("t", b"2", QoS(1), packet_id=2))
            assert (await other.expect(PubAck)).reason_code is ReasonCode.QUOTA_EXCEEDED
        assert [message.payload for message in await drain(listener, 20)] == [b"1"]


async def test_damaged_notes_are_told_and_left_out(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with open_cluster(STORE) as cluster:
        await cluster.start("one")
        two = await cluster.start("two")
        await leave_behind(two, "kept", "t")
        await two.kill()
        marks = store_of(cluster, "two").state.marks
        marks[f"{NOTES}{7:020d}"] = b"\x09garbage that is no record"
        marks[f"{NOTES}x"] = Outgoing(3, b"value", 1, 9).packed()
        two = await cluster.start("two")
        await trio.sleep(5)
        assert "is lost" in caplog.text
        assert notes(cluster, "two") == []
        assert await heard(two, "kept") == []
