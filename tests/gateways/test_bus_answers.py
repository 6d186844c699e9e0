"""When publishers hear of their messages for the bus: Kafka is slow, is away, or was never there [K9, K22]."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import attrs
import pytest
import trio
from trio.testing import MockClock

from gateways.kafka import build
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.options import BusOptions, KafkaOptions
from mqtt_trio.gateway import ReasonCode
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.packets import PubAck, Publish
from mqtt_trio.testing import NothingCameError, TestClient
from tests.gateway_support import LIMIT
from tests.gateways.memory_bus import FakeHost
from tests.gateways.whole_nodes import SOON, WholeCluster, WholeNode, drain, open_cluster

T = TypeVar("T")
STORE = BusSettings(ack="store")
REJECT = BusSettings(ack="store", on_outage="reject")


async def send(client: TestClient, *numbers: int) -> None:
    for number in numbers:
        await client.send(Publish("t", b"%d" % number, QoS(1), packet_id=number))


async def answers(client: TestClient, count: int) -> list[ReasonCode]:
    return [(await client.expect(PubAck)).reason_code for _ in range(count)]


def freeze(cluster: WholeCluster, node: WholeNode) -> None:
    """Let Kafka take nothing, and nobody notice."""
    node.bus.outbox.trouble = lambda: None
    cluster.kafka.go_away()


# --- AckTimeout


@pytest.mark.parametrize("kept", [False, True])
async def test_the_wait_for_a_slow_kafka_ends(autojump_clock: MockClock, kept: bool) -> None:
    """With a session store the message is on disk, and is sent by the next process if need be; else it is a no."""
    async with open_cluster(attrs.evolve(STORE, ack_timeout=5)) as cluster:
        one, two = await cluster.start("one", kept=kept), await cluster.start("two")
        listener = await two.connect("listener", "t")
        publisher = await one.connect("publisher")
        freeze(cluster, one)
        began = trio.current_time()
        await send(publisher, 1)
        await trio.sleep(3)
        await send(publisher, 2)
        expected = ReasonCode.SUCCESS if kept else ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
        assert await answers(publisher, 1) == [expected]
        assert trio.current_time() - began == pytest.approx(5, abs=0.1)
        assert await answers(publisher, 1) == [expected], "each has its own time"
        assert trio.current_time() - began == pytest.approx(8, abs=0.1)
        assert one.counters()["bus_messages_timed_out"] == (0 if kept else 2)
        cluster.kafka.come_back()
        assert [message.payload for message in await drain(listener)] == [b"1", b"2"], "they are sent nevertheless"
        await send(publisher, 3)
        assert await answers(publisher, 1) == [ReasonCode.SUCCESS]


async def test_a_3_x_client_is_disconnected(autojump_clock: MockClock) -> None:
    async with open_cluster(attrs.evolve(STORE, ack_timeout=5)) as cluster:
        one = await cluster.start("one", kept=False)
        publisher = await one.connect("publisher", version=ProtocolVersion.MQTT_3_1_1)
        freeze(cluster, one)
        await send(publisher, 1)
        await publisher.closed()


async def test_what_waits_for_a_slow_kafka_goes_to_the_spool(autojump_clock: MockClock, tmp_path: Path) -> None:
    settings = attrs.evolve(STORE, ack_timeout=5, on_outage="spool")
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one", kept=False), await cluster.start("two")
        listener = await two.connect("listener", "t")
        publisher = await one.connect("publisher")
        freeze(cluster, one)
        for number in range(1, 11):
            await send(publisher, number)
            await trio.sleep(0.1)
        assert await answers(publisher, 10) == [ReasonCode.SUCCESS] * 10
        assert one.counters()["bus_messages_timed_out"] == 0
        assert one.counters()["bus_spool_messages"] == 10
        cluster.kafka.come_back()
        await send(publisher, 11)
        assert await answers(publisher, 1) == [ReasonCode.SUCCESS]
        assert [message.payload for message in await drain(listener)] == [b"%d" % n for n in range(1, 12)]
        assert one.counters()["bus_spool_messages"] == one.counters()["bus_messages_waiting"] == 0


async def test_the_disk_gets_its_time(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose time ends while the spool is written are not told no."""

    async def slowly(function: Callable[[], T]) -> T:
        await trio.sleep(1)
        return function()

    monkeypatch.setattr("tests.gateways.whole_nodes.inline", slowly)
    settings = attrs.evolve(STORE, ack_timeout=5, on_outage="spool")
    async with open_cluster(settings, tmp_path) as cluster:
        one = await cluster.start("one", kept=False)
        publisher = await one.connect("publisher")
        freeze(cluster, one)
        for number in range(1, 11):
            await send(publisher, number)
            await trio.sleep(0.05)
        assert await answers(publisher, 10) == [ReasonCode.SUCCESS] * 10
        assert one.counters()["bus_messages_timed_out"] == 0


