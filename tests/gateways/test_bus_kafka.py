"""The bus between nodes over a real Kafka [K4, K5, K21, K23]."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from kafka import KafkaAdminClient, KafkaProducer

from gateways.kafka.bridge import ConsumerBridge, ProducerBridge
from gateways.kafka.bus import Bus
from gateways.kafka.bus_records import split_frames
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.cluster import Cluster
from gateways.kafka.options import BusOptions, KafkaOptions, TopicOptions, TopicsOptions
from gateways.kafka.poller import Assignment
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.topic_plan import plan_topics
from gateways.kafka.topics import TopicManager
from mqtt_trio.errors import StartError
from mqtt_trio.gateway import FrameRun, Hold, Message
from tests.gateways.memory_bus import NOW, FakeHost, run_of
from tests.kafka_support import KafkaNode, unique_name

pytestmark = pytest.mark.kafka
LIMIT = 60.0
"""Seconds for anything to happen."""


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await trio.sleep(0.01)


@attrs.define
class RealNode:
    host: FakeHost
    bus: Bus
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    error: StartError | None = None
    settled: trio.Event = attrs.Factory(trio.Event)
    """Its listeners would open, or it failed."""

    @property
    def seen(self) -> list[FrameRun | Message]:
        return self.host.local.seen

    def numbers(self, topic: str) -> list[int]:
        """Numbers that arrived for `topic`, in order: payloads of messages and of packets in runs."""
        result: list[int] = []
        name = topic.encode()
        for item in self.seen:
            if isinstance(item, Message):
                result += [int(item.payload)] if item.topic_name == topic else []
            else:
                frames = split_frames(item.frames)
                result += [int(frame[-6:]) for frame in frames if frame[4 : 4 + len(name)] == name]
        return result

    def send(self, topic: str, *numbers: int, qos: int = 0) -> object:
        route = self.bus.route(topic)
        assert route is not None
        payloads = [b"%06d" % number for number in numbers]
        return route.take_run(run_of(topic, *payloads, client_id=self.host.node_id, qos=qos))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        message = Message(topic, payload, 1, retain, client_id=self.host.node_id, published_at=NOW)
        if retain:
            self.host.local.set_retained(message)
        route = self.bus.route(topic)
        assert route is not None
        route.take(message)


@attrs.define
class RealCluster:
    servers: str
    nursery: trio.Nursery
    topic: str = attrs.Factory(lambda: unique_name("bus"))
    retained: str = attrs.Factory(lambda: unique_name("retained"))

    async def start(self, node_id: str, **settings: Any) -> RealNode:
        topics = TopicsOptions(retained=TopicOptions(name=self.retained))
        options = KafkaOptions(
            servers=self.servers,
            bus=BusOptions(enabled=True, topic=self.topic),
            topics=topics,
            consumer={"metadata_max_age_ms": 500},
        )
        cluster = Cluster(options.server_names)
        host = FakeHost(node_id, os.urandom(16))
        producer = ProducerBridge(
            options, cluster, name="bus", compression="lz4", window_records=20_000, window_bytes=1 << 25, linger_ms=0
        )

        def make_consumer(
            on_records: Callable[[list[ConsumedRecord]], None], offsets: Mapping[int, int]
        ) -> ConsumerBridge:
            assigned: list[Assignment] = [(self.topic, offsets), (self.retained, "beginning")]
            return ConsumerBridge(options, cluster, assigned, on_records, group=f"mqtt-trio-bus-{node_id}")

        names = BusSettings(topic=self.topic, retained_topic=self.retained, **settings)
        node = RealNode(host, Bus(names, host, producer, make_consumer, cluster.facts))
        plans = [plan for plan in plan_topics(options) if plan.name in (self.topic, self.retained)]
        self.nursery.start_soon(self._run, node, TopicManager(options, cluster, plans))
        with trio.fail_after(LIMIT):
            await node.settled.wait()
        return node

    def grow(self, partitions: int) -> None:
        """Give both topics more partitions; blocks."""
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        try:
            admin.create_partitions({self.topic: partitions, self.retained: partitions})
        finally:
            admin.close()

    async def _run(self, node: RealNode, topics: TopicManager) -> None:
        with node.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(topics.run)
                nursery.start_soon(self._settle, node)
                try:
                    await node.bus.run()
                except StartError as exc:
                    node.error = exc
                    node.settled.set()
                nursery.cancel_scope.cancel()

    @staticmethod
    async def _settle(node: RealNode) -> None:
        while not node.bus.ready:  # noqa: ASYNC110  what is waited for has no event
            await trio.sleep(0.01)
        node.settled.set()


@pytest.fixture
async def cluster(kafka: KafkaNode) -> AsyncIterator[RealCluster]:
    async with trio.open_nursery() as nursery:
        yield RealCluster(kafka.servers, nursery)
        nursery.cancel_scope.cancel()


async def test_exactly_once_and_in_order_between_three_nodes(cluster: RealCluster) -> None:
    nodes = [await cluster.start(name) for name in ("one", "two", "three")]
    one, two, three = nodes
    topics = [f"t/{number}" for number in range(8)]
    for first in range(0, 2000, 20):
        for topic in topics:
            one.send(topic, *range(first, first + 20))
        two.send("from/two", first, qos=1)
        two.publish("from/two", b"%d" % (first + 1))
        await trio.sleep(0.001)
    expected = list(range(2000))
    from_two = [number for first in range(0, 2000, 20) for number in (first, first + 1)]
    await until(lambda: all(len(node.numbers(topic)) >= 2000 for node in (two, three) for topic in topics))
    await until(lambda: all(len(node.numbers("from/two")) >= len(from_two) for node in (one, three)))
    for topic in topics:
        assert two.numbers(topic) == three.numbers(topic) == expected
        assert one.numbers(topic) == []
    assert [node.numbers("from/two") for node in nodes] == [from_two, [], from_two]
    for node in nodes:
        counters = node.bus.counters()
        assert counters["bus_records_malformed"] == counters["bus_messages_dropped"] == 0
        assert counters["bus_records_missing"] == counters["bus_records_doubled"] == 0
    await until(lambda: one.bus.counters()["bus_messages_waiting"] == 0)
    assert one.bus.counters()["bus_messages_sent"] == 16_000


async def test_late_node_gets_retained_messages_and_no_old_traffic(cluster: RealCluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    for number in range(200):
        one.publish(f"r/{number}", b"old", retain=True)
        one.publish(f"r/{number}", b"kept", retain=True)
    one.publish("r/0", b"", retain=True)
    one.send("live", 1)
    await until(lambda: len(two.host.local.retained) == 199 and len(two.seen) >= 402)
    two.publish("r/1", b"of two", retain=True)
    await until(lambda: one.host.local.retained["r/1"].payload == b"of two")
    three = await cluster.start("three")
    assert three.seen == []
    assert three.host.local.retained == one.host.local.retained == two.host.local.retained
    assert three.host.local.retained["r/2"].payload == b"kept"
    one.send("live", 2)
    await until(lambda: three.numbers("live") == [2])


async def test_second_node_with_the_same_id_ends_and_the_first_stays(cluster: RealCluster) -> None:
    first, other = await cluster.start("same"), await cluster.start("other")
    second = await cluster.start("same")
    assert second.error is not None
    assert "Node.Id 'same' is taken" in str(second.error)
    assert f"pid {os.getpid()}" in str(second.error)
    first.send("a", 1)
    await until(lambda: other.numbers("a") == [1])
    assert first.error is None
    first.scope.cancel()  # as kill -9: without a word
    third = await cluster.start("same")
    assert third.error is None


async def test_topics_that_grow_while_nodes_run(cluster: RealCluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    topics = [f"t/{number:02}" for number in range(30)]
    for topic in topics:
        one.publish(topic, b"0", retain=True)
    await until(lambda: len(two.seen) == len(topics))
    await trio.to_thread.run_sync(cluster.grow, 24)
    three = await cluster.start("three")
    for number in range(1, 20):
        for topic in topics:
            one.send(topic, number)
            three.send(f"3/{topic}", number)
        await trio.sleep(0.02)
    for topic in topics:
        three.publish(topic, b"1", retain=True)
    for node in (one, two):
        await until(lambda node=node: all(len(node.numbers(f"3/{topic}")) == 19 for topic in topics))  # type: ignore[misc]
        assert all(node.numbers(f"3/{topic}") == list(range(1, 20)) for topic in topics)
    await until(lambda: all(len(two.numbers(topic)) == 21 for topic in topics))
    assert all(two.numbers(topic)[:1] == [0] for topic in topics)
    late = await cluster.start("late")
    kept = {topic: message.payload for topic, message in late.host.local.retained.items()}
    assert kept == dict.fromkeys(topics, b"1")
    assert late.host.local.retained == one.host.local.retained


async def test_large_message(cluster: RealCluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    payload = os.urandom(6_000_000)
    one.publish("a", payload)
    await until(lambda: len(two.seen) == 1)
    assert two.seen[0] == Message("a", payload, 1, client_id="one", published_at=NOW)


async def test_outage_loses_no_acknowledged_message_and_counts_the_rest(own_kafka: KafkaNode) -> None:
    async with trio.open_nursery() as nursery:
        cluster = RealCluster(own_kafka.servers, nursery)
        one, two = await cluster.start("one", window_messages=200), await cluster.start("two")
        one.send("t", 0, qos=1)
        await until(lambda: two.numbers("t") == [0])
        await trio.to_thread.run_sync(own_kafka.kill)
        held: list[Hold] = []
        for number in range(1, 501):
            if isinstance(answer := one.send("t", number, qos=1), Hold):
                held.append(answer)
            one.send("lost", number)
            await trio.sleep(0.001)
        assert one.host.stopped == [True]
        assert held
        assert not any(hold.released for hold in held)
        dropped = one.bus.counters()["bus_messages_dropped"]
        assert dropped > 0
        await trio.to_thread.run_sync(own_kafka.start)
        await until(lambda: len(two.numbers("t")) >= 501)
        await until(lambda: one.bus.counters()["bus_messages_waiting"] == 0)
        await until(lambda: len(two.numbers("lost")) >= 500 - dropped)
        assert two.numbers("t") == list(range(501))
        assert len(two.numbers("lost")) == 500 - dropped
        assert all(hold.released for hold in held)
        assert one.host.stopped == [True, False]
        await one.bus.stop()
        nursery.cancel_scope.cancel()


async def test_a_checkpoint_knows_a_topic_that_was_made_again_though_it_is_longer(kafka: KafkaNode) -> None:
    topic = unique_name("again")

    def write(count: int, *, anew: bool) -> None:
        admin: Any = KafkaAdminClient(bootstrap_servers=kafka.servers)
        try:
            if anew:
                admin.delete_topics([topic])
            admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
        finally:
            admin.close()
        producer = KafkaProducer(bootstrap_servers=kafka.servers)
        for number in range(count):
            producer.send(topic, b"%d" % number, partition=0)
        producer.flush(30)
        producer.close()

    async def read(offset: int, identity: str | None) -> tuple[list[int], str | None]:
        found: list[ConsumedRecord] = []
        bridge = ConsumerBridge(
            KafkaOptions(servers=kafka.servers), Cluster([kafka.servers]), [(topic, {0: offset})], found.extend
        )
        if identity is not None:
            bridge.expect(topic, identity)
        async with trio.open_nursery() as nursery:
            await nursery.start(bridge.run)
            with trio.fail_after(LIMIT):
                await bridge.caught_up.wait()
            nursery.cancel_scope.cancel()
        return [record.offset for record in found], bridge.identity(topic)

    await trio.to_thread.run_sync(partial(write, 5, anew=False))
    offsets, identity = await read(3, None)
    assert offsets == [3, 4]
    assert identity is not None
    assert await read(5, identity) == ([], identity)
    await trio.to_thread.run_sync(partial(write, 10, anew=True))
    offsets, other = await read(5, identity)
    assert offsets == list(range(10))
    assert other not in (None, identity)
