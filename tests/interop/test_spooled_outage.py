"""`Ack = "store"` with a real Kafka: an outage in which the broker is killed, and a Kafka that freezes [K9, K10]."""

from __future__ import annotations

import json
import os
import signal
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio

from mqtt_trio.protocol.codes import QoS, ReasonCode
from mqtt_trio.protocol.packets import Publish
from mqtt_trio.testing import ConnectionEndedError
from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.cluster import read_topic
from tests.interop.kept_clients import V311, connect
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.kafka, pytest.mark.timeout(240)]

LIMIT: Final = 60.0
PHASE: Final = 60
"""Acknowledged messages of each publisher before the next thing happens."""


@attrs.define
class Publisher:
    """Publishes 0, 1, 2, ..., each once the one before was answered; knows what was sent and what was acknowledged."""

    topic: str
    qos: int
    sent: int = 0
    acknowledged: list[int] = attrs.Factory(list)
    changed: trio.Event = attrs.Factory(trio.Event)

    async def run(self, broker: BrokerProcess) -> None:
        """Publish until cancelled, or until the broker is killed."""
        try:
            client = await connect(broker, f"{self.topic}-{self.sent}")
            while True:
                number, self.sent = self.sent, self.sent + 1
                code = await client.publish(self.topic, b"%d" % number, qos=self.qos)
                assert code is ReasonCode.SUCCESS
                self.acknowledged.append(number)
                self.changed.set()
        except ConnectionEndedError:
            pass

    async def until_acknowledged(self, count: int) -> None:
        """Wait for `count` more acknowledgements."""
        goal = len(self.acknowledged) + count
        with trio.fail_after(LIMIT):
            while len(self.acknowledged) < goal:
                self.changed = trio.Event()
                await self.changed.wait()


def config(kafka: KafkaNode, topic: str, more: str = "") -> str:
    return f"""
[Kafka]
Servers = "{kafka.servers}"
[[ArchiveGroups]]
Name = "Spooled"
Filter = "spooled/#"
Store = "KAFKA"
KafkaTopic = "{topic}"
Ack = "store"
{more}
"""


def archived(kafka: KafkaNode, topic: str) -> dict[str, list[int]]:
    """Return the numbers of each MQTT topic, in the order of its partition."""
    found: dict[str, list[int]] = {}
    for record in read_topic(kafka, topic):
        value = json.loads(record.value)
        found.setdefault(value["topic"], []).append(int(value["payload"]))
    return found


def segments(broker: BrokerProcess) -> list[Path]:
    return [*broker.data.glob("spool-archive-KAFKA-*/*.seg")]


@asynccontextmanager
async def publishing(broker: BrokerProcess, publishers: list[Publisher]) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for publisher in publishers:
            nursery.start_soon(publisher.run, broker)
        yield
        nursery.cancel_scope.cancel()


async def all_acknowledge(publishers: list[Publisher], count: int = PHASE) -> None:
    async with trio.open_nursery() as nursery:
        for publisher in publishers:
            nursery.start_soon(publisher.until_acknowledged, count)


@pytest.mark.usefixtures("streams")
async def test_what_was_acknowledged_in_an_outage_is_in_kafka_whatever_was_killed(
    own_kafka: KafkaNode, brokers: Brokers
) -> None:
    topic = unique_name("spooled")
    publishers = [Publisher(f"spooled/{qos}/{n}", qos) for qos in (1, 2) for n in range(3)]
    nodes = [brokers.make(config=config(own_kafka, topic), name=f"life-{life}") for life in range(3)]
    for node in nodes:
        node.data = nodes[0].data
    await trio.to_thread.run_sync(nodes[0].start)
    async with publishing(nodes[0], publishers):
        await all_acknowledge(publishers)
        await trio.to_thread.run_sync(own_kafka.kill)
        await all_acknowledge(publishers)
        nodes[0].kill()
    assert segments(nodes[0]), "what was acknowledged meanwhile is on disk"
    await trio.to_thread.run_sync(nodes[1].start)
    async with publishing(nodes[1], publishers):
        await all_acknowledge(publishers)
        nodes[1].kill()
    await trio.to_thread.run_sync(nodes[2].start)
    async with publishing(nodes[2], publishers):
        await all_acknowledge(publishers)
        await trio.to_thread.run_sync(own_kafka.start)
        await trio.to_thread.run_sync(
            lambda: wait_until(lambda: not segments(nodes[2]), "the spool runs empty", limit=LIMIT)
        )
        await all_acknowledge(publishers)
    await trio.to_thread.run_sync(nodes[2].stop)

    found = await trio.to_thread.run_sync(archived, own_kafka, topic)
    for publisher in publishers:
        numbers = found[publisher.topic]
        assert set(publisher.acknowledged) <= set(numbers) <= set(range(publisher.sent))
        firsts = list(dict.fromkeys(numbers))
        assert firsts == sorted(firsts), "first occurrences are in order"
        print(f"{publisher.topic}: {publisher.sent} sent, {len(numbers) - len(firsts)} twice")
    assert nodes[2].counters()["archive.Spooled.spooled"] > 0


