"""The ways in which kafka-python's producer dies or spins, provoked on a real one (docs/kafka-errors.md)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import attrs
import kafka as client
import pytest
import trio
from kafka.admin import ACL, ACLFilter, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType

from gateways.kafka import feeder
from gateways.kafka.bridge import ConsumedRecord, ConsumerBridge, ProducerBridge, Record
from gateways.kafka.cluster import Cluster
from gateways.kafka.options import KafkaOptions
from gateways.kafka.precheck import probe
from gateways.kafka.records import Reason, RecordRefusedError
from gateways.kafka.topic_plan import TopicPlan
from gateways.kafka.topics import TopicManager
from gateways.kafka.workers import quiet_loggers
from tests.gateway_support import LIMIT, Outcomes
from tests.gateways.secured import login, options_of, trust
from tests.kafka_support import KafkaNode, SecureKafka, unique_name

pytestmark = pytest.mark.kafka
PARTITIONS = 3
USER = "User:limited"
BOUNDED = 0.25
"""Share of a core that our process may take while nothing can be sent; kafka-python alone takes half of one."""


@attrs.define(kw_only=True)
class Life(Outcomes[int]):
    """A producer under load and what became of its records: numbers, each partition's in order."""

    cluster: Cluster
    bridge: ProducerBridge
    topics: TopicManager
    offered: int = 0

    def offer(self, topic: str) -> None:
        number = self.offered
        self.offered += 1
        record = Record(topic, number % PARTITIONS, None, b"%d" % number, done=partial(self.done, number))
        self.bridge.offer(record)

    async def load(self, topics: list[str]) -> None:
        """Offer records to `topics` in turn until cancelled."""
        while True:
            for topic in topics:
                for _ in range(PARTITIONS):
                    self.offer(topic)
            await trio.sleep(0.005)


@asynccontextmanager
async def living(kafka: str | KafkaOptions, *plans: TopicPlan, delivery_timeout: float = 60.0) -> AsyncIterator[Life]:
    options = KafkaOptions(servers=kafka) if isinstance(kafka, str) else kafka
    options = attrs.evolve(options, producer={"delivery.timeout.ms": int(delivery_timeout * 1000)})
    cluster = Cluster(options.server_names, probe(options))
    topics = TopicManager(options, cluster, plans)
    bridge = ProducerBridge(
        options, cluster, name="life", compression="lz4", window_records=100_000, window_bytes=32 << 20
    )
    quiet_loggers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(topics.run)
        with trio.fail_after(LIMIT):
            await topics.complete.wait()
        await nursery.start(bridge.run)
        yield Life(cluster=cluster, bridge=bridge, topics=topics)
        with trio.move_on_after(5):
            await bridge.stop()
        nursery.cancel_scope.cancel()


