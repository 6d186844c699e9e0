"""The gateway of the kit: it sees what is published, decides when it is acknowledged, brings messages from outside."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.errors import MalformedPacketError
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import Disconnect, PubAck, Publish
from mqtt_trio.testing import EPOCH, MemoryBroker, NothingCameError


async def test_it_sees_what_it_asked_for(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    gateway = memory_broker.add_gateway("rooms/#", "doors/+")
    meter = await memory_broker.connect("meter")
    await trio.sleep(60)
    for topic_name in ("rooms/hall", "rooms/hall", "doors/1", "doors/1/bell", "cellar"):
        for qos in (0, 1, 2):  # the second round of a topic goes through the fast lane
            await meter.publish(topic_name, b"%d" % qos, qos=qos, content_type="text/plain")
    assert [(m.topic_name, m.payload, m.qos) for m in gateway.messages] == [
        (topic_name, b"%d" % qos, qos) for topic_name in ("rooms/hall", "rooms/hall", "doors/1") for qos in (0, 1, 2)
    ]
    first = await gateway.next_message()
    assert first is gateway.messages[0]
    assert (first.client_id, first.published_at) == ("meter", EPOCH + 60)
    assert first.properties.content_type == "text/plain"


async def test_it_waits_for_a_message(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    gateway = memory_broker.add_gateway()
    meter = await memory_broker.connect("meter")

    async def later() -> None:
        await trio.sleep(10)
        await meter.publish("x", b"1")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(later)
        assert (await gateway.next_message()).payload == b"1"
        assert trio.current_time() == 10
    with pytest.raises(NothingCameError, match="no message came to the gateway of # within 5 s"):
        await gateway.next_message(timeout=5)


@pytest.mark.parametrize("qos", [1, 2])
async def test_held_acknowledgements_go_when_it_says_so(memory_broker: MemoryBroker, qos: int) -> None:
    gateway = memory_broker.add_gateway()
    watcher, meter = await memory_broker.connect("watcher"), await memory_broker.connect("meter")
    await watcher.subscribe("#")
    gateway.hold()
    for packet_id in (1, 2, 3):
        await meter.send(Publish("x", b"%d" % packet_id, qos, packet_id=packet_id))  # type: ignore[arg-type]
    await meter.send(Publish("x", b"QoS 0"))
    assert await meter.nothing_waits()
    assert gateway.held == 3
    assert len(gateway.messages) == len(await watcher.waiting_messages()) == 4
    gateway.release(1)
    assert (await meter.next_packet()).packet_id == 1  # type: ignore[union-attr]
    assert await meter.nothing_waits()
    gateway.accept()
    await meter.send(Publish("x", b"4", qos, packet_id=4))  # type: ignore[arg-type]
    assert await meter.nothing_waits()  # in order, behind those that are held
    gateway.release()
    assert [(await meter.next_packet()).packet_id for _ in range(3)] == [2, 3, 4]  # type: ignore[union-attr]
    assert gateway.held == 0
    gateway.release()


async def test_a_held_message_may_fail_in_the_end(memory_broker: MemoryBroker) -> None:
    gateway = memory_broker.add_gateway()
    meter = await memory_broker.connect("meter")
    gateway.hold()
    await meter.send(Publish("x", b"1", 1, packet_id=1))  # type: ignore[arg-type]
    assert await meter.nothing_waits()
    gateway.release(refused=ReasonCode.QUOTA_EXCEEDED)
    refused = await meter.expect(PubAck)
    assert (refused.packet_id, refused.reason_code) == (1, ReasonCode.QUOTA_EXCEEDED)


async def test_refused_messages_reach_nobody(memory_broker: MemoryBroker) -> None:
    gateway = memory_broker.add_gateway()
    watcher, meter = await memory_broker.connect("watcher"), await memory_broker.connect("meter")
    old = await memory_broker.connect("old", version=ProtocolVersion.MQTT_3_1_1)
    await watcher.subscribe("#")
    gateway.refuse(ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR)
    assert await meter.publish("x", b"1", qos=1) == ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
    assert await meter.publish("x", b"2", qos=2) == ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
    await meter.publish("x", b"0")
    await old.send(Publish("x", b"3", 1, packet_id=1))  # type: ignore[arg-type]
    await old.closed()
    assert [message.payload for message in await watcher.waiting_messages()] == [b"0"]
    assert [message.payload for message in gateway.refused] == [b"1", b"2", b"3"]
    assert [message.payload for message in gateway.messages] == [b"0"]
    assert memory_broker.broker.metrics.dropped_by_tap == 3
    gateway.accept()
    assert await meter.publish("x", b"4", qos=1) == ReasonCode.SUCCESS


async def test_it_brings_messages_from_outside(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    gateway = memory_broker.add_gateway()
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("outside/#", qos=1)
    gateway.publish("outside/1", b"live", qos=2, content_type="text/plain")
    message = await watcher.next_message()
    assert (message.payload, message.qos, message.properties.content_type) == (b"live", 1, "text/plain")
    gateway.publish("outside/2", b"kept", retain=True, message_expiry_interval=100)
    assert not (await watcher.next_message()).retain
    await trio.sleep(40)
    late = await memory_broker.connect("late")
    await late.subscribe("outside/#")
    message = await late.next_message()
    assert (message.payload, message.retain, message.properties.message_expiry_interval) == (b"kept", True, 60)
    gateway.publish("outside/2", retain=True)
    assert memory_broker.broker.metrics.retained_messages == 0
    assert gateway.messages == []  # what a gateway brings, no gateway sees


async def test_its_filters_are_checked(memory_broker: MemoryBroker) -> None:
    with pytest.raises(MalformedPacketError, match="# is the whole last level"):
        memory_broker.add_gateway("rooms/#/x")


async def test_nobody_may_be_left_to_wait_for_a_release(memory_broker: MemoryBroker) -> None:
    gateway = memory_broker.add_gateway()
    gateway.hold()
    meter = await memory_broker.connect("meter")
    await meter.send(Publish("x", b"1", 1, packet_id=1))  # type: ignore[arg-type]
    assert await meter.nothing_waits()
    await meter.cut()
    gateway.release()  # nobody waits for it any more
    assert memory_broker.broker.metrics.client_failures == 0
    meter = await memory_broker.reconnect(meter)
    await meter.send(Disconnect())
    assert await meter.closed() is None
