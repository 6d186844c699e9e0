"""MQTT over WebSocket from the request to the end of the connection: frames and packets, text frames, plain HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.frames import Opcode, client_frame
from mqtt_trio.testing import MemoryBroker
from tests.wire import PINGREQ, PINGRESP, V5, ack, both_versions, connect, packet, publish, receive, subscribe, text

REQUEST = (
    b"GET /mqtt HTTP/1.1\r\nHost: broker\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: mqtt\r\n\r\n"
)
BINARY, CLOSE = 0x82, 0x88


class Page:
    """A page's connection: sends frames, and takes apart what the broker sends, without the codec under test."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.received = b""

    async def _need(self, size: int) -> bool:
        while len(self.received) < size:
            if not (data := await receive(self.stream)):
                return False
            self.received += data
        return True

    async def frame(self) -> tuple[int, bytes] | None:
        """First byte and payload of the next frame; None at the end of the connection."""
        if not await self._need(2):
            assert self.received == b""
            return None
        size, head = self.received[1], 2
        if size == 126:
            assert await self._need(4)
            size, head = int.from_bytes(self.received[2:4], "big"), 4
        assert size < 65_536, "unmasked, and of the sizes that this test is about"
        assert await self._need(head + size)
        first, payload = self.received[0], self.received[head : head + size]
        self.received = self.received[head + size :]
        return first, payload

    async def until(self, size: int) -> bytes:
        """So many bytes of MQTT, however they are framed: binary, every one."""
        data = b""
        while len(data) < size:
            found = await self.frame()
            assert found is not None
            assert found[0] == BINARY
            data += found[1]
        return data


@asynccontextmanager
async def open_page(memory: MemoryBroker) -> AsyncIterator[Page]:
    stream = await memory.open_stream(websocket=True)
    await stream.send_all(REQUEST)
    page = Page(stream)
    with trio.fail_after(20):
        while b"\r\n\r\n" not in page.received:
            assert await page._need(len(page.received) + 1)
        head, _, page.received = page.received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101")
        yield page
    await stream.aclose()


@pytest.mark.spec("MQTT3-6.0.0-1", "MQTT5-6.0.0-1", "MQTT3-6.0.0-2", "MQTT5-6.0.0-2")
@both_versions
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
async def test_frames_and_packets_need_not_begin_together(
    memory_broker: MemoryBroker, version: ProtocolVersion, size: int
) -> None:
    """Frames of one byte up to one with all the packets; what comes back is in binary frames."""
    packets = [
        connect(version, text("page")),
        subscribe(version, 1, ("t", 2)),
        publish(version, "t", b"up and down", flags=2, packet_id=7),
        publish(version, "t", b"\0\xff"),
        PINGREQ,
    ]
    data = b"".join(packets)
    async with open_page(memory_broker) as page:
        for at in range(0, len(data), size):
            await page.stream.send_all(client_frame(data[at : at + size]))
        heard = b""
        while not heard.endswith(PINGRESP):
            heard += await page.until(1)
    assert heard[:1] == b"\x20"
    heard = heard[2 + heard[1] :]
    block = b"\0" if version is V5 else b""
    assert heard == b"".join(
        (
            packet(0x90, b"\0\1", block, b"\2"),
            publish(version, "t", b"up and down", flags=2, packet_id=1),
            ack(0x40, 7),
            publish(version, "t", b"\0\xff"),
            PINGRESP,
        )
    )


@pytest.mark.spec("MQTT3-6.0.0-1", "MQTT5-6.0.0-1")
@both_versions
@pytest.mark.parametrize("opcode", [Opcode.TEXT, 3])
async def test_another_data_frame_closes_the_connection(
    memory_broker: MemoryBroker, version: ProtocolVersion, opcode: int
) -> None:
    """Even one that holds a good packet, which is not handled; what came before it is."""
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("#")
    async with open_page(memory_broker) as page:
        await page.stream.send_all(client_frame(connect(version, text("page"))))
        assert (await page.until(1))[0] == 0x20
        before, inside = publish(version, "t", b"before"), publish(version, "t", b"inside")
        await page.stream.send_all(client_frame(before) + client_frame(inside, opcode) + client_frame(before))
        code = 1003 if opcode == Opcode.TEXT else 1002
        found = await page.frame()
        assert found is not None
        assert (found[0], found[1][:2]) == (CLOSE, code.to_bytes(2, "big"))
        assert await page.frame() is None, "closed"
    assert (await watcher.next_message()).payload == b"before"
    assert await watcher.nothing_waits()
    assert memory_broker.broker.metrics.clients_connected == 1


@pytest.mark.parametrize("path", ["/", "/mqtt"])
async def test_plain_http_gets_a_readable_page_and_is_closed(memory_broker: MemoryBroker, path: str) -> None:
    """What a browser shows to somebody who opens the port's address."""
    stream = await memory_broker.open_stream(websocket=True)
    await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: broker:8083\r\nAccept: text/html\r\n\r\n".encode())
    page = b""
    with trio.fail_after(20):
        while data := await stream.receive_some(1000):
            page += data
            if b"\r\n\r\n" in page and b"/mqtt" in page:
                await stream.aclose()
                break
    head, _, body = page.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 426 ")
    assert b"content-type: text/plain; charset=utf-8" in head.lower()
    assert b"MQTT over WebSocket at /mqtt" in body
    await trio.testing.wait_all_tasks_blocked()
    assert memory_broker.broker.metrics.upgrades_refused == 1
    assert memory_broker.broker.metrics.client_failures == 0
    assert not memory_broker.clients.links
