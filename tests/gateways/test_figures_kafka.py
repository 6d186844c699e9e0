"""The figures of [K17] against a real Kafka: each is provoked, and compared with the truth where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import kafka as kafka_python
import pytest
import trio
from kafka.protocol.admin.client_quotas import AlterClientQuotasRequest as Alter

from gateways.kafka.bridge import ConsumerBridge, ProducerBridge, Record
from gateways.kafka.cluster import Cluster, TopicFacts
from gateways.kafka.lag import Behind
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import ConsumedRecord
from tests.kafka_support import KafkaNode, unique_name

pytestmark = pytest.mark.kafka
LIMIT = 60.0
STOP = 5.0
"""Seconds for which a reader stands still. scripts/watch does the same with a minute."""


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await trio.sleep(0.02)


def make_topic(servers: str, topic: str, partitions: int) -> None:
    admin = kafka_python.KafkaAdminClient(bootstrap_servers=servers)
    try:
        admin.create_topics({topic: {"num_partitions": partitions, "replication_factor": 1}})
    finally:
        admin.close()


def delete_topic(servers: str, topic: str) -> None:
    admin = kafka_python.KafkaAdminClient(bootstrap_servers=servers)
    try:
        admin.delete_topics([topic])
    finally:
        admin.close()


def set_quota(servers: str, client_id: str, bytes_per_second: float) -> None:
    """Let a client send so much, as `kafka-configs.sh --alter --entity-type clients` does."""
    entity = Alter.EntryData.EntityData(entity_type="client-id", entity_name=client_id)
    change = Alter.EntryData.OpData(key="producer_byte_rate", value=bytes_per_second, remove=False)
    request = Alter(entries=[Alter.EntryData(entity=[entity], ops=[change])], validate_only=False)
    admin = kafka_python.KafkaAdminClient(bootstrap_servers=servers)
    try:
        answer = admin._manager.run(admin._manager.send, request)
        assert [entry.error_code for entry in answer.entries] == [0]
    finally:
        admin.close()


def write(servers: str, topic: str, count: int, partition: int = 0) -> None:
    producer = kafka_python.KafkaProducer(bootstrap_servers=servers)
    try:
        for number in range(count):
            producer.send(topic, b"%d" % number, partition=partition)
        producer.flush(timeout=LIMIT)
    finally:
        producer.close()


async def test_lag_of_a_reader_that_stands_still_is_the_truth(kafka: KafkaNode) -> None:
    topic = unique_name("lag")
    await trio.to_thread.run_sync(make_topic, kafka.servers, topic, 2)
    taken: list[ConsumedRecord] = []
    open_door, door = trio.Event(), trio.Event()
    open_door.set()
    doors = [open_door]
    bridge = ConsumerBridge(
        KafkaOptions(servers=kafka.servers), Cluster([kafka.servers]), [(topic, "end")], taken.extend, name="reader"
    )

    async def room() -> None:
        await doors[0].wait()

    bridge.room = room
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()
        write_some = partial(write, kafka.servers, topic)
        await trio.to_thread.run_sync(write_some, 100)
        await until(lambda: len(taken) == 100)
        await until(lambda: bridge.lag().get((topic, 0)) == Behind(0, 0.0))
        doors[0] = door
        before = time.time()
        await trio.to_thread.run_sync(write_some, 1)
        written = (before + time.time()) / 2
        await trio.to_thread.run_sync(write_some, 20_000)  # far more than the bridge holds
        await trio.sleep(STOP)
        await until(lambda: bridge.lag()[topic, 0].records == 20_001)
        behind, waited = bridge.lag(), time.time() - written
        assert behind[topic, 0].seconds == pytest.approx(waited, rel=0.1)
        assert behind[topic, 1] == Behind(0, 0.0)
        assert len(taken) == 100
        door.set()
        await until(lambda: len(taken) == 20_101)
        await until(lambda: bridge.lag()[topic, 0] == Behind(0, 0.0))
        await until(lambda: bridge.report().figures.records_per_request > 0)
        assert bridge.report().figures.network > 0
        assert bridge.report().failed_fetches == 0
        nursery.cancel_scope.cancel()


async def test_a_quota_shows_as_throttle_time(kafka: KafkaNode) -> None:
    topic, name = unique_name("throttled"), unique_name("sender")
    await trio.to_thread.run_sync(make_topic, kafka.servers, topic, 1)
    cluster = Cluster([kafka.servers])
    cluster.know(topic, TopicFacts(partitions=1))
    bridge = ProducerBridge(
        KafkaOptions(servers=kafka.servers),
        cluster,
        name=name,
        compression=None,
        window_records=1000,
        window_bytes=10**8,
    )
    done: list[Exception | None] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        bridge.offer(Record(topic, 0, None, b"small", done=done.append))
        await until(lambda: len(done) == 1)
        assert bridge.report().figures.throttle == 0
        await trio.to_thread.run_sync(set_quota, kafka.servers, f"mqtt-trio-{name}", 50_000.0)
        sent = 0
        with trio.fail_after(LIMIT):
            while bridge.report().figures.throttle == 0:
                if bridge.outstanding_records < 5 and sent < 40:
                    bridge.offer(Record(topic, 0, None, b"x" * 50_000, done=done.append))
                    sent += 1
                await trio.sleep(0.05)
        assert 0 < bridge.report().figures.throttle < 60, "seconds"
        assert bridge.report().figures.network > 1000
        assert not any(done)
        nursery.cancel_scope.cancel()


async def test_a_topic_that_goes_away_shows_as_failed_fetches(kafka: KafkaNode) -> None:
    topic = unique_name("going")
    await trio.to_thread.run_sync(make_topic, kafka.servers, topic, 1)
    bridge = ConsumerBridge(
        KafkaOptions(servers=kafka.servers), Cluster([kafka.servers]), [(topic, "end")], lambda records: None
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        with trio.fail_after(LIMIT):
            await bridge.positions_known.wait()
        assert bridge.report().failed_fetches == 0
        await trio.to_thread.run_sync(delete_topic, kafka.servers, topic)
        await until(lambda: bridge.report().failed_fetches > 0)
        # How many more follow is Kafka's to say: it may be quick to know no such topic, and a new consumer waits then.
        assert bridge.report().failed_fetch_rate > 0
        nursery.cancel_scope.cancel()