@pytest.mark.usefixtures("streams")
async def test_a_kafka_that_freezes_slows_its_publishers_and_nobody_else(
    own_kafka: KafkaNode, brokers: Brokers
) -> None:
    topic = unique_name("slow")
    publishers = [Publisher(f"spooled/{qos}/{n}", qos) for qos in (1, 2) for n in range(3)]
    node = brokers.make(config=config(own_kafka, topic, "WindowMessages = 100"), name="broker")
    await trio.to_thread.run_sync(node.start)
    pid = own_kafka.pid
    assert pid is not None
    async with publishing(node, publishers):
        await all_acknowledge(publishers)
        other = await connect(node, "other")
        await other.subscribe("plain")
        os.kill(pid, signal.SIGSTOP)
        try:
            await trio.sleep(0.3)  # what was on its way is answered
            before = [len(publisher.acknowledged) for publisher in publishers]
            times: list[float] = []
            began = trio.current_time()
            while trio.current_time() < began + 1.5:  # the group notices an outage after three seconds
                sent_at = trio.current_time()
                await other.publish("plain", b"x", qos=1)
                await other.next_message()
                times.append(trio.current_time() - sent_at)
            assert [len(publisher.acknowledged) for publisher in publishers] == before, "nobody is told too much"
        finally:
            os.kill(pid, signal.SIGCONT)
        assert statistics.median(times) < 0.05, "clients of other topics notice nothing"
        await all_acknowledge(publishers)
    await trio.to_thread.run_sync(node.stop)
    found = await trio.to_thread.run_sync(archived, own_kafka, topic)
    for publisher in publishers:
        assert found[publisher.topic] == sorted(set(found[publisher.topic])), "nothing twice, in order"
        assert set(publisher.acknowledged) <= set(found[publisher.topic]) <= set(range(publisher.sent))
    counters = node.counters()
    assert "archive.Spooled.timed_out" not in counters


@pytest.mark.usefixtures("streams")
async def test_reject_says_no_once_kafka_is_known_to_be_away(own_kafka: KafkaNode, brokers: Brokers) -> None:
    """What waits for a frozen Kafka is refused when the outage is noticed, not after AckTimeout; then everything is."""
    topic, refused = unique_name("rejected"), ReasonCode.QUOTA_EXCEEDED
    node = brokers.make(config=config(own_kafka, topic, 'OnOutage = "reject"'), name="broker")
    await trio.to_thread.run_sync(node.start)
    pid = own_kafka.pid
    assert pid is not None
    client, older = await connect(node, "client"), await connect(node, "older", version=V311)
    assert await client.publish("spooled/5", b"0", qos=1) is ReasonCode.SUCCESS
    assert await older.publish("spooled/3", b"0", qos=1) is ReasonCode.SUCCESS
    os.kill(pid, signal.SIGSTOP)
    try:
        began = trio.current_time()
        await older.send(Publish("spooled/3", b"1", QoS(1), packet_id=100))
        assert await client.publish("spooled/5", b"1", qos=1) is refused
        await older.closed()
        noticed = trio.current_time()
        assert noticed - began < 12, "three to six seconds, and slack"
        for number in range(2, 12):
            assert await client.publish("spooled/5", b"%d" % number, qos=1 + number % 2) is refused
        assert trio.current_time() - noticed < 1
    finally:
        os.kill(pid, signal.SIGCONT)
    with trio.fail_after(LIMIT):
        while (code := await client.publish("spooled/5", b"12", qos=2)) is not ReasonCode.SUCCESS:
            assert code is refused
            await trio.sleep(0.2)
    await trio.to_thread.run_sync(node.stop)
    found = await trio.to_thread.run_sync(archived, own_kafka, topic)
    assert found == {"spooled/5": [0, 1, 12], "spooled/3": [0, 1]}, (
        "what was under way is there although it was refused"
    )
    counters = node.counters()
    assert counters["archive.Spooled.rejected"] >= 12
    assert "archive.Spooled.timed_out" not in counters
