"""What the specifications ask of clients, as the client of `mqtt_trio.testing` keeps it, seen from a server's end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.testing import TestClient
from mqtt_trio.testing.websocket import WebSocketStream
from tests.wire import DISCONNECT, V5, Wire, ack, both_versions, packet, packet_ids, publish

PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK = (
    0x40, 0x50, 0x62, 0x70, 0x82, 0x90, 0xA2, 0xB0,
)  # fmt: skip


@asynccontextmanager
async def client_and_server(version: ProtocolVersion) -> AsyncIterator[tuple[TestClient, Wire]]:
    """A client that is connected, and the end of the server it is connected to."""
    ours, theirs = trio.testing.memory_stream_pair()
    client, server = TestClient(ours, version), Wire(theirs)
    connack = packet(0x20, b"\0\0", b"\0" if version is V5 else b"")
    client.connection.receive_data(connack)
    assert client.connection.next_packet() is not None
    with trio.fail_after(20):
        yield client, server


async def answer(server: Wire, version: ProtocolVersion) -> list[bytes]:
    """Answer what asks for an answer until the client closes; return all that it sent."""
    tail = b"\0\0" if version is V5 else b"\0"
    seen = []
    while data := await server.read():
        seen.append(data)
        kind = data[0]
        if kind >> 4 == 3 and kind & 6:
            at = 4 + int.from_bytes(data[2:4], "big")
            await server.send(ack(PUBACK if kind & 2 else PUBREC, int.from_bytes(data[at : at + 2], "big")))
        elif kind in (PUBREC, PUBREL):
            await server.send(ack(PUBREL if kind == PUBREC else PUBCOMP, int.from_bytes(data[2:4], "big")))
        elif kind == SUBSCRIBE:
            await server.send(packet(SUBACK, data[2:4], tail))
        elif kind == UNSUBSCRIBE:
            await server.send(packet(UNSUBACK, data[2:4], tail if version is V5 else b""))
    return seen


@pytest.mark.spec("MQTT3-4.5.0-2", "MQTT5-4.5.0-2", "MQTT3-4.6.0-2", "MQTT3-4.6.0-3", "MQTT5-4.6.0-2", "MQTT5-4.6.0-3")
@both_versions
async def test_every_message_is_acknowledged_in_its_order(version: ProtocolVersion) -> None:
    """As its QoS says, whoever looks at what is in it; messages that came twice once more."""
    sent = [(9, 1), (3, 2), (0, 0), (500, 1), (0, 0), (65_535, 2), (1, 1), (3, 2), (2, 2)]
    async with client_and_server(version) as (client, server), trio.open_nursery() as nursery:
        seen: list[bytes] = []

        async def serve() -> None:
            await server.send(*(publish(version, "t", b"x", flags=qos << 1, packet_id=each) for each, qos in sent))
            seen.extend(await answer(server, version))

        nursery.start_soon(serve)
        for _ in sent:
            await client.next_message()
        await client.cut()
    assert packet_ids([data for data in seen if data[0] == PUBACK]) == [each for each, qos in sent if qos == 1]
    assert packet_ids([data for data in seen if data[0] == PUBREC]) == [each for each, qos in sent if qos == 2]
    assert packet_ids([data for data in seen if data[0] == PUBCOMP]) == [each for each, qos in sent if qos == 2]
    assert {data[0] for data in seen} == {PUBACK, PUBREC, PUBCOMP}, "and nothing else was said"


@pytest.mark.spec("MQTT3-2.3.1-2", "MQTT5-2.2.1-3", "MQTT3-4.6.0-4", "MQTT5-4.6.0-4")
@both_versions
async def test_identifiers_of_requests(version: ProtocolVersion) -> None:
    """Never 0, never one whose request is unanswered: behind 65,535 they begin again with 1."""
    async with client_and_server(version) as (client, server), trio.open_nursery() as nursery:
        seen: list[bytes] = []

        async def serve() -> None:
            seen.extend(await answer(server, version))

        nursery.start_soon(serve)
        for _ in range(65_531):
            next(client._ids)
        await client.subscribe("t")
        await client.publish("t", b"", qos=1)
        await client.publish("t", b"")
        await client.publish("t", b"", qos=2)
        await client.unsubscribe("t")
        await client.publish("t", b"", qos=2)
        await client.publish("t", b"", qos=2)
        await client.cut()
    at = {SUBSCRIBE: 2, UNSUBSCRIBE: 2, 0x32: 5, 0x34: 5}
    requests = [data for data in seen if data[0] in at]
    assert [data[0] for data in requests] == [SUBSCRIBE, 0x32, 0x34, UNSUBSCRIBE, 0x34, 0x34]
    found = [int.from_bytes(data[at[data[0]] : at[data[0]] + 2], "big") for data in requests]
    assert found == [65_532, 65_533, 65_534, 65_535, 1, 2]
    assert packet_ids([data for data in seen if data[0] == PUBREL]) == [65_534, 1, 2], "as their PUBRECs came"


@pytest.mark.spec("MQTT3-3.14.4-1", "MQTT5-3.14.4-2")
@both_versions
async def test_the_client_closes_behind_its_disconnect(
    autojump_clock: trio.testing.MockClock, version: ProtocolVersion
) -> None:
    """Also from a server that does not."""
    async with client_and_server(version) as (client, server):
        await client.disconnect()
        assert await server.until_closed() == [DISCONNECT]
        with pytest.raises(trio.ClosedResourceError):
            await client.stream.receive_some(1)


@pytest.mark.spec("MQTT3-6.0.0-3", "MQTT5-6.0.0-3")
async def test_the_subprotocol_that_the_client_offers() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    request = b""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(WebSocketStream(ours).upgrade)
            while not request.endswith(b"\r\n\r\n"):
                request += await theirs.receive_some(1)
            await theirs.send_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    headers = [line.partition(": ") for line in request.decode().splitlines()]
    offered = [value.split(",") for name, _, value in headers if name.lower() == "sec-websocket-protocol"]
    assert "mqtt" in [name.strip() for names in offered for name in names]
