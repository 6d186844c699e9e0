"""Retained messages of the cluster over kills, outages and stops: the last acknowledged one holds [K22, K23]."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.retained_marks import MARKS
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.errors import StoreError
from mqtt_trio.testing import EPOCH, ConnectionEndedError, NothingCameError, TestClient
from tests.gateways.honest import KEPT, Honest
from tests.gateways.memory_bus import MemoryKafka
from tests.gateways.whole_nodes import SOON, WholeCluster, WholeNode, open_cluster

SETTINGS = [BusSettings(), BusSettings(on_outage="spool"), BusSettings(ack="store", on_outage="spool")]
HOUR = 3600.0


def retained(node: WholeNode) -> dict[str, bytes]:
    return {message.topic_name: message.payload for message in node.memory.broker.retained}


def marks(cluster: WholeCluster, node_id: str) -> list[str]:
    """Topics that a node's store has marked."""
    store = cluster.stores[node_id]
    assert isinstance(store, MemoryStore)
    found = store.state.marks
    return [name.removeprefix(MARKS) for name, value in found.items() if name.startswith(MARKS) and value is not None]


async def everywhere(cluster: WholeCluster, *nodes: WholeNode) -> dict[str, bytes]:
    """What is retained on all nodes, one that starts now included."""
    await trio.sleep(10)
    late = await cluster.start("late", kept=False)
    first = retained(late)
    for node in nodes:
        assert retained(node) == first, node.node_id
    await late.kill()
    return first


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("qos", [1, 2])
async def test_what_is_acknowledged_in_an_outage_outlives_a_kill(
    autojump_clock: MockClock, tmp_path: Path, settings: BusSettings, qos: int
) -> None:
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        publisher = await one.connect("publisher", **KEPT)
        for topic in ("kept", "changed", "removed", "twice"):
            await publisher.publish(topic, b"old", qos=qos, retain=True)
        await trio.sleep(10)
        assert marks(cluster, "one") == []
        cluster.kafka.go_away()

        async def publish(topic: str, payload: bytes) -> None:
            with trio.move_on_after(1):
                await publisher.publish(topic, payload, qos=qos, retain=True)
                return
            raise AssertionError("no answer")

        for topic, payload in (("changed", b"new"), ("removed", b""), ("twice", b"1"), ("new", b"x"), ("twice", b"2")):
            await publish(topic, payload)
        await one.kill()
        assert sorted(marks(cluster, "one")) == ["changed", "new", "removed", "twice"]
        one = await cluster.start("one")
        wanted = {"kept": b"old", "changed": b"new", "twice": b"2", "new": b"x"}
        assert retained(one) == wanted, "the node's own store first"
        await one.kill()  # and again, before Kafka is back
        cluster.kafka.come_back()
        one = await cluster.start("one")
        assert await everywhere(cluster, one, two) == wanted
        assert one.counters()["retained_messages_resumed"] == 4
        assert one.counters()["bus_bytes_waiting"] == 0
        assert marks(cluster, "one") == []


@pytest.mark.parametrize("settings", SETTINGS)
async def test_a_kill_at_every_step(autojump_clock: MockClock, tmp_path: Path, settings: BusSettings) -> None:
    """No outage: the linger and the way to Kafka are enough to lose something in."""
    for step in range(60):
        async with open_cluster(settings, tmp_path / str(step)) as cluster:
            one, two = await cluster.start("one"), await cluster.start("two")
            publisher = await one.connect("publisher", **KEPT)
            sent: list[bytes] = [b""]
            acknowledged = 0

            async def publish(publisher: TestClient = publisher, sent: list[bytes] = sent) -> None:
                nonlocal acknowledged
                for payload in (b"1", b"2", b"", b"4"):
                    sent.append(payload)
                    await publisher.publish("t", payload, qos=1, retain=True)
                    acknowledged = len(sent) - 1
                    await trio.sleep(0.005)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(publish)
                await trio.sleep(step * 0.0005)
                nursery.cancel_scope.cancel()
            await one.kill()
            one = await cluster.start("one")
            final = (await everywhere(cluster, one, two)).get("t", b"")
            assert final in sent[acknowledged:], f"step {step}: {final!r} of {sent}, {acknowledged} acknowledged"
            assert marks(cluster, "one") == []


