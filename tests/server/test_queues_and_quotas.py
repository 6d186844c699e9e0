"""Bounds of sessions over time: queues whose messages expire, quotas over several connections."""

from __future__ import annotations

import pytest
import trio.testing

from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import QoS, ReasonCode
from mqtt_trio.protocol.packets import Disconnect, Publish, PubRec
from mqtt_trio.testing import open_memory_broker


@pytest.mark.spec("MQTT5-3.3.2-5")
@pytest.mark.parametrize("overflow", ["drop-new", "drop-oldest"])
async def test_expired_messages_make_room_in_a_queue(autojump_clock: trio.testing.MockClock, overflow: str) -> None:
    async with open_memory_broker(Limits(queue_messages=3, queue_overflow=overflow)) as memory:
        client = await memory.connect("c", session_expiry_interval=1000)
        await client.subscribe("t", qos=1)
        await client.cut()
        sender = await memory.connect("sender")
        for number in range(3):
            await sender.publish("t", b"old%d" % number, qos=1, message_expiry_interval=1 + 500 * (number == 2))
        await trio.sleep(100)
        for number in range(3):
            await sender.publish("t", b"%d" % number, qos=1)
        metrics = memory.broker.metrics
        assert (metrics.dropped_expired, metrics.dropped_queue_full, metrics.messages_queued) == (2, 1, 3)
        client = await memory.reconnect(client)
        expected = {"drop-new": [b"old2", b"0", b"1"], "drop-oldest": [b"0", b"1", b"2"]}[overflow]
        assert [message.payload for message in await client.next_messages(3)] == expected


@pytest.mark.spec("MQTT5-4.9.0-1")
async def test_the_quota_of_a_publisher_begins_anew_with_each_connection() -> None:
    async with open_memory_broker(Limits(receive_maximum=2)) as memory:
        client = await memory.connect("c", session_expiry_interval=100)
        for packet_id in (1, 2):
            await client.send(Publish("t", b"x", QoS.EXACTLY_ONCE, packet_id=packet_id))
            await client.expect(PubRec)
        await client.cut()
        client = await memory.reconnect(client)
        for packet_id in (3, 4):
            await client.send(Publish("t", b"x", QoS.EXACTLY_ONCE, packet_id=packet_id))
            assert (await client.expect(PubRec)).packet_id == packet_id
        await client.send(Publish("t", b"x", QoS.EXACTLY_ONCE, packet_id=5))
        end = await client.closed()
        assert isinstance(end, Disconnect)
        assert end.reason_code == ReasonCode.RECEIVE_MAXIMUM_EXCEEDED
