"""Sessions and Wills: Clean Start, Session Present, what outlives a connection (3.1.2, 3.2.2, 4.1)."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.packets import MessageProperties, Will
from mqtt_trio.testing import MemoryBroker
from tests.wire import (
    DISCONNECT,
    V5,
    Wire,
    ack,
    block,
    both_versions,
    connect,
    join,
    open_wire,
    publish,
    subscribe,
    text,
)

HOUR = b"\x11\x00\x00\x0e\x10"
"""Session Expiry Interval of an hour."""


async def come(
    memory: MemoryBroker, version: ProtocolVersion, *, clean: bool, client_id: str = "c"
) -> tuple[Wire, int]:
    """Connect; return the connection and Connect Acknowledge Flags. The return code is 0."""
    properties = HOUR if version is V5 else b""
    wire = await open_wire(memory, connect(version, text(client_id), flags=2 * clean, properties=properties))
    connack = await wire.read()
    assert connack[0] == 0x20
    assert connack[3] == 0
    return wire, connack[2]


async def owes(wire: Wire, version: ProtocolVersion, memory: MemoryBroker) -> bool:
    """Whether the session has a subscription to `t`: a message for it comes."""
    other = await memory.connect("other")
    await other.publish("t", b"probe")
    await other.disconnect()
    return await wire.until_pong() == [publish(version, "t", b"probe")]


@pytest.mark.spec("MQTT3-3.1.2-4", "MQTT3-3.1.2-6", "MQTT3-3.1.3-2", "MQTT3-3.1.4-3", "MQTT3-3.1.4-4", "MQTT3-4.1.0-1")
@pytest.mark.spec("MQTT3-3.2.2-1", "MQTT3-3.2.2-2", "MQTT3-3.2.2-3", "MQTT5-3.2.2-2", "MQTT5-3.2.2-3", "MQTT5-3.2.2-1")
@pytest.mark.spec("MQTT5-3.1.2-4", "MQTT5-3.1.2-5", "MQTT5-3.1.2-6", "MQTT5-3.1.2-23", "MQTT5-3.1.3-2", "MQTT5-3.1.4-4")
@both_versions
async def test_clean_start_and_session_present(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire, flags = await come(memory_broker, version, clean=False)
    assert flags == 0, "there was no session, one is created"
    await wire.send(subscribe(version, 1, ("t", 1)))
    assert (await wire.read())[0] == 0x90
    await wire.cut()
    wire, flags = await come(memory_broker, version, clean=False, client_id="d")
    assert flags == 0, "another Client Identifier, another session"
    assert not await owes(wire, version, memory_broker)
    await wire.cut()
    wire, flags = await come(memory_broker, version, clean=False)
    assert flags == 1
    assert await owes(wire, version, memory_broker)
    await wire.cut()
    wire, flags = await come(memory_broker, version, clean=True)
    assert flags == 0, "a clean start says so although there was a session"
    assert not await owes(wire, version, memory_broker), "and has nothing of the old one"
    await wire.send(subscribe(version, 1, ("t", 1)))
    assert (await wire.read())[0] == 0x90
    await wire.cut()
    wire, flags = await come(memory_broker, version, clean=False)
    # A clean session of 3.1.1 ends with its connection, one of 5.0 when its Session Expiry Interval passed.
    assert flags == (version is V5)
    assert await owes(wire, version, memory_broker) is (version is V5)


@pytest.mark.spec("MQTT3-3.1.2-5", "MQTT3-4.5.0-1", "MQTT5-4.5.0-1", "MQTT3-4.1.0-1")
@both_versions
async def test_messages_of_the_absent_are_kept(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire, _ = await come(memory_broker, version, clean=False)
    await wire.send(subscribe(version, 1, ("t/+", 2)))
    await wire.read()
    await wire.cut()
    sender = await memory_broker.connect("sender", version=version)
    for qos in (1, 2, 1):
        await sender.publish(f"t/{qos}", b"%d" % qos, qos=qos)
        await sender.publish("elsewhere", b"not for it", qos=qos)
    wire, _ = await come(memory_broker, version, clean=False)
    assert await wire.until_pong() == [
        publish(version, "t/1", b"1", flags=2, packet_id=1),
        publish(version, "t/2", b"2", flags=4, packet_id=2),
        publish(version, "t/1", b"1", flags=2, packet_id=3),
    ]


@pytest.mark.spec("MQTT3-4.1.0-1", "MQTT3-3.1.2-4", "MQTT5-3.1.2-5")
@both_versions
async def test_both_halves_of_qos_2_are_session_state(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire, _ = await come(memory_broker, version, clean=False)
    await wire.send(subscribe(version, 1, ("t", 2)), publish(version, "t", b"x", flags=4, packet_id=9))
    kinds = [data[0] for data in await wire.until_pong()]
    assert kinds == [0x90, 0x34, 0x50]
    await wire.send(ack(0x50, 1))
    assert await wire.read() == ack(0x62, 1)
    await wire.cut()
    wire, _ = await come(memory_broker, version, clean=False)
    assert await wire.read() == ack(0x62, 1), "outbound: the PUBREL is owed, not the PUBLISH"
    await wire.send(publish(version, "t", b"x", flags=12, packet_id=9))
    assert await wire.until_pong() == [ack(0x50, 9)], "inbound: known, so acknowledged and not delivered again"


@pytest.mark.spec("MQTT3-4.1.0-2", "MQTT5-4.1.0-1")
@both_versions
@pytest.mark.parametrize("clean", [True, False])
async def test_a_session_lasts_while_it_is_connected(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, version: ProtocolVersion, clean: bool
) -> None:
    """However short its Session Expiry Interval is: nothing, or a second."""
    properties = b"" if version is not V5 or clean else b"\x11\0\0\0\x01"
    wire = await join(memory_broker, version, "c", flags=2 * clean, properties=properties)
    await wire.send(subscribe(version, 1, ("t", 1)))
    await wire.read()
    await trio.sleep(80_000)
    assert await owes(wire, version, memory_broker)


@pytest.mark.spec("MQTT3-3.1.2-6", "MQTT5-4.1.0-2")
@both_versions
async def test_a_clean_session_ends_with_its_connection(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire = await join(memory_broker, version)
    await wire.send(subscribe(version, 1, ("t", 1)))
    await wire.read()
    await wire.cut()
    assert memory_broker.broker.metrics.sessions == 0
    wire, flags = await come(memory_broker, version, clean=False)
    assert flags == 0
    assert not await owes(wire, version, memory_broker)


@pytest.mark.spec("MQTT3-3.1.2-7")
@both_versions
async def test_retained_messages_outlive_the_session(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    wire = await join(memory_broker, version)
    await wire.send(publish(version, "t", b"kept", flags=1))
    await wire.until_pong()
    await wire.cut()
    assert memory_broker.broker.metrics.sessions == 0
    wire = await join(memory_broker, version)
    await wire.send(subscribe(version, 1, ("t", 0)))
    assert (await wire.until_pong())[1:] == [publish(version, "t", b"kept", flags=1)]


@pytest.mark.spec("MQTT3-3.1.4-2", "MQTT5-3.1.4-3", "MQTT5-4.13.2-1", "MQTT5-3.14.4-1", "MQTT5-3.14.4-2")
@both_versions
async def test_a_second_connection_ends_the_first(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    first, _ = await come(memory_broker, version, clean=False)
    await first.send(subscribe(version, 1, ("t", 0)))
    await first.read()
    second, flags = await come(memory_broker, version, clean=False)
    assert flags == 1
    assert await owes(second, version, memory_broker)
    assert await first.until_closed() == ([b"\xe0\x01\x8e"] if version is V5 else [])


# Wills


def will_flags(qos: int, retain: bool) -> int:
    """Connect Flags: User Name and Password absent, Clean Start."""
    return 0x06 | qos << 3 | retain << 5


@pytest.mark.spec("MQTT3-3.1.2-8", "MQTT3-3.1.2-9", "MQTT3-3.1.2-14", "MQTT3-3.1.2-16", "MQTT3-3.1.2-17")
@pytest.mark.spec(
    "MQTT5-3.1.2-7", "MQTT5-3.1.2-8", "MQTT5-3.1.2-9", "MQTT5-3.1.2-12", "MQTT5-3.1.2-14", "MQTT5-3.1.2-15"
)
@pytest.mark.spec("MQTT5-3.2.2-12", "MQTT5-3.2.2-13")
@both_versions
@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("retain", [False, True])
async def test_a_will(memory_broker: MemoryBroker, version: ProtocolVersion, qos: int, retain: bool) -> None:
    watcher = await join(memory_broker, V5, "watcher")
    await watcher.send(subscribe(V5, 1, ("gone", 2 | 8)))  # Retain As Published
    await watcher.read()
    rest = (block(version), text("gone"), text(b"\0\xff"))
    device = await join(memory_broker, version, "c", *rest, flags=will_flags(qos, retain))
    assert await watcher.until_pong() == [], "it is kept, not published yet"
    await device.cut()
    assert await watcher.read() == publish(V5, "gone", b"\0\xff", flags=qos << 1 | retain, packet_id=1)
    late = await join(memory_broker, V5, "late")
    await late.send(subscribe(V5, 1, ("gone", 2)))
    found = (await late.until_pong())[1:]
    assert found == ([publish(V5, "gone", b"\0\xff", flags=qos << 1 | 1, packet_id=1)] if retain else [])


@pytest.mark.spec("MQTT3-3.1.2-8", "MQTT3-3.14.1-1", "MQTT5-3.1.2-8", "MQTT5-3.14.1-1")
@both_versions
@pytest.mark.parametrize(
    "last_bytes", [b"\x31", b"\xe1\0", b"\xe2\0", b"\xe4\0", b"\xe8\0", b"\x36\x05\0\1a\0\1"], ids=bytes.hex
)
async def test_a_protocol_error_publishes_the_will(
    memory_broker: MemoryBroker, version: ProtocolVersion, last_bytes: bytes
) -> None:
    """A DISCONNECT with a reserved bit among them: it disconnects and is no goodbye."""
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    device = await join(memory_broker, version, "c", block(version), text("gone"), text("!"), flags=0x06)
    await device.send(last_bytes)
    if last_bytes == b"\x31":
        await device.cut()
    else:
        # Type and reason code; a Reason String may follow.
        said = [data[:1] + data[2:3] for data in await device.until_closed()]
        assert said == ([b"\xe0\x81"] if version is V5 else [])
    assert (await watcher.next_message()).payload == b"!"


@pytest.mark.spec("MQTT3-3.1.2-8", "MQTT5-3.1.2-8")
@both_versions
async def test_silence_publishes_the_will(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, version: ProtocolVersion
) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    await join(memory_broker, version, "c", block(version), text("gone"), text("!"), flags=0x06, keep_alive=10)
    start = trio.current_time()
    assert (await watcher.next_message()).payload == b"!"
    assert trio.current_time() - start == 15.0


@pytest.mark.spec("MQTT3-3.1.2-12")
@both_versions
async def test_without_a_will_nothing_is_published(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("#")
    for data in (b"\xe1\0", DISCONNECT):
        device = await join(memory_broker, version)
        await device.send(data)
        await device.until_closed()
    device = await join(memory_broker, version)
    await device.cut()
    assert await watcher.nothing_waits()


@pytest.mark.spec("MQTT3-3.1.2-10", "MQTT5-3.1.2-10", "MQTT3-3.14.4-3", "MQTT5-3.14.4-3")
@both_versions
async def test_a_will_is_used_once(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    """In one session: published once, or removed by a goodbye; a later connection without Will has none."""
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    properties = HOUR if version is V5 else b""
    rest = (block(version), text("gone"), text("!"))
    for goodbye in (False, True):
        device = await join(memory_broker, version, "c", *rest, flags=0x04, properties=properties)
        if goodbye:
            await device.send(DISCONNECT)
            assert await device.until_closed() == []
        else:
            await device.cut()
            assert (await watcher.next_message()).payload == b"!"
        assert await watcher.nothing_waits()
        device, flags = await come(memory_broker, version, clean=False)
        assert flags == 1, "the same session"
        await device.cut()
        assert await watcher.nothing_waits()
    assert memory_broker.broker.metrics.wills_published == 1


@pytest.mark.spec("MQTT5-3.1.3-10", "MQTT5-3.1.2-7")
@pytest.mark.parametrize("delay", [0, 3600])
async def test_the_properties_of_a_will(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, delay: int
) -> None:
    properties = MessageProperties(
        payload_format_indicator=1,
        content_type="text/plain",
        response_topic="answer",
        correlation_data=b"\0\xff",
        user_properties=(("b", "1"), ("a", "2"), ("b", "1"), ("a", "1"), ("", "")),
    )
    will = Will(topic_name="gone", qos=QoS.AT_LEAST_ONCE, will_delay_interval=delay, properties=properties)
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    device = await memory_broker.connect("c", will=will, session_expiry_interval=2 * delay)
    await device.cut()
    message = await watcher.next_message()
    assert message.properties == properties
    assert trio.current_time() == delay