async def test_the_newest_one_of_an_outage_reaches_kafka_without_a_store(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        one, two = await cluster.start("one", kept=False), await cluster.start("two", kept=False)
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        for number in range(5000):
            await publisher.publish(f"t/{number % 7}", b"%d" % number, qos=1, retain=True)
        await publisher.publish("t/3", b"", qos=1, retain=True)
        cluster.kafka.come_back()
        await trio.sleep(SOON)
        wanted = {f"t/{number % 7}": b"%d" % number for number in range(4993, 5000) if number % 7 != 3}
        assert await everywhere(cluster, one, two) == wanted
        assert one.counters()["bus_bytes_waiting"] == 0


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("away", [False, True])
async def test_a_stop_loses_nothing(
    autojump_clock: MockClock, tmp_path: Path, settings: BusSettings, away: bool
) -> None:
    """[K18], Done when 8: with Kafka there the log has it at once, else the next process brings it."""
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        publisher = await one.connect("publisher", **KEPT)
        await publisher.publish("t", b"old", qos=1, retain=True)
        await trio.sleep(1)
        if away:
            cluster.kafka.go_away()
        await publisher.publish("also", b"at most once", retain=True)
        await publisher.publish("t", b"new", qos=1, retain=True)
        began = trio.current_time()
        with trio.move_on_after(10):
            await one.stop()
        if settings.on_outage is not None:  # else messages at QoS 1 are in memory alone
            assert trio.current_time() - began < 1, "nobody waits for a Kafka that is away"
        await one.kill()
        cluster.kafka.come_back()
        if not away:
            assert await everywhere(cluster, two) == {"t": b"new", "also": b"at most once"}
            assert marks(cluster, "one") == []
        one = await cluster.start("one")
        assert await everywhere(cluster, one, two) == {"t": b"new", "also": b"at most once"}


async def test_what_others_wrote_meanwhile_is_newer(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        for topic in ("replaced", "removed"):
            await publisher.publish(topic, b"of one", qos=1, retain=True)
        await one.kill()
        cluster.kafka.come_back()
        await trio.sleep(SOON)
        other = await two.connect("publisher")
        await other.publish("replaced", b"of two", qos=1, retain=True)
        await other.publish("removed", b"of two", qos=1, retain=True)
        await other.publish("removed", b"", qos=1, retain=True)
        await trio.sleep(SOON)
        one = await cluster.start("one")
        assert retained(one) == {"replaced": b"of two"}, "before its listeners open"
        assert await everywhere(cluster, one, two) == {"replaced": b"of two"}
        assert one.counters()["retained_records_sent"] == 0
        assert marks(cluster, "one") == []


async def test_what_a_node_had_read_is_older_whatever_the_clocks_say(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        one, two = await cluster.start("one"), await cluster.start("two", wall_offset=EPOCH + HOUR)
        other = await two.connect("publisher")
        await other.publish("t", b"of two, an hour ahead", qos=1, retain=True)
        await trio.sleep(SOON)
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        await publisher.publish("t", b"behind it", qos=1, retain=True)
        await one.kill()
        cluster.kafka.come_back()
        one = await cluster.start("one")
        assert await everywhere(cluster, one, two) == {"t": b"behind it"}


async def test_a_node_that_was_cut_off_does_not_bring_back_old_ones(autojump_clock: MockClock) -> None:
    """Its record lies behind that of the node to which the client moved meanwhile."""
    async with open_cluster() as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        nowhere = MemoryKafka()
        nowhere.go_away()
        one.producer.kafka = nowhere
        publisher = await one.connect("publisher")
        await publisher.publish("t", b"old", qos=1, retain=True)
        await publisher.publish("only here", b"kept", qos=1, retain=True)
        await trio.sleep(60)
        other = await two.connect("publisher")
        await other.publish("t", b"new", qos=1, retain=True)
        await trio.sleep(60)
        one.producer.kafka = cluster.kafka
        nowhere.come_back()
        await trio.sleep(SOON)
        assert await everywhere(cluster, one, two) == {"t": b"new", "only here": b"kept"}
        assert one.counters()["retained_messages_restored"] == 1


async def test_a_node_that_was_away_reads_what_changed(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        publisher = await one.connect("publisher")
        for number in range(30):
            await publisher.publish(f"t/{number}", b"old", qos=1, retain=True)
        await trio.sleep(SOON)
        await two.kill()
        for number in range(10):
            await publisher.publish(f"t/{number}", b"new", qos=1, retain=True)
            await publisher.publish(f"t/{number + 10}", b"", qos=1, retain=True)
        await trio.sleep(SOON)
        two = await cluster.start("two")
        expected = {f"t/{number}": b"new" if number < 10 else b"old" for number in range(30) if not 10 <= number < 20}
        assert retained(two) == expected, "before its listeners open"
        assert await everywhere(cluster, one, two) == expected


async def test_a_start_without_kafka_goes_by_the_time(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        await one.kill()
        other = await two.connect("publisher")
        await other.publish("old", b"of two", qos=1, retain=True)
        await trio.sleep(1)
        cluster.kafka.go_away()
        one = await cluster.start("one")
        publisher = await one.connect("publisher")
        await publisher.publish("old", b"of one", qos=1, retain=True)
        await publisher.publish("also", b"of one", qos=1, retain=True)
        cluster.kafka.come_back()
        assert await everywhere(cluster, one, two) == {"old": b"of one", "also": b"of one"}


async def test_nothing_leaves_that_the_store_does_not_know(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_cluster() as cluster:
        one = await cluster.start("one")
        await trio.sleep(5)
        publisher = await one.connect("publisher")
        store = cluster.stores["one"]

        def broken(batch: Batch) -> None:
            raise StoreError("planned: no space")

        before = len(cluster.kafka.records("mqtt.retained"))
        with monkeypatch.context() as patch:
            patch.setattr(store, "commit", broken)
            await publisher.publish("t", b"1", retain=True)
            await trio.sleep(20)
            assert len(cluster.kafka.records("mqtt.retained")) == before
        await trio.sleep(20)
        assert await everywhere(cluster, one) == {"t": b"1"}


async def test_damaged_marks_are_told_and_left_out(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with open_cluster() as cluster:
        one = await cluster.start("one")
        await one.kill()
        store = cluster.stores["one"]
        assert isinstance(store, MemoryStore)
        store.state.marks[f"{MARKS}a"] = b"\x09of another version"
        store.state.marks[f"{MARKS}b"] = b"\x01" + bytes(8) + b"garbage"
        store.state.marks[f"{MARKS}c"] = b""
        one = await cluster.start("one")
        await trio.sleep(10)
        assert caplog.text.count("may not reach the other nodes") == 3
        assert (marks(cluster, "one"), retained(one)) == ([], {})


# --- random plays


@attrs.define
class Play:
    """A publisher at each of two nodes, with topics of its own and one that both write; nodes are killed and stopped,
    Kafka comes and goes."""

    cluster: WholeCluster
    rng: random.Random
    nodes: dict[str, WholeNode] = attrs.Factory(dict)
    publishers: dict[str, Honest] = attrs.Factory(dict)

    async def connect(self, name: str) -> TestClient:
        while True:
            try:
                return await self.nodes[name].connect(f"publisher at {name}", **KEPT)
            except (ConnectionEndedError, NothingCameError):
                await trio.sleep(0.01)

    async def end(self, name: str) -> None:
        node = self.nodes[name]
        if self.rng.random() < 0.2:
            with trio.move_on_after(10, shield=True):  # a node that has begun to end is of no use any more
                await node.stop()
            node.scope.cancel()
        await node.kill()
        await trio.sleep(self.rng.choice([0.0, 0.001, 0.01, 1, 20]))
        self.nodes[name] = await self.cluster.start(name)

    async def disturb(self) -> None:
        rng = self.rng
        while True:
            await trio.sleep(rng.choice([0.0005, 0.001, 0.003, 0.005, 0.01, 0.03, 0.5, 2]))
            if rng.random() < 0.7:
                await self.end(rng.choice(["one", "two"]))
                continue
            self.cluster.kafka.go_away()
            await trio.sleep(rng.choice([0.001, 0.01, 0.5, 30]))
            if rng.random() < 0.5:
                await self.end(rng.choice(["one", "two"]))
            self.cluster.kafka.come_back()

    async def publish(self, name: str, count: int) -> None:
        publisher = self.publishers[name]
        for first in range(0, count, 10):
            topic = partial(topic_of, name)
            await publisher.publish(*range(first, first + 10), topic=topic, qos=lambda number: number % 4 // 2 + 1)
            await trio.sleep(self.rng.choice([0, 0.002, 0.5]))

    async def run(self, count: int) -> None:
        for name in ("one", "two"):
            self.nodes[name] = await self.cluster.start(name)
            window = self.rng.choice([1, 5, 20])
            self.publishers[name] = Honest(partial(self.connect, name), window, retain=True, payload=payload_of)
        async with trio.open_nursery() as disturbing:
            disturbing.start_soon(self.disturb)
            async with trio.open_nursery() as publishing:
                for name in self.nodes:
                    publishing.start_soon(self.publish, name, count)
            disturbing.cancel_scope.cancel()
        self.cluster.kafka.come_back()
        for name, node in self.nodes.items():
            if node.scope.cancel_called:
                await node.ended.wait()
                self.nodes[name] = await self.cluster.start(name)


def topic_of(name: str, number: int) -> str:
    return "both" if number % 4 == 3 else f"{name}/{number % 4}"


def payload_of(number: int) -> bytes:
    return b"" if number % 5 == 4 else b"%d" % number


@pytest.mark.parametrize("seed", range(16))
async def test_the_last_acknowledged_one_is_everywhere(autojump_clock: MockClock, tmp_path: Path, seed: int) -> None:
    settings = SETTINGS[seed % 3]
    async with open_cluster(settings, tmp_path) as cluster:
        cluster.kafka.twice = seed % 5 == 4
        play = Play(cluster, random.Random(seed))
        await play.run(120)
        found = await everywhere(cluster, *play.nodes.values())
        found.pop("both", None)
        last = {topic_of(name, number): payload_of(number) for name in play.nodes for number in range(120)}
        del last["both"]
        assert found == {topic: payload for topic, payload in last.items() if payload}
        assert marks(cluster, "one") == marks(cluster, "two") == []
        for node in play.nodes.values():
            assert (node.counters()["bus_bytes_waiting"], node.bus.retained._own) == (0, {})
