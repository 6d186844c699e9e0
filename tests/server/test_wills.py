"""When a Will is published and when not: delay against session expiry, return, take-over and goodbyes."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import Disconnect, MessageProperties, Will
from mqtt_trio.testing import MemoryBroker, TestClient

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
WITH_WILL = ReasonCode.DISCONNECT_WITH_WILL_MESSAGE


async def watching(memory: MemoryBroker) -> TestClient:
    watcher = await memory.connect("watcher")
    await watcher.subscribe("gone")
    return watcher


async def device(memory: MemoryBroker, delay: int = 0, expiry: int | None = None, **fields: Any) -> TestClient:
    will = Will(topic_name="gone", payload=b"!", will_delay_interval=delay)
    return await memory.connect("device", will=will, session_expiry_interval=expiry, **fields)


async def published_after(watcher: TestClient, within: float) -> float | None:
    """Seconds until the Will comes, None where it does not within so many."""
    start = trio.current_time()
    with trio.move_on_after(within):
        await watcher.next_message()
        return trio.current_time() - start
    return None


@pytest.mark.spec("MQTT5-3.1.2-8", "MQTT3-3.1.2-8")
@pytest.mark.parametrize(
    "delay, expiry, after",
    [
        (0, None, 0),
        (0, 60, 0),
        (10, 60, 10),
        (60, 60, 60),
        (60, 10, 10),  # the session ends first
        (60, None, 0),
        (0xFFFFFFFF, 10, 10),
        (10, 0xFFFFFFFF, 10),
    ],
)
async def test_the_earlier_of_delay_and_session_end(
    memory_broker: MemoryBroker,
    autojump_clock: trio.testing.MockClock,
    delay: int,
    expiry: int | None,
    after: float,
) -> None:
    watcher = await watching(memory_broker)
    await (await device(memory_broker, delay, expiry)).cut()
    assert await published_after(watcher, 1000) == after
    assert await published_after(watcher, 1000) is None
    assert memory_broker.broker.metrics.wills_published == 1


@pytest.mark.spec("MQTT5-3.1.3-9", "MQTT5-3.1.2-8")
@pytest.mark.parametrize(
    "back_at, clean_start, after",
    [
        (9, False, None),  # the session goes on
        (9, True, 9),  # the session ends
        (11, False, 10),  # too late
    ],
)
async def test_a_return(
    memory_broker: MemoryBroker,
    autojump_clock: trio.testing.MockClock,
    back_at: float,
    clean_start: bool,
    after: float | None,
) -> None:
    watcher = await watching(memory_broker)
    await (await device(memory_broker, 10, 60)).cut()
    async with trio.open_nursery() as nursery:

        async def come_back() -> None:
            await trio.sleep(back_at)
            await memory_broker.connect("device", clean_start=clean_start, session_expiry_interval=60)

        nursery.start_soon(come_back)
        assert await published_after(watcher, 1000) == after


@pytest.mark.spec("MQTT5-3.1.4-3", "MQTT5-3.1.3-9", "MQTT5-3.1.2-8")
@pytest.mark.parametrize("delay, clean_start, published", [(0, False, 1), (0, True, 1), (10, False, 0), (10, True, 1)])
async def test_a_take_over(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, delay: int, clean_start: bool, published: int
) -> None:
    watcher = await watching(memory_broker)
    first = await device(memory_broker, delay, 60)
    await memory_broker.connect("device", clean_start=clean_start, session_expiry_interval=60)
    assert await first.closed() == Disconnect(ReasonCode.SESSION_TAKEN_OVER)
    assert await published_after(watcher, 1000) == (0 if published else None)
    assert memory_broker.broker.metrics.wills_published == published


@pytest.mark.spec("MQTT5-3.14.4-3", "MQTT5-3.1.2-10", "MQTT3-3.1.2-10", "MQTT3-3.14.4-3")
@pytest.mark.parametrize(
    "goodbye, after",
    [
        (Disconnect(), None),
        (Disconnect(session_expiry_interval=0), None),
        (Disconnect(WITH_WILL), 10),
        (Disconnect(WITH_WILL, session_expiry_interval=5), 5),
        (Disconnect(WITH_WILL, session_expiry_interval=0), 0),
        (Disconnect(ReasonCode.ADMINISTRATIVE_ACTION), 10),
    ],
)
async def test_a_goodbye(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, goodbye: Disconnect, after: float | None
) -> None:
    watcher = await watching(memory_broker)
    client = await device(memory_broker, 10, 60)
    await client.send(goodbye)
    assert await client.closed() is None
    assert await published_after(watcher, 1000) == after


async def test_a_goodbye_that_is_an_error_publishes_the_will(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    """Session Expiry Interval must not be raised from 0 [MQTT5-3.14.2.2.2]."""
    watcher = await watching(memory_broker)
    client = await device(memory_broker)
    await client.send(Disconnect(session_expiry_interval=5))
    assert await published_after(watcher, 10) == 0


@pytest.mark.spec("MQTT5-3.1.2-10")
async def test_the_will_is_the_last_connections(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    watcher = await watching(memory_broker)
    await (await device(memory_broker, 0, 60)).cut()
    assert await published_after(watcher, 1) == 0
    without = await memory_broker.connect("device", clean_start=False, session_expiry_interval=60)
    await without.cut()
    assert await published_after(watcher, 1000) is None


@pytest.mark.spec("MQTT5-3.1.2-14", "MQTT5-3.1.2-15", "MQTT3-3.1.2-16", "MQTT3-3.1.2-17")
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("version", [V31, V311, V5])
async def test_a_will_is_retained_where_it_says_so(
    memory_broker: MemoryBroker, version: ProtocolVersion, retain: bool
) -> None:
    will = Will(topic_name="gone", payload=b"!", qos=QoS(1), retain=retain)
    await (await memory_broker.connect("device", version=version, will=will)).cut()
    late = await memory_broker.connect("late")
    await late.subscribe("gone")
    if retain:
        message = await late.next_message()
        assert (message.payload, message.retain, message.qos) == (b"!", True, 1)
    assert await late.nothing_waits()


@pytest.mark.spec("MQTT5-3.1.3-10")
async def test_the_properties_of_a_will(memory_broker: MemoryBroker) -> None:
    properties = MessageProperties(
        content_type="text",
        response_topic="r",
        correlation_data=b"1",
        user_properties=(("b", "1"), ("a", "2"), ("b", "0")),
    )
    watcher = await watching(memory_broker)
    await (await memory_broker.connect("device", will=Will(topic_name="gone", properties=properties))).cut()
    assert (await watcher.next_message()).properties == properties
