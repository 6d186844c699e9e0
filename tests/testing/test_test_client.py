"""The client of the kit: its waits end readably, its lists are complete, it connects again and over WebSocket."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.broker.events import SessionTakenOver
from mqtt_trio.errors import LocalProtocolError, MqttTrioError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import PubAck, Publish, PubRel
from mqtt_trio.testing import (
    PATIENCE,
    ConnectionEndedError,
    MemoryBroker,
    NothingCameError,
    TestClient,
    UpgradeRefusedError,
    WebSocketStream,
)
from mqtt_trio.testing.websocket import REQUEST


async def test_a_message_that_does_not_come_is_named(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    heating = await memory_broker.connect("heating")
    await heating.send(Publish("x", b"", QoS.AT_LEAST_ONCE, packet_id=7))
    start = trio.current_time()
    with pytest.raises(NothingCameError) as failure:
        await heating.next_message(timeout=5)
    assert trio.current_time() - start == 5
    assert str(failure.value) == (f"no message came to client 'heating' within 5 s; what came: {PubAck(7)!r}")
    assert isinstance(failure.value, AssertionError)
    with pytest.raises(NothingCameError, match=r"^no PubRel came .* within 2\.5 s"):
        await heating.expect(PubRel, timeout=2.5)
    assert isinstance(await heating.next_packet(timeout=0), PubAck)
    with pytest.raises(NothingCameError, match=r"^no packet came .* within 1 s; what came: nothing$"):
        await heating.next_packet(timeout=1)
    with pytest.raises(NothingCameError, match=r"^no end of the connection came"):
        await heating.closed(timeout=1)


async def test_on_a_fake_clock_no_wait_hangs(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    client = await memory_broker.connect()
    assert client.client_id == "auto-1"
    start = trio.current_time()
    with pytest.raises(NothingCameError):
        await client.next_message()
    assert trio.current_time() - start == PATIENCE
    client.pipe.to_client.freeze()
    client.patience = 60
    with pytest.raises(NothingCameError, match=r"acknowledgement of message 1 .* within 60 s"):
        await client.publish("x", qos=1)


async def test_lists_hold_everything_in_order(memory_broker: MemoryBroker) -> None:
    talker = await memory_broker.connect("talker")
    # One message in flight at a time: the list is complete only if acknowledging brings what waits behind.
    watcher = await memory_broker.connect("watcher", receive_maximum=1)
    await watcher.subscribe("#")
    for number in range(9):
        await talker.publish("x", b"%d" % number, qos=number % 2 + 1)
    first = await watcher.next_messages(2)
    rest = await watcher.waiting_messages()
    assert [message.payload for message in first + rest] == [b"%d" % number for number in range(9)]
    assert await watcher.waiting_messages() == []
    assert await watcher.nothing_waits()


@pytest.mark.parametrize("qos", [1, 2])
async def test_acknowledgement_may_come_later_or_never(memory_broker: MemoryBroker, qos: int) -> None:
    talker = await memory_broker.connect("talker")
    watcher = await memory_broker.connect("watcher", receive_maximum=1)
    await watcher.subscribe("#")
    for payload in (b"1", b"2", b"3"):
        await talker.publish("x", payload, qos=qos)
    first = await watcher.next_message(acknowledge=False)
    assert await watcher.nothing_waits()
    await watcher.acknowledge(first)
    second = await watcher.next_message(acknowledge=False)
    assert second.payload == b"2"
    await watcher.acknowledge(second, ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR)
    assert (await watcher.next_message()).payload == b"3"


@pytest.mark.parametrize("version", [ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0])
async def test_the_same_session_again(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    v5 = version == ProtocolVersion.MQTT_5_0
    fields: dict[str, Any] = {"session_expiry_interval": 60} if v5 else {}
    talker = await memory_broker.connect("talker")
    first = await memory_broker.connect("meter", version=version, clean_start=v5, keep_alive=30, **fields)
    await first.subscribe("#", qos=1)
    await first.cut()
    await talker.publish("x", b"queued", qos=1)
    second = await memory_broker.reconnect(first)
    assert second.connack is not None
    assert second.connack.session_present
    assert second.connect_packet is not None
    assert (second.connect_packet.keep_alive, second.connect_packet.protocol_version) == (30, version)
    assert (await second.next_message()).payload == b"queued"

    third = await memory_broker.reconnect(second, clean_start=True, keep_alive=5)  # takes over
    assert isinstance(memory_broker.events[-2], SessionTakenOver)
    assert third.connack is not None
    assert not third.connack.session_present
    assert third.connect_packet is not None
    assert third.connect_packet.keep_alive == 5
    await second.closed()


async def test_an_assigned_identifier_is_kept(memory_broker: MemoryBroker) -> None:
    first = await memory_broker.connect(session_expiry_interval=60)
    await first.cut()
    second = await memory_broker.reconnect(first)
    assert second.client_id == first.client_id == "auto-1"
    assert second.connack is not None
    assert second.connack.session_present


async def test_who_never_connected_cannot_reconnect(memory_broker: MemoryBroker) -> None:
    with pytest.raises(LocalProtocolError, match="never sent a CONNECT"):
        await memory_broker.reconnect(await memory_broker.open_client())


async def test_a_client_over_websocket(memory_broker: MemoryBroker) -> None:
    browser = await memory_broker.connect("browser", websocket=True, session_expiry_interval=60)
    device = await memory_broker.connect("device")
    await browser.subscribe("#")
    for qos in (0, 1, 2):
        await device.publish("x", bytes(70_000), qos=qos)
        assert (await browser.next_message()).payload == bytes(70_000)
    browser.pipe.to_client.cut_after(3)
    await device.publish("x", b"again", qos=1)
    await browser.closed()
    browser = await memory_broker.reconnect(browser)
    assert isinstance(browser.stream, WebSocketStream)
    assert (await browser.next_message()).payload == b"again"
    await browser.disconnect()


async def test_frames_of_ones_own(memory_broker: MemoryBroker) -> None:
    browser = await memory_broker.connect("browser", websocket=True)
    assert isinstance(browser.stream, WebSocketStream)
    await browser.stream.stream.send_all(b"\x81\x80\0\0\0\0")  # text
    await browser.closed()
    assert browser.stream.decoder.closed == 1003
    with pytest.raises(ConnectionEndedError):
        await browser.ping()


async def test_an_upgrade_that_is_refused(memory_broker: MemoryBroker) -> None:
    stream = WebSocketStream(await memory_broker.open_stream())  # a listener for plain MQTT
    with pytest.raises(UpgradeRefusedError):
        await stream.upgrade()
    assert REQUEST.startswith(b"GET /mqtt ")


async def test_a_stream_from_elsewhere_has_no_pipe() -> None:
    ours, _ = trio.testing.memory_stream_pair()
    client = TestClient(ours, ProtocolVersion.MQTT_5_0)
    with pytest.raises(MqttTrioError, match="no Pipe"):
        _ = client.pipe
