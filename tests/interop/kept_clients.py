"""Clients that know what a broker told them about each message, whatever becomes of its store."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import ConnAck, Connect
from mqtt_trio.testing import ConnectionEndedError, TestClient
from tests.interop.broker_process import BrokerProcess

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
PADDING = b"." * 3000
KEPT = 3600
"""Session Expiry Interval."""
MESSAGES = 3000
"""More of them than a store can take that takes nothing, or little."""


STREAMS: list[trio.SocketStream] = []


@pytest.fixture
async def streams() -> AsyncIterator[list[trio.SocketStream]]:
    """Connections of the test, closed behind it."""
    STREAMS.clear()
    yield STREAMS
    for stream in STREAMS:
        stream.socket.close()


async def connect(
    broker: BrokerProcess, client_id: str, *, version: ProtocolVersion = V5, kept: bool = False
) -> TestClient:
    STREAMS.append(await trio.open_tcp_stream("127.0.0.1", broker.port))
    client = TestClient(STREAMS[-1], version)
    client.patience = 20
    v5 = version is V5
    await client.send(
        Connect(
            client_id=client_id,
            protocol_version=version,
            clean_start=not kept,
            session_expiry_interval=KEPT if kept and v5 else None,
        )
    )
    client.connack = await client.expect(ConnAck)
    return client


async def leave_session(broker: BrokerProcess, client_id: str, topic_filter: str) -> None:
    client = await connect(broker, client_id, kept=True)
    await client.subscribe(topic_filter)
    await client.disconnect()


def payload(number: int) -> bytes:
    return b"%d " % number + PADDING


class Ledger:
    """What one publisher was told about its messages."""

    def __init__(self, client: TestClient, topic_name: str, qos: int) -> None:
        self.client = client
        self.topic_name = topic_name
        self.qos = qos
        self.acknowledged: list[int] = []
        self.refused: list[int] = []

    async def publish(self, *, retain: bool = False) -> bool:
        """Publish the next message; say whether it was taken."""
        number = len(self.acknowledged) + len(self.refused)
        code = await self.client.publish(self.topic_name, payload(number), qos=self.qos, retain=retain)
        if code < 0x80:
            self.acknowledged.append(number)
            return True
        assert code is ReasonCode.QUOTA_EXCEEDED
        self.refused.append(number)
        return False

    async def until_refused(self) -> None:
        for _ in range(MESSAGES):
            if not await self.publish():
                return
        pytest.fail(f"{MESSAGES} messages were taken")

    async def until_taken(self) -> None:
        """Publish until a message is taken; the store looks again after five seconds at the latest."""
        while not await self.publish():
            await self.client.ping()
            await trio.sleep(0.05)


async def assert_others_go_on(broker: BrokerProcess) -> None:
    """What nobody has to keep goes on as ever, new clients included."""
    reader = await connect(broker, "reader")
    await reader.subscribe("plain/#")
    sender = await connect(broker, "sender")
    for qos in (0, 1, 2):
        assert await sender.publish("plain/news", b"%d" % qos, qos=qos) is ReasonCode.SUCCESS
        assert (await reader.next_message()).payload == b"%d" % qos
    late = await connect(broker, "late", kept=True)
    assert await late.subscribe("plain/#") == (ReasonCode.GRANTED_QOS_2,)
    assert await sender.publish("plain/live", b"live") is ReasonCode.SUCCESS
    assert (await late.next_message()).payload == b"live"
    await late.disconnect()


async def assert_311_is_disconnected(broker: BrokerProcess) -> None:
    """Its version has no negative answer."""
    old = await connect(broker, "old", version=V311)
    with pytest.raises(ConnectionEndedError):
        await old.publish("kept/old", payload(0), qos=1, retain=True)


async def assert_received(broker: BrokerProcess, client_id: str, numbers: list[int]) -> None:
    """Resume a session: it gets these messages, in this order, and nothing else."""
    client = await connect(broker, client_id, kept=True)
    assert client.connack is not None
    assert client.connack.session_present
    found = [int(message.payload.split()[0]) for message in await client.next_messages(len(numbers))]
    assert found == numbers
    assert await client.nothing_waits()
    await client.disconnect()
