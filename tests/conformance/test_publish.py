"""PUBLISH: its form, RETAIN, DUP, properties, overlapping subscriptions (chapter 3.3 of both versions)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import trio

from mqtt_trio.broker.access import Principal
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import MessageProperties
from mqtt_trio.testing import MemoryBroker, TestClient, open_memory_broker
from tests.wire import V5, V311, Wire, ack, both_versions, ill_formed, join, publish, subscribe, text

EVERYTHING = MessageProperties(
    payload_format_indicator=1,
    content_type="text/plain",
    response_topic="answers/1",
    correlation_data=b"\0\xff\0",
    user_properties=(("b", "1"), ("a", "2"), ("b", "1"), ("", "\ufeff"), ("a", "0")),
)


class NoSecrets:
    """Authorizer: nothing under `secret`."""

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        return not topic_name.startswith("secret")

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        return not topic_filter.startswith("secret")

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return True


async def subscribed(memory: MemoryBroker, version: ProtocolVersion, *filters: tuple[str, int]) -> Wire:
    """A client `s` with these subscriptions; its SUBACK is read."""
    wire = await join(memory, version, "s")
    await wire.send(subscribe(version, 1, *filters))
    assert (await wire.read())[0] == 0x90
    return wire


@pytest.mark.spec("MQTT3-2.3.1-5", "MQTT5-2.2.1-2", "MQTT3-4.3.1-1", "MQTT5-4.3.1-1", "MQTT3-3.3.1-2", "MQTT5-3.3.1-2")
@both_versions
@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("dup", [False, True])
async def test_qos_0_has_neither_identifier_nor_dup(
    memory_broker: MemoryBroker, version: ProtocolVersion, qos: int, dup: bool
) -> None:
    """However the message came. At QoS 0 the first bytes of its payload are no Packet Identifier either."""
    watcher = await subscribed(memory_broker, version, ("t", 0))
    sender = await join(memory_broker, version)
    for _ in range(3):  # the second and third go through the fast lane
        await sender.send(publish(version, "t", b"\0\7xy", flags=qos << 1 | 8 * (dup and qos > 0), packet_id=7))
        await sender.until_pong()
        if qos == 2:
            await sender.send(ack(0x62, 7))
            assert await sender.read() == ack(0x70, 7)
        assert await watcher.read() == publish(version, "t", b"\0\7xy")


@pytest.mark.spec("MQTT3-3.3.1-2", "MQTT5-3.3.1-2", "MQTT5-4.13.1-1", "MQTT3-4.8.0-1")
@both_versions
async def test_dup_at_qos_0_is_refused(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    sender = await join(memory_broker, version)
    await sender.send(publish(version, "t", b"x", flags=8))
    assert [data[:1] + data[2:3] for data in await sender.until_closed()] == ([b"\xe0\x81"] if version is V5 else [])


@pytest.mark.spec("MQTT3-3.3.1-3", "MQTT5-3.3.1-3")
@both_versions
@pytest.mark.parametrize("qos", [1, 2])
async def test_dup_is_not_passed_on(memory_broker: MemoryBroker, version: ProtocolVersion, qos: int) -> None:
    watcher = await subscribed(memory_broker, version, ("t", 2))
    sender = await join(memory_broker, version)
    for number, dup in enumerate((8, 0, 8, 8), 1):
        await sender.send(publish(version, "t", b"x", flags=qos << 1 | dup, packet_id=number))
        assert await watcher.read() == publish(version, "t", b"x", flags=qos << 1, packet_id=number)


@pytest.mark.spec("MQTT3-3.3.4-1", "MQTT5-3.3.4-1", "MQTT3-2.3.1-6", "MQTT5-2.2.1-5", "MQTT5-4.3.2-4", "MQTT5-4.3.3-8")
@both_versions
async def test_the_answer_is_that_of_the_qos(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    sender = await join(memory_broker, version)
    await subscribed(memory_broker, version, ("t", 2))
    for packet_id in (1, 0x1234, 65_535):
        for qos, answer in ((0, []), (1, [ack(0x40, packet_id)]), (2, [ack(0x50, packet_id)])):
            await sender.send(publish(version, "t", b"x", flags=qos << 1, packet_id=packet_id))
            assert await sender.until_pong() == answer
        await sender.send(ack(0x62, packet_id))
        assert await sender.read() == ack(0x70, packet_id)


COMPOSED, DECOMPOSED = "\xe4", "a\u0308"
"""The same letter for a reader, two names for a server that does not normalize."""
TOPICS = ["a", "a/b", "a/b/c", "/", "/a", "a/", "a//b", "b", "A", "a b", COMPOSED, DECOMPOSED, "$a", "$a/b"]
FILTERS = {
    "#": r"[^$].*",
    "+": r"[^/$][^/]*|",
    "a/#": r"a(/.*)?",
    "a/+": r"a/[^/]*",
    "+/b": r"[^/$][^/]*/b|/b",
    "a/+/b": r"a/[^/]*/b",
    "/+": r"/[^/]*",
    "+/+": r"([^/$][^/]*)?/[^/]*",
    "a": "a",
    "a/": "a/",
    "$a/#": r"\$a(/.*)?",
    COMPOSED: COMPOSED,
    DECOMPOSED: DECOMPOSED,
    "+/+/#": r"([^/$][^/]*)?/[^/]*(/.*)?",
}
"""Topic Filter -> the topics that it matches as a regular expression."""


@pytest.mark.spec("MQTT3-3.3.2-3", "MQTT5-3.3.2-3", "MQTT3-3.8.3-2", "MQTT3-4.7.1-3", "MQTT5-4.7.1-2", "MQTT5-4.7.2-1")
@pytest.mark.spec("MQTT3-4.7.2-1", "MQTT3-4.7.3-4", "MQTT5-4.7.3-4")
@both_versions
@pytest.mark.parametrize("topic_filter", FILTERS)
async def test_a_subscriber_gets_what_its_filter_matches(
    memory_broker: MemoryBroker, version: ProtocolVersion, topic_filter: str
) -> None:
    """And nothing else: live, and retained."""
    expected = [name for name in TOPICS if re.fullmatch(FILTERS[topic_filter], name)]
    watcher = await subscribed(memory_broker, version, (topic_filter, 0))
    sender = await join(memory_broker, version)
    await sender.send(*(publish(version, name, b"x", flags=1) for name in TOPICS))
    await sender.until_pong()
    assert await watcher.until_pong() == [publish(version, name, b"x") for name in expected]
    late = await join(memory_broker, version, "late")
    await late.send(subscribe(version, 1, (topic_filter, 0)))
    suback, *retained = await late.until_pong()
    assert suback[-1] == 0
    assert sorted(retained) == sorted(publish(version, name, b"x", flags=1) for name in expected)


@pytest.mark.spec("MQTT3-1.5.3-3", "MQTT5-1.5.4-3")
@both_versions
async def test_a_byte_order_mark_is_a_character(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    mark = b"\xef\xbb\xbf"
    marked = await subscribed(memory_broker, version, ("\ufeffa", 0), ("b\ufeff/+", 0))
    plain = await memory_broker.connect("plain")
    await plain.subscribe("a", "b/+")
    sender = await join(memory_broker, version, "\ufeffs")
    properties = b"\x03" + text(mark + b"t") + b"\x26" + text(mark) + text(b"v" + mark) if version is V5 else b""
    packets = [publish(version, name, b"x", properties=properties) for name in (mark + b"a", b"b" + mark + b"/" + mark)]
    await sender.send(*packets)
    assert await sender.until_pong() == [], "whose Client Identifier is not that of the subscriber"
    assert await marked.until_pong() == packets
    assert await plain.nothing_waits()


# Properties


@pytest.mark.spec(
    "MQTT5-1.5.7-1", "MQTT5-3.3.2-13", "MQTT5-3.3.2-19", "MQTT5-3.3.2-1", "MQTT5-1.5.4-1", "MQTT5-1.5.4-2"
)
@ill_formed
@pytest.mark.parametrize("field", ["topic", "name", "value", "response topic", "content type"])
async def test_text_of_a_publish(memory_broker: MemoryBroker, field: str, bad: bytes) -> None:
    properties = {
        "topic": b"",
        "name": b"\x26" + text(bad) + text("v"),
        "value": b"\x26" + text("n") + text(bad),
        "response topic": b"\x08" + text(bad),
        "content type": b"\x03" + text(bad),
    }[field]
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("#")
    sender = await join(memory_broker, V5)
    await sender.send(publish(V5, bad if field == "topic" else "t", b"x", properties=properties))
    farewell = (await sender.until_closed())[-1]
    assert farewell[:1] + farewell[2:3] == b"\xe0\x81"
    assert await watcher.nothing_waits()


@pytest.mark.spec("MQTT3-3.3.2-1", "MQTT3-1.5.3-1", "MQTT3-1.5.3-2")
@ill_formed
async def test_text_of_a_publish_of_3_1_1(memory_broker: MemoryBroker, bad: bytes) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("#")
    sender = await join(memory_broker, V311)
    await sender.send(publish(V311, bad, b"x"))
    assert await sender.until_closed() == []
    assert await watcher.nothing_waits()


@pytest.mark.spec(
    "MQTT5-3.3.2-4", "MQTT5-3.3.2-15", "MQTT5-3.3.2-16", "MQTT5-3.3.2-17", "MQTT5-3.3.2-18", "MQTT5-3.3.2-20"
)
@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("way", ["live", "retained", "queued"])
async def test_properties_arrive_as_they_were_sent(memory_broker: MemoryBroker, qos: int, way: str) -> None:
    sender = await memory_broker.connect("sender")
    watchers = [await memory_broker.connect(name, session_expiry_interval=60) for name in ("one", "two")]
    for watcher in watchers:
        await watcher.subscribe("t", qos=2)
        if way == "queued":
            await watcher.cut()

    async def send() -> None:
        options = vars_of(EVERYTHING)
        await sender.publish("t", b"x", qos=max(qos, way == "queued"), retain=way == "retained", **options)

    if way == "retained":
        await send()
        for watcher in watchers:
            assert (await watcher.next_message()).properties == EVERYTHING
            await watcher.subscribe("t", qos=2)  # sends the retained message again
    else:
        for _ in range(3):  # the second and third by the fast lane where it may
            await send()
    if way == "queued":
        watchers = [
            await memory_broker.connect(name, clean_start=False, session_expiry_interval=60) for name in ("one", "two")
        ]
    for watcher in watchers:
        for _ in range(1 if way == "retained" else 3):
            message = await watcher.next_message()
            assert message.properties == EVERYTHING
            assert message.properties.user_properties == EVERYTHING.user_properties


def vars_of(properties: MessageProperties) -> dict[str, Any]:
    """The properties that are there, by name."""
    names = ("payload_format_indicator", "content_type", "response_topic", "correlation_data", "user_properties")
    return {name: getattr(properties, name) for name in names}


# RETAIN


async def retained(memory: MemoryBroker, version: ProtocolVersion, topic_filter: str = "t") -> list[bytes]:
    """What a new subscription gets."""
    late = await join(memory, version, "late")
    await late.send(subscribe(version, 1, (topic_filter, 2)))
    found = (await late.until_pong())[1:]
    await late.cut()
    return found


@pytest.mark.spec(
    "MQTT3-3.3.1-5", "MQTT3-3.3.1-6", "MQTT3-3.3.1-7", "MQTT3-3.3.1-8", "MQTT3-3.3.1-12", "MQTT3-3.3.1-10"
)
@pytest.mark.spec("MQTT5-3.3.1-5", "MQTT5-3.3.1-6", "MQTT5-3.3.1-7", "MQTT5-3.3.1-8", "MQTT5-3.3.1-9", "MQTT3-3.3.1-11")
@both_versions
async def test_the_retained_message_of_a_topic(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    sender = await memory_broker.connect("sender", version=version)
    watcher = await subscribed(memory_broker, version, ("t", 0))
    assert await retained(memory_broker, version) == []
    for qos in (2, 1, 0):
        await sender.publish("t", b"%d" % qos, qos=qos, retain=True)
        expected = [publish(version, "t", b"%d" % qos, flags=qos << 1 | 1, packet_id=1)]
        assert await retained(memory_broker, version) == expected, "the last one, with its QoS"
        await sender.publish("t", b"not kept", qos=qos)
        await sender.publish("t", b"", qos=qos)
        assert await retained(memory_broker, version) == expected, "RETAIN 0 changes nothing"
    await watcher.until_pong()
    await sender.publish("t", b"", retain=True)
    assert await watcher.until_pong() == [publish(version, "t", b"")], "delivered like any message"
    assert await retained(memory_broker, version) == []
    assert memory_broker.broker.metrics.retained_messages == 0


@pytest.mark.spec("MQTT3-3.3.1-9", "MQTT5-3.3.1-12")
@both_versions
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_an_established_subscription_gets_retain_0(
    memory_broker: MemoryBroker, version: ProtocolVersion, qos: int
) -> None:
    watcher = await subscribed(memory_broker, version, ("t", 2))
    sender = await join(memory_broker, version)
    for packet_id, retain in ((1, 1), (2, 0), (3, 1)):
        await sender.send(publish(version, "t", b"x", flags=qos << 1 | retain, packet_id=packet_id))
        assert await watcher.read() == publish(version, "t", b"x", flags=qos << 1, packet_id=packet_id)


@pytest.mark.spec("MQTT5-3.3.1-13")
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_retain_as_published(memory_broker: MemoryBroker, qos: int) -> None:
    watcher = await subscribed(memory_broker, V5, ("t", 2 | 8))
    sender = await join(memory_broker, V5)
    for packet_id, retain in ((1, 1), (2, 0), (3, 1)):
        data = publish(V5, "t", b"x", flags=qos << 1 | retain, packet_id=packet_id)
        await sender.send(data)
        assert await watcher.read() == data


# Overlapping subscriptions


@pytest.mark.spec("MQTT3-3.3.5-1", "MQTT5-3.3.4-2")
@both_versions
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_overlapping_subscriptions_deliver_at_the_highest_qos(
    memory_broker: MemoryBroker, version: ProtocolVersion, qos: int
) -> None:
    watcher = await subscribed(memory_broker, version, ("a/#", 0), ("a/+", qos), ("a/b", 0))
    sender = await join(memory_broker, version)
    await sender.send(publish(version, "a/b", b"x", flags=4, packet_id=1))
    await sender.until_pong()
    assert await watcher.until_pong() == [publish(version, "a/b", b"x", flags=qos << 1, packet_id=1)]


@pytest.mark.spec("MQTT5-3.3.4-3", "MQTT5-3.3.4-4", "MQTT5-3.3.4-5")
async def test_identifiers_of_overlapping_subscriptions(memory_broker: MemoryBroker) -> None:
    watcher, sender = await memory_broker.connect("w"), await memory_broker.connect("s")
    await watcher.subscribe("a/#", subscription_identifier=1)
    await watcher.subscribe("a/+", subscription_identifier=268_435_455)
    await watcher.subscribe("a/b")
    await watcher.subscribe("c", subscription_identifier=3)
    await sender.publish("a/b", b"x", retain=True)
    message = await watcher.next_message()
    assert sorted(message.subscription_identifiers) == [1, 268_435_455], "one copy has them all"
    assert await watcher.nothing_waits()
    late = await memory_broker.connect("late")
    for topic_filter, identifiers in (("a/#", (4,)), ("a/+", (5,)), ("a/b", ())):
        await late.subscribe(topic_filter, subscription_identifier=identifiers[0] if identifiers else None)
        assert (await late.next_message()).subscription_identifiers == identifiers, "a copy for each subscription"
        assert await late.nothing_waits()


# Rights


@pytest.mark.spec("MQTT3-3.3.5-2", "MQTT5-3.4.2-1", "MQTT5-3.5.2-1")
@both_versions
async def test_a_message_that_is_not_allowed(version: ProtocolVersion) -> None:
    async with open_memory_broker(authorizer=NoSecrets()) as memory:
        watcher = await memory.connect("watcher")
        await watcher.subscribe("#")
        sender = await join(memory, version)
        code = int(ReasonCode.NOT_AUTHORIZED) if version is V5 else None
        for qos, answer in ((0, []), (1, [ack(0x40, 7, code)]), (2, [ack(0x50, 7, code)])):
            await sender.send(publish(version, "secret/t", b"x", flags=qos << 1 | 1, packet_id=7))
            end = 4 if code is None else 5  # type, length, identifier, code; a Reason String may follow
            said = [data[:1] + data[2:end] for data in await sender.until_pong()]
            assert said == [data[:1] + data[2:end] for data in answer]
        assert await watcher.nothing_waits()
        assert memory.broker.metrics.retained_messages == 0


# Topic Aliases of the server


@pytest.mark.spec("MQTT5-3.1.2-26", "MQTT5-3.1.2-27", "MQTT5-3.3.2-11")
@pytest.mark.parametrize("maximum", [None, 0, 1, 5])
async def test_the_server_keeps_to_the_clients_topic_alias_maximum(memory_broker: MemoryBroker, maximum: int) -> None:
    """Our client's end of the connection refuses an alias that it did not allow."""
    watcher: TestClient = await memory_broker.connect("w", topic_alias_maximum=maximum)
    await watcher.subscribe("#")
    sender = await memory_broker.connect("s", topic_alias_maximum=10)
    names = [f"topic/{number % 7}" for number in range(70)]
    for name in names:
        await sender.publish(name, b"x")
    with trio.fail_after(5):
        messages = [await watcher.next_message() for _ in names]
    assert [message.topic_name for message in messages] == names
    assert all((message.topic_alias or 0) <= (maximum or 0) for message in messages)
