"""Faults of one client's connection, with the real broker: what happens to it, and that nobody else notices."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.broker.events import ClientDisconnected, SessionExpired
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import Connect, Disconnect, Publish, Will
from mqtt_trio.testing import ConnectionEndedError, MemoryBroker, PipeOptions, TestClient, open_memory_broker

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
HOUR = 3600
WEEK = 7 * 24 * HOUR
SMALL = Limits(maximum_packet_size=8192, outbox_bytes=65_536, inflight_messages=10)
CONNECT = Connect(client_id="torn", will=Will(topic_name="gone", payload=b"!"))
PUBLISH = Publish("rooms/hall", b"21.5", QoS.AT_LEAST_ONCE, packet_id=1)


@pytest.fixture
async def small_broker() -> AsyncIterator[MemoryBroker]:
    """A broker whose outboxes and windows are small."""
    async with open_memory_broker(SMALL) as memory:
        yield memory


async def undisturbed(watcher: TestClient, talker: TestClient) -> None:
    """Two others still exchange messages, and nothing else reached the watcher."""
    assert await talker.publish("rooms/kitchen", b"19", qos=1) == ReasonCode.SUCCESS
    assert [message.payload for message in await watcher.waiting_messages()] == [b"19"]
    assert await watcher.nothing_waits()


@pytest.mark.parametrize("websocket", [False, True])
async def test_a_connect_torn_at_any_byte(memory_broker: MemoryBroker, websocket: bool) -> None:
    watcher, talker = await memory_broker.connect("watcher"), await memory_broker.connect("talker")
    await watcher.subscribe("#")
    metrics = memory_broker.broker.metrics
    for size in range(len(encode(CONNECT, V5)) + 6 * websocket):  # the head of its frame is six bytes long
        torn = await memory_broker.open_client(websocket=websocket)
        torn.pipe.to_broker.cut_after(size)
        if size:
            await torn.send(CONNECT)
        with pytest.raises(ConnectionEndedError):
            await torn.next_packet()
        await undisturbed(watcher, talker)
        assert metrics.connections_closed == size + 1
    assert metrics.clients_connected == 2
    assert metrics.connections_accepted == 2
    assert metrics.wills_published == 0
    assert metrics.client_failures == 0


@pytest.mark.parametrize("version", [V311, V5])
async def test_a_publish_torn_at_any_byte(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    watcher, talker = await memory_broker.connect("watcher"), await memory_broker.connect("talker")
    await watcher.subscribe("#")
    metrics = memory_broker.broker.metrics
    size = len(encode(PUBLISH, version))
    for torn_at in range(size):
        torn = await memory_broker.connect("torn", version=version)
        torn.pipe.to_broker.cut_after(torn_at)
        if torn_at:
            await torn.send(PUBLISH)
        assert await torn.closed() is None
        await undisturbed(watcher, talker)
        end = memory_broker.events[-1]
        assert isinstance(end, ClientDisconnected)
        assert (end.client_id, end.reason_code) == ("torn", None)
    torn = await memory_broker.connect("torn", version=version)
    torn.pipe.to_broker.cut_after(size)  # whole: it counts
    await torn.send(PUBLISH)
    await torn.closed()
    assert [message.payload for message in await watcher.waiting_messages()] == [b"21.5"]
    assert metrics.clients_connected == 2
    assert metrics.client_failures == metrics.protocol_errors == 0


async def test_a_torn_delivery_comes_again_whole(memory_broker: MemoryBroker) -> None:
    talker = await memory_broker.connect("talker")
    meter = await memory_broker.connect("meter", session_expiry_interval=60)
    await meter.subscribe("rooms/#", qos=1)
    meter.pipe.to_client.cut_after(5)
    await talker.publish("rooms/hall", b"21.5", qos=1)
    with pytest.raises(ConnectionEndedError):
        await meter.next_message()
    meter = await memory_broker.reconnect(meter)
    assert meter.connack is not None
    assert meter.connack.session_present
    again = await meter.next_message()
    assert (again.payload, again.dup) == (b"21.5", True)
    assert await meter.nothing_waits()


async def test_an_acknowledgement_that_is_lost(memory_broker: MemoryBroker) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("#")
    meter = await memory_broker.connect("meter", session_expiry_interval=60)
    meter.pipe.to_client.freeze()
    message = Publish("rooms/hall", b"21.5", QoS.EXACTLY_ONCE, packet_id=9)
    await meter.send(message)
    assert (await watcher.next_message()).payload == b"21.5"
    assert meter.pipe.to_client.waiting_size == 4  # PUBREC
    meter.pipe.cut()
    meter = await memory_broker.reconnect(meter)
    message.dup = True
    await meter.send(message)
    assert (await meter.next_packet()).packet_id == 9  # type: ignore[union-attr]
    assert await watcher.nothing_waits()  # not delivered twice


async def test_packets_in_pieces_of_any_size(memory_broker: MemoryBroker) -> None:
    for seed in range(20):
        watcher = await memory_broker.connect("watcher")
        watcher.pipe.to_broker.chop(3, seed=seed)
        watcher.pipe.to_client.chop(5, seed=seed)
        await watcher.subscribe("#")
        for qos in (0, 1, 2):
            await watcher.publish("rooms/hall", b"%d" % qos, qos=qos)
        assert [message.payload for message in await watcher.waiting_messages()] == [b"0", b"1", b"2"]
        await watcher.disconnect()


async def test_delays_add_up_in_virtual_time(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    start = trio.current_time()
    far = await memory_broker.connect("far", pipe=PipeOptions(delay=9))  # CONNECT may take ten seconds
    assert trio.current_time() - start == 18  # CONNECT there, CONNACK back
    far.pipe.to_client.delay = 1
    assert await far.ping() == 10
    start = trio.current_time()
    await far.publish("rooms/hall", qos=2)
    assert trio.current_time() - start == 20


async def test_a_connect_that_is_too_slow(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    with pytest.raises(ConnectionEndedError):
        await memory_broker.connect("far", pipe=PipeOptions(delay=11))
    assert memory_broker.broker.metrics.connections_timed_out == 1


async def test_a_frozen_subscriber_loses_qos_0_and_is_owed_qos_1(
    small_broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    metrics = small_broker.broker.metrics
    talker, other = await small_broker.connect("talker"), await small_broker.connect("other")
    frozen = await small_broker.connect("frozen", pipe=PipeOptions(capacity=1024))
    await frozen.subscribe("fast/#", "safe/#", qos=1)
    await other.subscribe("fast/#", "safe/#", qos=1)
    frozen.pipe.to_client.freeze()
    for number in range(100):
        await talker.publish("fast/x", b"%04d" % number + bytes(1000))
        await talker.publish("safe/x", b"%04d" % number, qos=1)
        assert [message.payload[:4] for message in await other.next_messages(2)] == [b"%04d" % number] * 2
    assert frozen.pipe.to_client.waiting_size == 1024
    assert 20 < metrics.dropped_outbox_full < 100
    assert metrics.messages_queued == 90  # beyond the ten in flight
    assert metrics.clients_connected == 3

    frozen.pipe.thaw()
    got = await frozen.waiting_messages()
    safe = [message.payload for message in got if message.topic_name == "safe/x"]
    fast = [message.payload[:4] for message in got if message.topic_name == "fast/x"]
    assert safe == [b"%04d" % number for number in range(100)]
    assert fast == [b"%04d" % number for number in range(100 - metrics.dropped_outbox_full)]
    assert metrics.messages_queued == 0
    assert await frozen.nothing_waits()


async def test_a_client_that_only_does_not_read_is_frozen_too(
    small_broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    talker = await small_broker.connect("talker")
    reader = await small_broker.connect("reader", pipe=PipeOptions(capacity=100))
    await reader.subscribe("#", qos=0)
    for _ in range(100):
        await talker.publish("x", bytes(1000))
    assert await talker.ping() == 0
    assert reader.pipe.to_client.waiting_size == 100
    assert small_broker.broker.metrics.dropped_outbox_full > 20
    assert 60 < len(await reader.waiting_messages()) < 80


async def test_an_unplugged_cable_is_noticed_by_keep_alive(
    small_broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    watcher = await small_broker.connect("watcher")
    await watcher.subscribe("gone")
    start = trio.current_time()
    meter = await small_broker.connect("meter", keep_alive=60, will=Will(topic_name="gone", payload=b"!"))
    meter.pipe.freeze()
    await watcher.next_message()
    assert trio.current_time() - start == 90
    meter.pipe.thaw()  # the cable is back, and the connection is not
    assert await meter.closed() == Disconnect(ReasonCode.KEEP_ALIVE_TIMEOUT)


@pytest.mark.parametrize("cut", ["pipe", "close", "torn"])
async def test_a_will_waits_for_an_hour_behind_any_cut(
    small_broker: MemoryBroker, autojump_clock: MockClock, cut: str
) -> None:
    watcher = await small_broker.connect("watcher")
    await watcher.subscribe("gone")
    will = Will(topic_name="gone", payload=b"!", will_delay_interval=HOUR)
    meter = await small_broker.connect("meter", will=will, session_expiry_interval=WEEK)
    start = trio.current_time()
    if cut == "pipe":
        meter.pipe.cut()
    elif cut == "close":
        await meter.cut()
    else:
        meter.pipe.to_broker.cut_after(1)
        await meter.send(PUBLISH)
    assert (await watcher.next_message()).payload == b"!"
    assert trio.current_time() - start == HOUR


async def test_a_session_lasts_for_its_week_and_no_longer(
    small_broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    talker = await small_broker.connect("talker")
    meter = await small_broker.connect("meter", session_expiry_interval=WEEK)
    await meter.subscribe("rooms/#", qos=1)
    meter.pipe.cut()
    await talker.publish("rooms/hall", b"21.5", qos=1)
    await trio.sleep(WEEK - 1)
    meter = await small_broker.reconnect(meter)
    assert meter.connack is not None
    assert meter.connack.session_present
    assert [message.payload for message in await meter.waiting_messages()] == [b"21.5"]

    meter.pipe.cut()
    await talker.publish("rooms/hall", b"22", qos=1)
    await trio.sleep(WEEK + 1)
    assert small_broker.events[-1] == SessionExpired(
        at=small_broker.utc_now() - 1, client_id="meter", queued_messages=1
    )
    meter = await small_broker.reconnect(meter)
    assert meter.connack is not None
    assert not meter.connack.session_present
    assert await meter.nothing_waits()
