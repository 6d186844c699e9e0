"""SUBSCRIBE, UNSUBSCRIBE and their answers, PINGREQ (chapters 3.8 to 3.12 of both versions)."""

from __future__ import annotations

import pytest

from mqtt_trio.broker.access import Principal
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.wire import (
    PINGREQ,
    PINGRESP,
    V5,
    V311,
    Wire,
    ack,
    both_versions,
    ill_formed,
    join,
    publish,
    subscribe,
    unsubscribe,
)


class NoSecrets:
    """Authorizer: no subscription under `secret`."""

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        return True

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        return not topic_filter.startswith("secret")

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return True


def suback(version: ProtocolVersion, packet_id: int, *codes: int) -> bytes:
    block = b"\0" if version is V5 else b""
    return bytes([0x90, 2 + len(block) + len(codes)]) + packet_id.to_bytes(2, "big") + block + bytes(codes)


def unsuback(version: ProtocolVersion, packet_id: int, *codes: int) -> bytes:
    """UNSUBACK; 3.1.1 has no codes."""
    body = b"\0" + bytes(codes) if version is V5 else b""
    return bytes([0xB0, 2 + len(body)]) + packet_id.to_bytes(2, "big") + body


def without_text(data: bytes) -> bytes:
    """A SUBACK or UNSUBACK of 5.0 without its properties, as if it had said nothing else."""
    return data[:1] + bytes([len(data) - 2 - data[4]]) + data[2:4] + b"\0" + data[5 + data[4] :]


async def expect_close(wire: Wire, version: ProtocolVersion, code: int) -> None:
    said = [data[:1] + data[2:3] for data in await wire.until_closed()]
    assert said == ([bytes([0xE0, code])] if version is V5 else [])