@contextmanager
def stopped(node: KafkaNode) -> Iterator[None]:
    """Freeze the node as a stuck disk or a long pause of its garbage collector would."""
    assert node.pid is not None
    os.kill(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(node.pid, signal.SIGCONT)


async def share_of_a_core(seconds: float) -> float:
    """Return what our process takes of a core, all threads together."""
    before, start = time.process_time(), trio.current_time()
    await trio.sleep(seconds)
    return (time.process_time() - before) / (trio.current_time() - start)


def read(servers: str, topic: str) -> list[list[int]]:
    """Return the numbers of each partition of `topic`, in the order of the log."""
    consumer = client.KafkaConsumer(bootstrap_servers=servers, group_id=None, auto_offset_reset="earliest")
    partitions = [client.TopicPartition(topic, number) for number in range(PARTITIONS)]
    found: dict[int, list[int]] = {number: [] for number in range(PARTITIONS)}
    try:
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        while any(consumer.position(p) < ends[p] for p in partitions):
            for p, records in consumer.poll(timeout_ms=500).items():
                found[p.partition] += [int(record.value) for record in records]
    finally:
        consumer.close()
    return list(found.values())


def first_ones(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


def delete(servers: str, topic: str) -> None:
    admin: Any = client.KafkaAdminClient(bootstrap_servers=servers)
    try:
        admin.delete_topics([topic])
    finally:
        admin.close()


async def test_kafka_frozen_for_longer_than_the_delivery_timeout(own_kafka: KafkaNode) -> None:
    topic = "frozen"
    async with living(own_kafka.servers, TopicPlan(name=topic, partitions=PARTITIONS), delivery_timeout=2) as life:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(life.load, [topic])
            await life.until(lambda: len(life.outcomes) > 300)
            with stopped(own_kafka):
                await trio.sleep(1)
                assert await share_of_a_core(4) < BOUNDED
            before = len(life.outcomes)
            await life.until(lambda: len(life.outcomes) > before + 300)
            nursery.cancel_scope.cancel()
        await life.until(lambda: len(life.outcomes) == life.offered)
        assert set(life.outcomes.values()) == {None}
        assert life.bridge.counters()["rebuilds"] >= 1
        found = await trio.to_thread.run_sync(read, own_kafka.servers, topic)
    for partition, numbers in enumerate(found):  # some may be there twice
        assert first_ones(numbers) == list(range(partition, life.offered, PARTITIONS))


async def test_a_topic_deleted_under_load_is_made_again_and_nothing_offered_is_lost(kafka: KafkaNode) -> None:
    gone, other = unique_name("gone"), unique_name("other")
    plans = [TopicPlan(name=name, partitions=PARTITIONS) for name in (gone, other)]
    read_along: set[tuple[int, bytes | None]] = set()

    def on_records(records: list[ConsumedRecord]) -> None:
        read_along.update((record.partition, record.value) for record in records)
        life.changed.set()

    async with living(kafka.servers, *plans) as life:
        consumer = ConsumerBridge(KafkaOptions(servers=kafka.servers), life.cluster, [(gone, "end")], on_records)
        async with trio.open_nursery() as nursery:
            await nursery.start(consumer.run)
            with trio.fail_after(LIMIT):
                await consumer.positions_known.wait()
            nursery.start_soon(life.load, [gone, other])
            await life.until(lambda: len(life.outcomes) > 300)
            await trio.to_thread.run_sync(delete, kafka.servers, gone)
            deleted_at = life.offered
            await life.until(lambda: any(number >= deleted_at + 600 for number in life.outcomes))
            there = await trio.to_thread.run_sync(read, kafka.servers, gone)
            expected_there = {(p, b"%d" % number) for p, numbers in enumerate(there) for number in numbers}
            await life.until(lambda: expected_there <= read_along)  # not only what came behind the old position
            nursery.cancel_scope.cancel()
        await life.until(lambda: len(life.outcomes) == life.offered)
        assert set(life.outcomes.values()) == {None}
        assert life.bridge.counters()["rebuilds"] == 0
        found = {name: await trio.to_thread.run_sync(read, kafka.servers, name) for name in (gone, other)}
    round_size = 2 * PARTITIONS
    for number, name in enumerate((gone, other)):
        for partition, numbers in enumerate(found[name]):
            expected = list(range(number * PARTITIONS + partition, life.offered, round_size))
            if name == gone:  # what it had before went with it
                assert numbers[0] < deleted_at + round_size
                expected = expected[expected.index(numbers[0]) :]
            assert numbers == expected


async def test_a_topic_that_nobody_makes_again_costs_no_core(kafka: KafkaNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "LEAVE_AFTER", 3.0)
    gone, other = unique_name("gone"), unique_name("other")
    plans = [TopicPlan(name=name, partitions=PARTITIONS) for name in (gone, other)]
    async with living(kafka.servers, *plans) as life:
        for _ in range(10):
            life.offer(gone)
            life.offer(other)
        await life.until(lambda: len(life.outcomes) == 20)
        life.topics._plans.pop(gone)  # nobody has it in care any more
        await trio.to_thread.run_sync(delete, kafka.servers, gone)
        for _ in range(10):
            life.offer(gone)
        assert await share_of_a_core(2.5) < BOUNDED  # its records are in kafka-python's hands
        for _ in range(10):
            life.offer(other)
        await life.until(lambda: len(life.outcomes) >= 30)
        with trio.fail_after(LIMIT):
            while life.bridge.counters()["rebuilds"] < 1:  # noqa: ASYNC110  what is waited for has no event
                await trio.sleep(0.05)
        assert await share_of_a_core(1) < BOUNDED / 2
        assert life.bridge.outstanding_records == 10
        assert not life.cluster.is_away


class Rights:
    """What the user `limited` may do with topics."""

    def __init__(self, kafka: SecureKafka) -> None:
        self.servers = kafka.servers
        self.options = options_of(kafka, ("SASL_SSL", login(kafka, "PLAIN", "limited"), trust(kafka)))

    def make(self, *topics: str) -> None:
        admin: Any = client.KafkaAdminClient(bootstrap_servers=self.servers)
        try:
            admin.create_topics({topic: {"num_partitions": PARTITIONS, "replication_factor": 1} for topic in topics})
            for topic in topics:
                admin.create_acls([self._acl(topic, ACLOperation.DESCRIBE), self._acl(topic, ACLOperation.WRITE)])
        finally:
            admin.close()

    def may_write(self, topic: str, *, allowed: bool) -> None:
        admin: Any = client.KafkaAdminClient(bootstrap_servers=self.servers)
        try:
            if allowed:
                admin.create_acls([self._acl(topic, ACLOperation.WRITE)])
            else:
                pattern = ResourcePattern(ResourceType.TOPIC, topic)
                admin.delete_acls([ACLFilter(USER, "*", ACLOperation.WRITE, ACLPermissionType.ANY, pattern)])
        finally:
            admin.close()

    @staticmethod
    def _acl(topic: str, operation: ACLOperation) -> ACL:
        return ACL(USER, "*", operation, ACLPermissionType.ALLOW, ResourcePattern(ResourceType.TOPIC, topic))


async def test_a_right_taken_away_under_load_and_given_back(
    secure_kafka: SecureKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateways.kafka.topics.PATIENCE", 0.3)
    closed, other = unique_name("closed"), unique_name("other")
    rights = Rights(secure_kafka)
    await trio.to_thread.run_sync(rights.make, closed, other)
    plans = [TopicPlan(name=name, partitions=PARTITIONS) for name in (closed, other)]
    async with living(rights.options, *plans) as life:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(life.load, [closed, other])
            await life.until(lambda: len(life.outcomes) > 200)
            await trio.to_thread.run_sync(partial(rights.may_write, closed, allowed=False))
            await life.until(lambda: life.cluster.trouble(closed) is not None)
            before = life.offered
            await life.until(lambda: any(number > before + 60 for number in life.outcomes))  # the other one flows
            assert life.bridge.counters()["rebuilds"] <= 2
            assert not life.cluster.is_away
            await trio.to_thread.run_sync(partial(rights.may_write, closed, allowed=True))
            await life.until(lambda: life.cluster.trouble(closed) is None)
            nursery.cancel_scope.cancel()
        await life.until(lambda: len(life.outcomes) == life.offered)
        assert set(life.outcomes.values()) == {None}
        found = {name: await trio.to_thread.run_sync(read, secure_kafka.servers, name) for name in (closed, other)}
    for number, name in enumerate((closed, other)):
        for partition, numbers in enumerate(found[name]):
            assert first_ones(numbers) == list(range(number * PARTITIONS + partition, life.offered, 2 * PARTITIONS))


async def test_what_nobody_allows_is_given_up(secure_kafka: SecureKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.topics.PATIENCE", 0.3)
    closed = unique_name("closed")
    rights = Rights(secure_kafka)
    await trio.to_thread.run_sync(rights.make, closed)
    plan = TopicPlan(name=closed, partitions=PARTITIONS)
    async with living(rights.options, plan, delivery_timeout=1.5) as life:
        life.offer(closed)
        await life.until(lambda: len(life.outcomes) == 1)
        await trio.to_thread.run_sync(partial(rights.may_write, closed, allowed=False))
        for _ in range(5):
            life.offer(closed)
        await life.until(lambda: len(life.outcomes) == 6)
        errors = [life.outcomes[number] for number in range(1, 6)]
        assert {error.reason for error in errors if isinstance(error, RecordRefusedError)} == {Reason.DENIED}
        assert {str(error) for error in errors} == {f"this node may not write to Kafka topic {closed}"}
