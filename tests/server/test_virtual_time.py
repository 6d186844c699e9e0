"""Keep alive, will delay, session expiry: to the exact second, on a fake clock."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import Disconnect, MessageProperties, PingReq, PingResp, Will
from mqtt_trio.testing import ConnectionEndedError, MemoryBroker, open_memory_broker

pytest_plugins: list[str] = []
V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
WEEK = 7 * 24 * 3600


@pytest.mark.spec("MQTT5-3.1.2-22", "MQTT3-3.1.2-24")
@pytest.mark.parametrize("version", [V311, V5])
async def test_silent_client_is_dropped(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, version: ProtocolVersion
) -> None:
    start = trio.current_time()
    client = await memory_broker.connect("c", version=version, keep_alive=10)
    last = await client.closed()
    assert trio.current_time() - start == 15.0
    assert last == (Disconnect(ReasonCode.KEEP_ALIVE_TIMEOUT) if version == V5 else None)
    assert memory_broker.broker.metrics.keep_alive_timeouts == 1


@pytest.mark.spec("MQTT5-3.1.2-22")
async def test_a_ping_starts_the_silence_again(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    client = await memory_broker.connect("c", keep_alive=10)
    for _ in range(100):
        await trio.sleep(14)
        await client.send(PingReq())
        assert await client.next_packet() == PingResp()
    start = trio.current_time()
    assert await client.closed() == Disconnect(ReasonCode.KEEP_ALIVE_TIMEOUT)
    assert trio.current_time() - start == 15.0


async def test_half_a_packet_does_not_keep_a_client_alive(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    client = await memory_broker.connect("c", keep_alive=4)
    start = trio.current_time()
    for byte in b"\x30\x10\x00\x01":
        await trio.sleep(1)
        await client.stream.send_all(bytes((byte,)))
    assert await client.closed() == Disconnect(ReasonCode.KEEP_ALIVE_TIMEOUT)
    assert trio.current_time() - start == 6.0


async def test_keep_alive_zero_never_ends(memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock) -> None:
    client = await memory_broker.connect("c", keep_alive=0)
    await trio.sleep(WEEK)
    await client.send(PingReq())
    assert await client.next_packet() == PingResp()


async def test_no_connect_in_time(memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock) -> None:
    stream = await memory_broker.open_stream()
    start = trio.current_time()
    assert await stream.receive_some(10) == b""
    assert trio.current_time() - start == 10.0
    assert memory_broker.broker.metrics.connections_timed_out == 1


async def test_keep_alive_shorter_than_the_connect_timeout(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    start = trio.current_time()
    client = await memory_broker.connect("c", keep_alive=2)
    await client.closed()
    assert trio.current_time() - start == 3.0


@pytest.mark.spec("MQTT5-3.1.2-21")
async def test_server_keep_alive(autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_broker(Limits(keep_alive=60)) as memory:
        start = trio.current_time()
        client = await memory.connect("c", keep_alive=600)
        assert client.connack is not None
        assert client.connack.server_keep_alive == 60
        assert await client.closed() == Disconnect(ReasonCode.KEEP_ALIVE_TIMEOUT)
        assert trio.current_time() - start == 90.0


@pytest.mark.spec("MQTT5-3.1.2-8", "MQTT5-3.1.2-14")
async def test_will_delay_of_an_hour(memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock) -> None:
    will = Will(topic_name="gone", payload=b"!", qos=QoS.AT_LEAST_ONCE, will_delay_interval=3600)
    device = await memory_broker.connect("device", will=will, session_expiry_interval=WEEK)
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    await device.cut()
    start = trio.current_time()
    message = await watcher.next_message()
    assert trio.current_time() - start == 3600.0
    assert (message.topic_name, message.payload, message.retain) == ("gone", b"!", False)


@pytest.mark.spec("MQTT5-3.1.3-9")
async def test_a_return_within_the_delay_stops_the_will(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    will = Will(topic_name="gone", will_delay_interval=3600)
    device = await memory_broker.connect("device", will=will, session_expiry_interval=WEEK)
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    await device.cut()
    await trio.sleep(3599)
    await memory_broker.connect("device", clean_start=False, session_expiry_interval=WEEK)
    await trio.sleep(WEEK - 1)
    assert await watcher.nothing_waits()
    assert memory_broker.broker.metrics.wills_published == 0


@pytest.mark.spec("MQTT5-3.1.2-8")
async def test_the_end_of_the_session_does_not_wait_for_the_delay(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    will = Will(topic_name="gone", will_delay_interval=3600)
    device = await memory_broker.connect("device", will=will, session_expiry_interval=100)
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    await device.cut()
    start = trio.current_time()
    await watcher.next_message()
    assert trio.current_time() - start == 100.0


@pytest.mark.spec("MQTT5-3.14.4-3", "MQTT3-3.14.4-3")
@pytest.mark.parametrize("version", [V311, V5])
async def test_no_will_after_disconnect(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, version: ProtocolVersion
) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    device = await memory_broker.connect("device", version=version, will=Will(topic_name="gone"))
    await device.disconnect()
    await trio.sleep(100)
    assert await watcher.nothing_waits()


async def test_disconnect_with_will_message(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    device = await memory_broker.connect("device", will=Will(topic_name="gone", payload=b"on purpose"))
    await device.disconnect(reason_code=ReasonCode.DISCONNECT_WITH_WILL_MESSAGE)
    assert (await watcher.next_message()).payload == b"on purpose"


@pytest.mark.spec("MQTT5-3.1.2-23", "MQTT5-4.1.0-2")
async def test_session_expiry_of_a_week(memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock) -> None:
    for stay, present in ((WEEK - 1, True), (WEEK, False)):
        device = await memory_broker.connect("device", session_expiry_interval=WEEK)
        await device.subscribe("t", qos=1)
        await device.disconnect()
        sender = await memory_broker.connect("sender")
        await sender.publish("t", b"kept", qos=1)
        await trio.sleep(stay)
        await trio.testing.wait_all_tasks_blocked()
        device = await memory_broker.connect("device", clean_start=False, session_expiry_interval=WEEK)
        assert device.connack is not None
        assert device.connack.session_present is present
        if present:
            assert (await device.next_message()).payload == b"kept"
        else:
            assert await device.nothing_waits()
    assert memory_broker.broker.metrics.sessions_expired == 1


async def test_a_311_session_is_kept_for_the_limit(autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_broker(Limits(session_expiry_interval=3600)) as memory:
        for stay, present in ((3599, True), (3600, False)):
            device = await memory.connect("device", version=V311, clean_start=False)
            await device.disconnect()
            await trio.sleep(stay)
            await trio.testing.wait_all_tasks_blocked()
            device = await memory.connect("device", version=V311, clean_start=False)
            assert device.connack is not None
            assert device.connack.session_present is present
            await device.disconnect()


@pytest.mark.spec("MQTT5-3.3.2-5", "MQTT5-3.3.2-6")
async def test_message_expiry_counts_down_in_the_queue(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    device = await memory_broker.connect("device", session_expiry_interval=WEEK)
    await device.subscribe("t", qos=1)
    await device.disconnect()
    sender = await memory_broker.connect("sender")
    await sender.publish("t", b"short", qos=1, message_expiry_interval=10)
    await sender.publish("t", b"long", qos=1, message_expiry_interval=100)
    await trio.sleep(30)
    device = await memory_broker.connect("device", clean_start=False, session_expiry_interval=WEEK)
    message = await device.next_message()
    assert message.payload == b"long"
    assert message.properties == MessageProperties(message_expiry_interval=70)
    assert await device.nothing_waits()
    assert memory_broker.broker.metrics.dropped_expired == 1


@pytest.mark.spec("MQTT5-3.1.4-3", "MQTT3-3.1.4-2")
async def test_take_over(memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock) -> None:
    first = await memory_broker.connect("device", will=Will(topic_name="gone"), session_expiry_interval=60)
    await first.subscribe("t", qos=1)
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    second = await memory_broker.connect("device", clean_start=False, session_expiry_interval=60)
    assert await first.closed() == Disconnect(ReasonCode.SESSION_TAKEN_OVER)
    assert second.connack is not None
    assert second.connack.session_present
    await watcher.next_message()
    await watcher.publish("t", b"to the second", qos=1)
    assert (await second.next_message()).payload == b"to the second"


async def test_packets_before_connect_end_it(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    stream = await memory_broker.open_stream()
    await stream.send_all(b"\xc0\x00")
    assert await stream.receive_some(10) == b""
    assert memory_broker.broker.metrics.protocol_errors == 1


@pytest.mark.spec("MQTT3-3.1.2-2")
async def test_unknown_protocol_level(memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock) -> None:
    stream = await memory_broker.open_stream()
    await stream.send_all(b"\x10\x0d\x00\x04MQTT\x02\x02\x00\x3c\x00\x01a")
    assert await stream.receive_some(10) == b"\x20\x02\x00\x01"
    assert await stream.receive_some(10) == b""


async def test_shutdown_says_goodbye(memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock) -> None:
    client = await memory_broker.connect("c")
    await memory_broker.clients.shut_down()
    assert await client.closed() == Disconnect(ReasonCode.SERVER_SHUTTING_DOWN)
    with pytest.raises(ConnectionEndedError):
        await client.next_packet()
