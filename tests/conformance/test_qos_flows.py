"""QoS 1 and 2: identifiers, acknowledgements, repeats, order, quotas (chapters 2.2, 4.3 to 4.6, 4.9)."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from mqtt_trio.broker.access import Principal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.wire import PINGREQ, V5, Wire, ack, both_versions, join, packet_ids, publish, subscribe, unsubscribe

HOUR = b"\x11\0\0\x0e\x10"
PUBACK, PUBREC, PUBREL, PUBCOMP = 0x40, 0x50, 0x62, 0x70


class NoSecrets:
    """Authorizer: nothing is published under `secret`."""

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        return not topic_name.startswith("secret")

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        return True

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return True


async def persistent(
    memory: MemoryBroker, version: ProtocolVersion, client_id: str = "c", properties: bytes = b""
) -> Wire:
    """Connect and keep the session for an hour at least."""
    return await join(memory, version, client_id, flags=0, properties=(HOUR + properties) if version is V5 else b"")


async def subscribed(memory: MemoryBroker, version: ProtocolVersion, qos: int = 2, properties: bytes = b"") -> Wire:
    """A client `c` with a session that lasts and a subscription to `t`."""
    wire = await persistent(memory, version, properties=properties)
    await wire.send(subscribe(version, 1, ("t", qos)))
    assert (await wire.read())[0] == 0x90
    return wire


def copies(
    version: ProtocolVersion, qos: int, payloads: list[bytes], first_id: int = 1, dup: bool = False
) -> list[bytes]:
    """The PUBLISHes of these payloads, numbered from `first_id` on."""
    flags = qos << 1 | 8 * dup
    return [publish(version, "t", p, flags=flags, packet_id=first_id + n) for n, p in enumerate(payloads)]


# As a receiver


@pytest.mark.spec("MQTT3-4.3.2-2", "MQTT5-4.3.2-4", "MQTT5-4.3.2-5", "MQTT3-2.3.1-6", "MQTT5-2.2.1-5")
@both_versions
async def test_qos_1_received(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    """The same identifier again is a new message once it was acknowledged, whatever DUP says."""
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("t", qos=0)
    wire = await join(memory_broker, version)
    for payload, dup in ((b"1", 0), (b"1", 8), (b"2", 8), (b"2", 0)):
        await wire.send(publish(version, "t", payload, flags=2 | dup, packet_id=77))
        assert await wire.until_pong() == [ack(PUBACK, 77)]
        assert (await watcher.next_message()).payload == payload
    assert await watcher.nothing_waits()


@pytest.mark.spec("MQTT3-4.3.3-2", "MQTT5-4.3.3-8", "MQTT5-4.3.3-10", "MQTT5-4.3.3-11", "MQTT5-4.3.3-12")
@pytest.mark.spec("MQTT3-2.3.1-3", "MQTT3-2.3.1-6", "MQTT5-2.2.1-5")
@both_versions
async def test_qos_2_received(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("t", qos=0)
    wire = await join(memory_broker, version)
    for payload in (b"first", b"second"):
        for dup in (0, 8, 8):
            await wire.send(publish(version, "t", payload, flags=4 | dup, packet_id=77))
            assert await wire.until_pong() == [ack(PUBREC, 77)]
        assert (await watcher.next_message()).payload == payload
        assert await watcher.nothing_waits(), "delivered once"
        await wire.send(ack(PUBREL, 77))
        assert await wire.until_pong() == [ack(PUBCOMP, 77)]


@pytest.mark.spec("MQTT5-4.3.3-9", "MQTT5-3.5.2-1")
async def test_after_a_refusal_the_identifier_is_free() -> None:
    async with open_memory_broker(authorizer=NoSecrets()) as memory:
        watcher = await memory.connect("watcher")
        await watcher.subscribe("t", qos=0)
        wire = await join(memory, V5)
        for _ in range(2):
            await wire.send(publish(V5, "secret", b"x", flags=4, packet_id=7))
            refusal = await wire.read()
            assert (refusal[0], refusal[2:5]) == (PUBREC, b"\0\7\x87")
        await wire.send(publish(V5, "t", b"new", flags=4, packet_id=7))
        assert await wire.until_pong() == [ack(PUBREC, 7)]
        assert (await watcher.next_message()).payload == b"new"


@pytest.mark.spec("MQTT5-4.3.3-13", "MQTT5-4.3.3-10")
async def test_the_flow_of_an_expired_message_goes_on(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    watcher = await memory_broker.connect("watcher", session_expiry_interval=3600)
    await watcher.subscribe("t", qos=1)
    await watcher.cut()
    wire = await join(memory_broker, V5)
    data = publish(V5, "t", b"x", flags=4, packet_id=7, properties=b"\x02\0\0\0\x05")
    await wire.send(data)
    assert await wire.until_pong() == [ack(PUBREC, 7)]
    await trio.sleep(10)
    await wire.send(bytes([data[0] | 8]) + data[1:])
    assert await wire.until_pong() == [ack(PUBREC, 7)], "still known"
    await wire.send(ack(PUBREL, 7))
    assert await wire.until_pong() == [ack(PUBCOMP, 7)]
    watcher = await memory_broker.connect("watcher", clean_start=False)
    assert await watcher.nothing_waits(), "it did expire"


@pytest.mark.spec("MQTT3-4.6.0-2", "MQTT3-4.6.0-3", "MQTT3-4.6.0-6")
@both_versions
async def test_acknowledgements_keep_the_order(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire = await join(memory_broker, version)
    identifiers = [9, 3, 65_535, 1, 500, 2, 77, 76]
    for qos, kind in ((1, PUBACK), (2, PUBREC)):
        await wire.send(*(publish(version, "t", b"x", flags=qos << 1, packet_id=each) for each in identifiers))
        answers = await wire.until_pong()
        assert {data[0] for data in answers} == {kind}
        assert packet_ids(answers) == identifiers
    await wire.send(*(ack(PUBREL, each) for each in reversed(identifiers)))
    answers = await wire.until_pong()
    assert ({data[0] for data in answers}, packet_ids(answers)) == ({PUBCOMP}, identifiers[::-1])


# As a sender


@pytest.mark.spec("MQTT3-4.3.2-1", "MQTT3-2.3.1-3", "MQTT3-2.3.1-4", "MQTT3-4.4.0-1", "MQTT3-3.3.1-1", "MQTT3-4.6.0-1")
@pytest.mark.spec("MQTT5-4.3.2-1", "MQTT5-4.3.2-2", "MQTT5-4.3.2-3", "MQTT5-4.4.0-1", "MQTT5-3.3.1-1", "MQTT5-2.2.1-4")
@both_versions
async def test_qos_1_sent(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, version: ProtocolVersion
) -> None:
    wire = await subscribed(memory_broker, version)
    sender = await memory_broker.connect("sender")
    payloads = [b"0", b"1", b"2"]
    for payload in payloads:
        await sender.publish("t", payload, qos=1)
    assert await wire.until_pong() == copies(version, 1, payloads)
    await trio.sleep(3600)
    assert await wire.until_pong() == [], "nothing is repeated on a connection"
    await wire.send(ack(PUBREC, 1), ack(PUBCOMP, 1), ack(PUBACK, 2))  # only a PUBACK acknowledges QoS 1
    await wire.until_pong()
    await wire.cut()
    wire = await persistent(memory_broker, version)
    again = copies(version, 1, payloads, dup=True)
    assert await wire.until_pong() == [again[0], again[2]]
    await wire.send(ack(PUBACK, 1), ack(PUBACK, 3))
    await wire.until_pong()
    await wire.cut()
    wire = await persistent(memory_broker, version)
    assert await wire.until_pong() == []


@pytest.mark.spec("MQTT3-4.3.3-1", "MQTT3-4.4.0-1", "MQTT3-2.3.1-6", "MQTT3-3.3.1-1")
@pytest.mark.spec("MQTT5-4.3.3-1", "MQTT5-4.3.3-2", "MQTT5-4.3.3-3", "MQTT5-4.3.3-4", "MQTT5-4.3.3-5", "MQTT5-4.3.3-6")
@pytest.mark.spec("MQTT5-4.4.0-1", "MQTT5-3.6.2-1", "MQTT5-2.2.1-5")
@both_versions
async def test_qos_2_sent(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, version: ProtocolVersion
) -> None:
    wire = await subscribed(memory_broker, version)
    sender = await memory_broker.connect("sender")
    payloads = [b"0", b"1", b"2"]
    for payload in payloads:
        await sender.publish("t", payload, qos=2)
    assert await wire.until_pong() == copies(version, 2, payloads)
    await wire.send(ack(PUBACK, 1), ack(PUBREC, 2), ack(PUBREC, 3))  # a PUBACK acknowledges no QoS 2
    assert await wire.until_pong() == [ack(PUBREL, 2), ack(PUBREL, 3)]
    await wire.send(ack(PUBCOMP, 3))
    await trio.sleep(3600)
    assert await wire.until_pong() == []
    await wire.cut()
    for _ in range(2):
        wire = await persistent(memory_broker, version)
        assert await wire.until_pong() == [*copies(version, 2, payloads[:1], dup=True), ack(PUBREL, 2)]
        await wire.cut()
    wire = await persistent(memory_broker, version)
    await wire.until_pong()
    await wire.send(ack(PUBCOMP, 2), ack(PUBREC, 1))
    assert await wire.until_pong() == [ack(PUBREL, 1)]
    await wire.send(ack(PUBREC, 1))  # again, before its PUBCOMP: the same answer
    assert await wire.until_pong() == [ack(PUBREL, 1)]
    await wire.send(ack(PUBCOMP, 1))
    await wire.until_pong()
    await wire.cut()
    wire = await persistent(memory_broker, version)
    assert await wire.until_pong() == []


@pytest.mark.spec("MQTT3-4.6.0-4", "MQTT3-4.6.0-6")
@both_versions
async def test_pubrels_follow_the_order_of_pubrecs(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire = await subscribed(memory_broker, version)
    sender = await memory_broker.connect("sender")
    for _ in range(6):
        await sender.publish("t", b"x", qos=2)
    order = [4, 1, 6, 2, 3, 5]
    await wire.until_pong()
    await wire.send(*(ack(PUBREC, each) for each in order))
    assert await wire.until_pong() == [ack(PUBREL, each) for each in order]


@pytest.mark.spec("MQTT3-2.3.1-1", "MQTT3-2.3.1-3", "MQTT3-2.3.1-4", "MQTT3-4.3.2-1", "MQTT3-4.3.3-1")
@pytest.mark.spec("MQTT5-2.2.1-4", "MQTT5-4.3.2-1", "MQTT5-4.3.3-1")
@both_versions
@pytest.mark.parametrize("qos", [1, 2])
async def test_identifiers_that_are_in_use_are_left_out(
    memory_broker: MemoryBroker, version: ProtocolVersion, qos: int
) -> None:
    """Beyond 65,535 they begin again with 1, and skip what has no acknowledgement yet."""
    wire = await subscribed(memory_broker, version)
    sender = await memory_broker.connect("sender")
    for number in range(4):
        await sender.publish("t", b"%d" % number, qos=qos)
    assert await wire.until_pong() == copies(version, qos, [b"0", b"1", b"2", b"3"])
    await wire.send(ack(PUBACK, 2) if qos == 1 else ack(PUBREC, 2))
    if qos == 2:
        assert await wire.read() == ack(PUBREL, 2)
        await wire.send(ack(PUBCOMP, 2))
    await wire.until_pong()
    memory_broker.broker.connections.sessions["c"].next_id = 65_534
    for _ in range(5):
        await sender.publish("t", b"later", qos=qos)
    # Topic and its length stand before the identifier.
    found = [int.from_bytes(data[5:7], "big") for data in await wire.until_pong()]
    assert found == [65_534, 65_535, 2, 5, 6]


@pytest.mark.spec("MQTT5-4.4.0-2", "MQTT5-4.3.3-4")
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_refused_delivery_is_not_repeated(memory_broker: MemoryBroker, qos: int) -> None:
    wire = await subscribed(memory_broker, V5)
    sender = await memory_broker.connect("sender")
    await sender.publish("t", b"refused", qos=qos)
    await wire.read()
    await wire.send(ack(PUBACK if qos == 1 else PUBREC, 1, 0x80))
    assert await wire.until_pong() == [], "no PUBREL for a refusal"
    await wire.cut()
    wire = await persistent(memory_broker, V5)
    assert await wire.until_pong() == []
    memory_broker.broker.connections.sessions["c"].next_id = 1
    await sender.publish("t", b"next", qos=qos)
    assert await wire.read() == publish(V5, "t", b"next", flags=qos << 1, packet_id=1), "the identifier is free"


@pytest.mark.spec("MQTT5-4.3.3-7")
async def test_what_was_sent_does_not_expire(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    wire = await subscribed(memory_broker, V5)
    sender = await memory_broker.connect("sender")
    await sender.publish("t", b"begun", qos=2, message_expiry_interval=5)
    data = await wire.read()
    assert data[0] == 0x34
    await wire.cut()
    await trio.sleep(10)
    wire = await persistent(memory_broker, V5)
    again = await wire.read()
    assert (again[0], again[5:7], again[-5:]) == (0x3C, data[5:7], b"begun")
    await wire.send(ack(PUBREC, 1))
    assert await wire.read() == ack(PUBREL, 1)


# Order


@pytest.mark.spec("MQTT3-4.6.0-5", "MQTT3-4.6.0-6", "MQTT5-4.6.0-5", "MQTT5-4.6.0-6")
@both_versions
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_messages_keep_their_order(memory_broker: MemoryBroker, version: ProtocolVersion, qos: int) -> None:
    """In pieces that go by the fast lane, through a window of three, a queue and an absence; for any topic."""
    window = b"\x21\0\3" if version is V5 else b""
    device = await subscribed(memory_broker, version, properties=window)
    sender = await join(memory_broker, version, "sender")
    payloads = [b"%d" % number for number in range(40)]
    frames = [publish(version, "t", p, flags=qos << 1, packet_id=n) for n, p in enumerate(payloads, 1)]
    await sender.send(*frames[:20])
    await sender.until_pong()
    found: list[bytes] = []

    async def drain(wire: Wire) -> None:
        while got := [data for data in await wire.until_pong() if data[0] >> 4 == 3]:
            for data in got:
                found.append(data.removeprefix(data[:5])[2 * (qos > 0) + (version is V5) :])
                if qos:
                    await wire.send(ack(PUBACK if qos == 1 else PUBREC, int.from_bytes(data[5:7], "big")))
                if qos == 2:
                    await wire.send(ack(PUBCOMP, int.from_bytes(data[5:7], "big")))

    if qos == 0:
        await sender.send(*frames[20:])
        await sender.until_pong()
        await drain(device)
    else:
        await device.cut()
        await sender.send(*frames[20:])
        await sender.until_pong()
        await drain(await persistent(memory_broker, version, properties=window))
    assert found == payloads


# Quotas


@pytest.mark.spec("MQTT5-3.3.4-9", "MQTT5-3.3.4-10", "MQTT5-4.9.0-1", "MQTT5-4.9.0-2", "MQTT5-4.9.0-3")
@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("maximum", [1, 3])
async def test_the_servers_send_quota(memory_broker: MemoryBroker, qos: int, maximum: int) -> None:
    wire = await subscribed(memory_broker, V5, properties=b"\x21" + maximum.to_bytes(2, "big"))
    sender = await memory_broker.connect("sender")
    payloads = [b"%d" % number for number in range(6)]
    for payload in payloads:
        await sender.publish("t", payload, qos=qos)
    assert await wire.until_pong() == copies(V5, qos, payloads[:maximum]), "as many as the client takes, no more"
    # Everything else goes on meanwhile.
    await sender.publish("t", b"QoS 0")
    await wire.send(subscribe(V5, 2, ("u", 0)), unsubscribe(V5, 3, "u"), publish(V5, "x", b"", flags=2, packet_id=1))
    await wire.send(publish(V5, "x", b"", flags=4, packet_id=2), ack(PUBREL, 2))
    assert [data[0] for data in await wire.until_pong()] == [0x30, 0x90, 0xB0, PUBACK, PUBREC, PUBCOMP]
    if qos == 2:
        await wire.send(ack(PUBREC, 1))
        assert await wire.until_pong() == [ack(PUBREL, 1)], "a PUBREC gives no quota back"
    await wire.send(ack(PUBACK if qos == 1 else PUBCOMP, 1))
    assert await wire.until_pong() == copies(V5, qos, payloads[maximum : maximum + 1], maximum + 1)
    await wire.send(ack(PUBACK if qos == 1 else PUBREC, maximum + 1, 0x80))
    assert await wire.until_pong() == copies(V5, qos, payloads[maximum + 1 : maximum + 2], maximum + 2), (
        "a refusal does"
    )


@pytest.mark.spec("MQTT5-3.3.4-7", "MQTT5-4.13.2-1")
async def test_a_client_beyond_its_quota(autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_broker(Limits(receive_maximum=3)) as memory:
        wire = await join(memory, V5)
        packets = [publish(V5, "t", b"x", flags=4, packet_id=each) for each in range(1, 5)]
        await wire.send(*packets[:3])
        assert await wire.until_pong() == [ack(PUBREC, each) for each in (1, 2, 3)]
        await wire.send(ack(PUBREL, 2), publish(V5, "t", b"x", flags=4, packet_id=5))
        assert await wire.until_pong() == [ack(PUBCOMP, 2), ack(PUBREC, 5)]
        await wire.send(packets[3], PINGREQ)
        said = [data[:1] + data[2:3] for data in await wire.until_closed()]
        assert said == [b"\xe0\x93"]


@pytest.mark.spec("MQTT5-3.3.4-8")
async def test_our_client_at_its_quota_sends_everything_else() -> None:
    async with open_memory_broker(Limits(receive_maximum=2)) as memory:
        client = await memory.connect("c")
        assert client.connack is not None
        assert client.connack.receive_maximum == 2
        for packet_id in (1, 2):
            await client.stream.send_all(publish(V5, "t", b"x", flags=4, packet_id=packet_id))
        with trio.fail_after(5):
            assert await client.subscribe("u", qos=1) == (1,)
            assert await client.unsubscribe("u") == (0,)
            await client.publish("t", b"QoS 0")
            assert not await client.nothing_waits(), "the ping came back, behind two PUBRECs"
