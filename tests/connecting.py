"""Clients that send a CONNECT and look at what comes back, packet by packet."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import ConnAck, Connect
from mqtt_trio.testing import ConnectionEndedError, MemoryBroker, TestClient


async def begin(memory: MemoryBroker, version: ProtocolVersion = ProtocolVersion.MQTT_5_0, **fields: Any) -> TestClient:
    """Send a CONNECT and let the broker see it."""
    client = TestClient(await memory.open_stream(), version)
    await client.send(Connect(protocol_version=version, **fields))
    await trio.testing.wait_all_tasks_blocked()
    return client


async def refusal(client: TestClient) -> ConnAck:
    """The refusing CONNACK, which is the last packet."""
    connack = await client.expect(ConnAck)
    assert connack.reason_code >= 0x80
    assert not connack.session_present
    with pytest.raises(ConnectionEndedError):
        await client.next_packet()
    return connack