# --- OnOutage = "reject", "drop"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("policy", ["reject", "drop"])
async def test_nobody_waits_for_a_kafka_that_is_known_to_be_away(
    autojump_clock: MockClock, policy: str, kept: bool
) -> None:
    async with open_cluster(attrs.evolve(REJECT, on_outage=policy)) as cluster:
        one, two = await cluster.start("one", kept=kept), await cluster.start("two")
        listener = await two.connect("listener", "t")
        publisher = await one.connect("publisher")
        look = one.bus.outbox.look
        freeze(cluster, one)
        await send(publisher, 1, 2)
        with pytest.raises(NothingCameError):
            await publisher.next_packet(timeout=3)
        one.bus.outbox.trouble = cluster.kafka.trouble
        look()
        yes, no = ReasonCode.SUCCESS, ReasonCode.QUOTA_EXCEEDED
        under_way = no if policy == "reject" and not kept else yes  # what is on disk is no refusal
        began = trio.current_time()
        await send(publisher, 3)
        assert await answers(publisher, 3) == [under_way] * 2 + [no if policy == "reject" else yes]
        assert trio.current_time() - began < 0.1
        counters = one.counters()
        expected = (3 if not kept else 1) if policy == "reject" else 0
        assert (counters["bus_messages_rejected"], counters["bus_messages_timed_out"]) == (expected, 0)
        cluster.kafka.come_back()
        look()
        await send(publisher, 4)
        assert await answers(publisher, 1) == [yes]
        assert [message.payload for message in await drain(listener)] == [b"1", b"2", b"4"]


async def test_what_came_before_kafka_was_ever_there_is_answered_too(autojump_clock: MockClock) -> None:
    async with open_cluster(REJECT) as cluster:
        one = await cluster.start("one", kept=False)
        await one.kill()
        cluster.kafka.go_away()
        trouble, cluster.kafka.trouble = cluster.kafka.trouble, lambda: None  # type: ignore[method-assign]
        one = await cluster.start("one", kept=False)
        publisher = await one.connect("publisher")
        await send(publisher, 1)
        with pytest.raises(NothingCameError):
            await publisher.next_packet(timeout=3)
        one.bus.outbox.trouble = trouble
        one.bus.outbox.look()
        await send(publisher, 2)
        assert await answers(publisher, 2) == [ReasonCode.QUOTA_EXCEEDED] * 2
        assert one.counters()["bus_messages_rejected"] == 2


# --- the start and the end


@pytest.mark.parametrize("servers", ["127.0.0.1:1", "no-such-host.invalid:9092"])
async def test_a_kafka_that_is_certainly_away_holds_the_start_up_for_a_moment(
    servers: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gateway = build(KafkaOptions(servers=servers, bus=BusOptions(enabled=True)))
    host = FakeHost("one", bytes(16))
    host.data = tmp_path
    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        with trio.fail_after(LIMIT):
            await nursery.start(gateway.run, host)
        assert trio.current_time() - began < 5
        nursery.cancel_scope.cancel()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("starts without the bus" in line for line in lines) == 1
    assert sum(f"Kafka at {servers} is away" in line for line in lines) == 1


async def test_a_stop_tells_once_what_kafka_did_not_confirm(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_cluster() as cluster:
        one = await cluster.start("one", kept=False)
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        for number in range(20):
            await publisher.publish("t", b"%d" % number, qos=number % 2)
            await publisher.publish(f"r/{number}", b"", qos=1, retain=True)
            await trio.sleep(0.01)
        with trio.move_on_after(1):
            await one.bus.stop()
        assert one.counters()["bus_messages_failed"] == 40
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert lines == ["stopped before Kafka confirmed 40 messages and 20 retained messages: other nodes may miss them"]


async def test_what_is_on_disk_at_a_stop_is_no_loss(
    autojump_clock: MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_cluster(BusSettings(ack="store", on_outage="spool"), tmp_path) as cluster:
        one = await cluster.start("one")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        for number in range(20):
            await publisher.publish("t", b"%d" % number, qos=1)
        await trio.sleep(SOON)
        with trio.move_on_after(1):
            await one.bus.stop()
        assert one.counters()["bus_messages_failed"] == 0
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
