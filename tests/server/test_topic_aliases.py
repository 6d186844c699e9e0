"""Topic Aliases in both directions: who gets one, when it counts, and that none outlives its connection."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from mqtt_trio.broker.aliases import OutboundAliases
from mqtt_trio.broker.limits import Limits
from mqtt_trio.errors import LocalProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.decode import decode_publish
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import ConnAck, Connect, Disconnect, PubAck, Publish, Will
from mqtt_trio.protocol.wire import read_header
from mqtt_trio.testing import MemoryBroker, TestClient, open_memory_broker

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


def use(aliases: OutboundAliases, topic_name: str) -> tuple[int, bool]:
    proposal = aliases.propose(topic_name)
    aliases.sent()
    return proposal


def test_first_come_first_served() -> None:
    aliases = OutboundAliases(2)
    assert [use(aliases, name) for name in "abca"] == [(1, False), (2, False), (0, False), (1, True)]


def test_a_frame_that_did_not_leave_establishes_nothing() -> None:
    aliases = OutboundAliases(2)
    assert aliases.propose("a") == (1, False)
    assert use(aliases, "b") == (1, False)
    assert aliases.propose("c") == (2, False)
    aliases.withdraw()
    aliases.sent()
    assert use(aliases, "d") == (2, False)


async def raw_messages(client: TestClient, count: int) -> list[Publish]:
    """Read `count` PUBLISH packets as they are on the wire: an empty Topic Name stays empty."""
    data, at = client.connection.buffer[client.connection.start :], 0
    client.connection.buffer, client.connection.start = b"", 0
    found: list[Publish] = []
    while len(found) < count:
        header = read_header(data, at)
        if header is None or header[1] > len(data):
            data += await client.stream.receive_some(65_536)
            continue
        found.append(decode_publish(data[at] & 15, data, header[0], header[1], V5))
        at = header[1]
    assert at == len(data)
    return found


def seen(messages: list[Publish]) -> list[tuple[str, int | None]]:
    return [(message.topic_name, message.topic_alias) for message in messages]


@pytest.mark.spec("MQTT5-3.1.2-26", "MQTT5-3.3.2-11")
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_topics_get_aliases_up_to_the_maximum_of_the_client(memory_broker: MemoryBroker, qos: int) -> None:
    device = await memory_broker.connect("device", topic_alias_maximum=2)
    plain = await memory_broker.connect("plain")
    sender = await memory_broker.connect("sender")
    for client in (device, plain):
        await client.subscribe("t/#", qos=qos)
    names = ["t/1", "t/2", "t/3", "t/1", "t/2", "t/3", "t/1"]
    for name in names:
        await sender.publish(name, qos=qos)
    expected = [("t/1", 1), ("t/2", 2), ("t/3", None), ("", 1), ("", 2), ("t/3", None), ("", 1)]
    assert seen(await raw_messages(device, 7)) == expected
    assert seen(await raw_messages(plain, 7)) == [(name, None) for name in names]  # [MQTT5-3.1.2-27]


@pytest.mark.spec("MQTT5-3.1.2-27")
@pytest.mark.parametrize("maximum", [None, 0])
async def test_no_alias_for_who_wants_none(memory_broker: MemoryBroker, maximum: int | None) -> None:
    device = await memory_broker.connect("device", topic_alias_maximum=maximum)
    await device.subscribe("t")
    for _ in range(3):
        await device.publish("t")
    assert seen(await raw_messages(device, 3)) == [("t", None)] * 3


async def test_our_own_bound_holds_as_well() -> None:
    async with open_memory_broker(Limits(topic_alias_maximum=1)) as memory:
        device = await memory.connect("device", topic_alias_maximum=65_535)
        assert device.connack is not None
        assert device.connack.topic_alias_maximum == 1
        await device.subscribe("#")
        for name in "abab":
            await device.publish(name)
        assert seen(await raw_messages(device, 4)) == [("a", 1), ("b", None), ("", 1), ("b", None)]


@pytest.mark.spec("MQTT5-3.3.2-7")
async def test_aliases_end_with_the_connection_and_repeats_have_them(memory_broker: MemoryBroker) -> None:
    options: dict[str, Any] = {"topic_alias_maximum": 5, "session_expiry_interval": 60, "receive_maximum": 2}
    device = await memory_broker.connect("device", **options)
    sender = await memory_broker.connect("sender")
    await device.subscribe("a", "b", qos=1)
    for name in "abba":
        await sender.publish(name, qos=1)
    assert seen(await raw_messages(device, 2)) == [("a", 1), ("b", 2)]
    await device.cut()
    options["receive_maximum"] = 9
    device = await memory_broker.connect("device", clean_start=False, **options)
    messages = [await device.next_message() for _ in range(4)]
    assert [(m.topic_name, m.topic_alias, m.dup) for m in messages] == [
        ("a", 1, True),
        ("b", 2, True),
        ("b", 2, False),
        ("a", 1, False),
    ]


async def test_retained_messages_have_aliases(memory_broker: MemoryBroker) -> None:
    device = await memory_broker.connect("device", topic_alias_maximum=5)
    await device.publish("t", b"kept", retain=True)
    await device.subscribe("t")
    await device.publish("t")
    assert seen(await raw_messages(device, 2)) == [("t", 1), ("", 1)]


async def test_a_dropped_frame_establishes_no_alias(autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_broker(Limits(outbox_bytes=65_536, maximum_packet_size=60_000)) as memory:
        device = await memory.connect("device", topic_alias_maximum=5)
        sender = await memory.connect("sender")
        await device.subscribe("#", qos=0)
        link = next(link for link in memory.clients.links if link.session and link.session.client_id == "device")
        link.outbox.room = 2000  # as if the rest were on its way
        await sender.publish("large", bytes(3000))
        await sender.publish("small", b"1")
        await sender.publish("large", b"2")
        await sender.publish("large", b"3")
        assert await sender.nothing_waits()
        assert memory.broker.metrics.dropped_outbox_full == 1
        assert seen(await raw_messages(device, 3)) == [("small", 1), ("large", 2), ("", 2)]


@pytest.mark.spec("MQTT5-3.1.2-25")
async def test_an_alias_never_makes_a_message_too_large(memory_broker: MemoryBroker) -> None:
    device = await memory_broker.connect("device", topic_alias_maximum=5, maximum_packet_size=40)
    sender = await memory_broker.connect("sender")
    await device.subscribe("#", qos=0)
    for size in (34, 31, 34, 35):
        await sender.publish("t", bytes(size))
    await sender.publish("t", b"last")
    messages = await raw_messages(device, 4)
    assert seen(messages) == [("t", None), ("t", 1), ("t", None), ("", 1)]
    assert [len(message.payload) for message in messages] == [34, 31, 34, 4]
    assert memory_broker.broker.metrics.dropped_too_large == 1


# From clients


@pytest.mark.spec("MQTT5-3.3.2-8", "MQTT5-3.3.2-9")
@pytest.mark.parametrize("alias", [0, 3, 65_535])
async def test_an_alias_out_of_range_ends_the_client(alias: int) -> None:
    async with open_memory_broker(Limits(topic_alias_maximum=2)) as memory:
        client = await memory.connect("c")
        await client.stream.send_all(b"\x30\x07\x00\x01t\x03\x23" + alias.to_bytes(2, "big"))
        last = await client.closed()
        assert isinstance(last, Disconnect)
        assert last.reason_code is ReasonCode.TOPIC_ALIAS_INVALID


@pytest.mark.spec("MQTT5-3.2.2-18")
async def test_no_alias_is_taken_where_none_was_announced() -> None:
    async with open_memory_broker(Limits(topic_alias_maximum=0)) as memory:
        client = await memory.connect("c", topic_alias_maximum=5)
        assert client.connack is not None
        assert client.connack.topic_alias_maximum is None
        with pytest.raises(LocalProtocolError):
            await client.send(Publish("t", topic_alias=1))
        await client.stream.send_all(encode(Publish("t", topic_alias=1), V5))
        last = await client.closed()
        assert isinstance(last, Disconnect)
        assert last.reason_code is ReasonCode.TOPIC_ALIAS_INVALID


@pytest.mark.spec("MQTT5-3.3.2-12")
async def test_an_alias_may_be_mapped_anew(memory_broker: MemoryBroker) -> None:
    client, watcher = await memory_broker.connect("c"), await memory_broker.connect("w")
    await watcher.subscribe("#")
    for topic_name in ("a", "", "b", ""):
        await client.send(Publish(topic_name, topic_alias=16))
    messages = [await watcher.next_message() for _ in range(4)]
    assert [(m.topic_name, m.topic_alias) for m in messages] == [(name, None) for name in "aabb"]


@pytest.mark.spec("MQTT5-3.3.2-7")
async def test_an_alias_from_a_client_ends_with_its_connection(memory_broker: MemoryBroker) -> None:
    for _ in range(2):
        client = await memory_broker.connect("c", clean_start=False, session_expiry_interval=60)
        assert await client.nothing_waits()
        await client.send(Publish("a", topic_alias=1, qos=QoS(1), packet_id=1))
        assert await client.next_packet() == PubAck(1)
        await client.cut()
    client = await memory_broker.connect("c", clean_start=False, session_expiry_interval=60)
    await client.send(Publish("", topic_alias=1))
    last = await client.closed()
    assert isinstance(last, Disconnect)
    assert last.reason_code is ReasonCode.PROTOCOL_ERROR


# Levels of topics


@pytest.mark.parametrize("version", [V311, V5])
async def test_topics_have_a_bound_on_levels(version: ProtocolVersion) -> None:
    async with open_memory_broker(Limits(topic_levels=3)) as memory:
        client = await memory.connect("c", version=version)
        codes = await client.subscribe("a/b/c", "a/b/c/d", "+/+/+/#", qos=1)
        bad = ReasonCode.TOPIC_FILTER_INVALID if version == V5 else 0x80
        assert codes == (1, bad, bad)
        assert await client.publish("a/b/c", b"fits", qos=1) == 0
        assert (await client.next_message()).payload == b"fits"
        if version == V5:
            for qos in (1, 2):
                assert await client.publish("a/b/c/d", qos=qos) is ReasonCode.TOPIC_NAME_INVALID
        await client.send(Publish("a/b/c/d"))
        last = await client.closed()
        told = Disconnect(ReasonCode.TOPIC_NAME_INVALID, reason_string="a Topic Name of more than 3 levels")
        assert last == (told if version == V5 else None)


async def test_a_will_has_the_same_bound(memory_broker: MemoryBroker) -> None:
    client = TestClient(await memory_broker.open_stream(), V5)
    await client.send(Connect(client_id="c", will=Will(topic_name="/" * 128)))
    answer = await client.expect(ConnAck)
    assert answer.reason_code is ReasonCode.TOPIC_NAME_INVALID
    client = await memory_broker.connect("d", will=Will(topic_name="/" * 127))
    assert await client.nothing_waits()


async def test_a_311_publisher_beyond_the_bound_is_disconnected(memory_broker: MemoryBroker) -> None:
    client = await memory_broker.connect("c", version=V311)
    await client.send(Publish("/" * 128, qos=QoS(1), packet_id=1))
    assert await client.closed() is None