@pytest.mark.spec("MQTT3-3.8.4-1", "MQTT3-3.8.4-2", "MQTT3-2.3.1-7", "MQTT3-3.8.4-5", "MQTT3-3.9.3-1")
@pytest.mark.spec("MQTT5-3.8.4-1", "MQTT5-3.8.4-2", "MQTT5-2.2.1-6", "MQTT5-3.8.4-6", "MQTT5-3.9.3-1", "MQTT5-2.2.2-1")
@pytest.mark.spec("MQTT5-3.2.2-9", "MQTT5-3.2.2-10")
@both_versions
async def test_a_suback(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire = await join(memory_broker, version)
    for packet_id in (1, 0x1234, 65_535):
        await wire.send(subscribe(version, packet_id, ("a", 2), ("b", 0), ("c", 1), ("#", 2), ("+/x", 0)))
        assert await wire.read() == suback(version, packet_id, 2, 0, 1, 2, 0)


@pytest.mark.spec("MQTT3-3.8.4-4", "MQTT3-3.8.4-5", "MQTT3-3.9.3-1", "MQTT3-3.9.3-2")
@pytest.mark.spec("MQTT5-3.8.4-5", "MQTT5-3.8.4-6", "MQTT5-3.8.4-7", "MQTT5-3.9.3-1", "MQTT5-3.9.3-2")
@both_versions
async def test_each_filter_for_itself(version: ProtocolVersion) -> None:
    """As many SUBSCRIBEs with a filter each: refusals concern their own filter, the same filter again replaces."""
    async with open_memory_broker(authorizer=NoSecrets()) as memory:
        sender = await memory.connect("sender")
        await sender.publish("a", b"kept", retain=True)
        wire = await join(memory, version)
        failure = 0x87 if version is V5 else 0x80
        await wire.send(subscribe(version, 9, ("secret/1", 2), ("a", 1), ("secret/2", 0), ("b", 2), ("a", 0)))
        answer, *retained = await wire.until_pong()
        if version is V5:
            answer = without_text(answer)
        assert answer == suback(version, 9, failure, 1, failure, 2, 0)
        # Retain Handling 0 sends the retained message for each of both subscriptions to `a`.
        assert retained == [publish(version, "a", b"kept", flags=1)] * 2
        for topic_name in ("secret/1", "secret/2", "a", "b"):
            await sender.publish(topic_name, b"x", qos=2)
        assert await wire.until_pong() == [
            publish(version, "a", b"x"),
            publish(version, "b", b"x", flags=4, packet_id=1),
        ]


@pytest.mark.spec("MQTT3-3.8.4-6", "MQTT5-3.8.4-8", "MQTT3-3.3.1-5")
@both_versions
@pytest.mark.parametrize("granted", [0, 1, 2])
@pytest.mark.parametrize("published", [0, 1, 2])
async def test_the_lower_qos_counts(
    memory_broker: MemoryBroker, version: ProtocolVersion, published: int, granted: int
) -> None:
    wire, sender = await join(memory_broker, version), await memory_broker.connect("sender")
    await sender.publish("kept", b"x", qos=published, retain=True)
    await wire.send(subscribe(version, 1, ("t", granted), ("kept", granted)))
    lower = min(published, granted)
    packets = [publish(version, "kept", b"x", flags=lower << 1 | 1, packet_id=1)]
    assert (await wire.until_pong())[1:] == packets
    for number in range(2, 5):
        await sender.publish("t", b"x", qos=published)
        assert await wire.until_pong() == [publish(version, "t", b"x", flags=lower << 1, packet_id=number)]


@pytest.mark.spec("MQTT3-3.8.4-3", "MQTT5-3.8.4-3", "MQTT5-3.8.4-4", "MQTT5-3.3.1-9")
@both_versions
async def test_a_subscription_is_replaced(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    """Wholly, with its retained messages again, and what is on its way or waits is not lost."""
    sender = await memory_broker.connect("sender")
    await sender.publish("t/1", b"kept", qos=1, retain=True)
    properties = b"\x21\0\2" if version is V5 else b""  # Receive Maximum 2
    wire = await join(memory_broker, version, properties=properties)
    await wire.send(subscribe(version, 1, ("t/+", 1)))
    assert await wire.until_pong() == [
        suback(version, 1, 1),
        publish(version, "t/1", b"kept", flags=3, packet_id=1),
    ]
    for payload in (b"flying", b"waits"):
        await sender.publish("t/2", payload, qos=2)
    await wire.send(subscribe(version, 2, ("t/+", 0)))
    await sender.publish("t/2", b"new", qos=2)
    flying = publish(version, "t/2", b"flying", flags=2, packet_id=2)
    waits = publish(version, "t/2", b"waits", flags=2, packet_id=3)
    kept, new = publish(version, "t/1", b"kept", flags=1), publish(version, "t/2", b"new")
    found = await wire.until_pong()
    await wire.send(ack(0x40, 1), ack(0x40, 2))
    found += await wire.until_pong()
    assert sorted(found) == sorted([suback(version, 2, 0), flying, waits, kept, new])
    assert len(memory_broker.broker.connections.sessions["c"].subscriptions) == 1


@pytest.mark.spec("MQTT5-3.3.1-9", "MQTT5-3.3.1-10", "MQTT5-3.3.1-11", "MQTT5-3.8.4-4")
@pytest.mark.parametrize("handling, first, second", [(0, True, True), (1, True, False), (2, False, False)])
async def test_retain_handling_of_new_and_replaced(
    memory_broker: MemoryBroker, handling: int, first: bool, second: bool
) -> None:
    sender = await memory_broker.connect("sender")
    await sender.publish("t", b"kept", retain=True)
    wire = await join(memory_broker, V5)
    for expected in (first, second):
        await wire.send(subscribe(V5, 1, ("t", handling << 4)))
        assert (await wire.until_pong())[1:] == [publish(V5, "t", b"kept", flags=1)] * expected
    await wire.send(unsubscribe(V5, 2, "t"), subscribe(V5, 1, ("t", handling << 4)))
    assert (await wire.until_pong())[2:] == [publish(V5, "t", b"kept", flags=1)] * first, "new again"


@pytest.mark.spec("MQTT3-3.8.3-1", "MQTT3-3.10.3-1", "MQTT5-3.8.3-1", "MQTT5-3.10.3-1", "MQTT5-4.13.1-1")
@pytest.mark.spec("MQTT3-4.7.3-2", "MQTT5-4.7.3-2")
@both_versions
@ill_formed
@pytest.mark.parametrize("makes", ["SUBSCRIBE", "UNSUBSCRIBE"])
async def test_text_of_filters(memory_broker: MemoryBroker, version: ProtocolVersion, makes: str, bad: bytes) -> None:
    wire = await join(memory_broker, version)
    good_and_bad = (b"good", bad)
    if makes == "SUBSCRIBE":
        await wire.send(subscribe(version, 1, *((topic_filter, 0) for topic_filter in good_and_bad)))
    else:
        await wire.send(unsubscribe(version, 1, *good_and_bad))
    await expect_close(wire, version, 0x81)
    assert memory_broker.broker.metrics.subscriptions == 0


@pytest.mark.spec("MQTT3-3.8.3-3", "MQTT3-3.10.3-2", "MQTT5-3.8.3-2", "MQTT5-3.10.3-2", "MQTT3-4.8.0-1")
@both_versions
async def test_no_filter_at_all(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    for data in (subscribe(version, 1), unsubscribe(version, 1)):
        wire = await join(memory_broker, version)
        await wire.send(data, PINGREQ)
        await expect_close(wire, version, 0x82)


@pytest.mark.spec("MQTT3-3.8.1-1", "MQTT3-3.10.1-1", "MQTT3-3.6.1-1", "MQTT3-2.2.2-1", "MQTT3-2.2.2-2")
@pytest.mark.spec("MQTT5-3.8.1-1", "MQTT5-3.10.1-1", "MQTT5-3.6.1-1", "MQTT5-2.1.3-1")
@both_versions
@pytest.mark.parametrize("flags", [flags for flags in range(16) if flags != 2])
async def test_flags_of_requests(memory_broker: MemoryBroker, version: ProtocolVersion, flags: int) -> None:
    for good in (subscribe(version, 1, ("t", 0)), unsubscribe(version, 1, "t"), ack(0x62, 1)):
        wire = await join(memory_broker, version)
        await wire.send(bytes([good[0] & 0xF0 | flags]) + good[1:], PINGREQ)
        await expect_close(wire, version, 0x81)
    assert memory_broker.broker.metrics.subscriptions == 0


@pytest.mark.spec("MQTT3-3.8.3-4", "MQTT5-3.8.3-5")
@both_versions
@pytest.mark.parametrize("options", [0x40, 0x80, 0xC0, 0x42])
async def test_reserved_options(memory_broker: MemoryBroker, version: ProtocolVersion, options: int) -> None:
    wire = await join(memory_broker, version)
    await wire.send(subscribe(version, 1, ("t", options)), PINGREQ)
    await expect_close(wire, version, 0x81)


@pytest.mark.spec("MQTT3-3.8.3-4")
@pytest.mark.parametrize("options", [3, *(1 << bit for bit in range(2, 8))])
async def test_requested_qos_of_3_1_1(memory_broker: MemoryBroker, options: int) -> None:
    wire = await join(memory_broker, V311)
    await wire.send(subscribe(V311, 1, ("t", options)), PINGREQ)
    await expect_close(wire, V311, 0x81)


# UNSUBSCRIBE


@pytest.mark.spec(
    "MQTT3-3.10.4-1", "MQTT3-3.10.4-2", "MQTT3-3.10.4-4", "MQTT3-3.10.4-5", "MQTT3-3.10.4-6", "MQTT3-2.3.1-7"
)
@pytest.mark.spec(
    "MQTT5-3.10.4-1", "MQTT5-3.10.4-2", "MQTT5-3.10.4-4", "MQTT5-3.10.4-5", "MQTT5-3.10.4-6", "MQTT5-2.2.1-6"
)
@pytest.mark.spec("MQTT5-3.11.3-1", "MQTT5-3.11.3-2")
@both_versions
async def test_unsubscribe(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire, sender = await join(memory_broker, version), await memory_broker.connect("sender")
    await wire.send(subscribe(version, 1, ("a/b", 0), ("a/+", 0), ("a/#", 0), ("A/b", 0)))
    await wire.read()
    # Filters are compared character by character, not matched: this one is nobody's.
    await wire.send(unsubscribe(version, 0x1234, "+/b"), unsubscribe(version, 65_535, "#", "a/b/", "a"))
    answers = [unsuback(version, 0x1234, 0x11), unsuback(version, 65_535, 0x11, 0x11, 0x11)]
    assert await wire.until_pong() == answers
    await sender.publish("a/b", b"x")
    assert await wire.until_pong() == [publish(version, "a/b", b"x")]
    await wire.send(unsubscribe(version, 7, "a/b", "nothing", "a/+"))
    assert await wire.until_pong() == [unsuback(version, 7, 0, 0x11, 0)]
    await sender.publish("a/b", b"x")
    assert await wire.until_pong() == [publish(version, "a/b", b"x")], "by a/#, which is still there"
    await wire.send(unsubscribe(version, 8, "a/#", "a/#"))
    assert await wire.until_pong() == [unsuback(version, 8, 0, 0x11)]
    await sender.publish("a/b", b"x", qos=2)
    assert await wire.until_pong() == []
    await sender.publish("A/b", b"x")
    assert await wire.until_pong() == [publish(version, "A/b", b"x")]


@pytest.mark.spec("MQTT3-3.10.4-3", "MQTT5-3.10.4-3")
@both_versions
@pytest.mark.parametrize("qos", [1, 2])
async def test_begun_deliveries_are_completed(memory_broker: MemoryBroker, version: ProtocolVersion, qos: int) -> None:
    """Also when the client is away in between: what was sent and not acknowledged comes again."""
    properties = b"\x11\0\0\0\x3c" if version is V5 else b""
    wire = await join(memory_broker, version, flags=0, properties=properties)
    sender = await memory_broker.connect("sender")
    await wire.send(subscribe(version, 1, ("t", 2)))
    await wire.read()
    await sender.publish("t", b"begun", qos=qos)
    assert await wire.read() == publish(version, "t", b"begun", flags=qos << 1, packet_id=1)
    await wire.send(unsubscribe(version, 2, "t"))
    assert await wire.read() == unsuback(version, 2, 0)
    await sender.publish("t", b"not for it", qos=qos)
    await wire.cut()
    wire = await join(memory_broker, version, flags=0, properties=properties)
    assert await wire.until_pong() == [publish(version, "t", b"begun", flags=8 | qos << 1, packet_id=1)]
    if qos == 2:
        await wire.send(ack(0x50, 1))
        assert await wire.read() == ack(0x62, 1)
    await wire.send(ack(0x70 if qos == 2 else 0x40, 1))
    assert await wire.until_pong() == []
    assert not memory_broker.broker.connections.sessions["c"].inflight


@pytest.mark.spec("MQTT3-3.12.4-1", "MQTT5-3.12.4-1")
@both_versions
async def test_pings_are_answered_one_for_one(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire = await join(memory_broker, version)
    await wire.send(PINGREQ * 5)
    assert [await wire.read() for _ in range(5)] == [PINGRESP] * 5
    assert await wire.until_pong() == []
