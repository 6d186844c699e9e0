"""One ConnectTimeout for TLS handshake, WebSocket request and CONNECT together, to the second on a fake clock; WSS."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock, memory_stream_pair

from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.frames import FrameDecoder, client_frame
from mqtt_trio.protocol.packets import ConnAck, Connect, Publish
from mqtt_trio.server.link import CLOSE_GRACE
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.tls import TlsServer
from mqtt_trio.testing import MemoryBroker, TestClient
from tests.certificates import Certificates

V5 = ProtocolVersion.MQTT_5_0
REQUEST = (
    b"GET /mqtt HTTP/1.1\r\nHost: broker\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
)
CONNECT = encode(Connect(client_id="c", protocol_version=V5), V5)


class Secured:
    """Opens connections to a broker in memory, TLS on a stream in memory."""

    def __init__(self, memory: MemoryBroker, certificates: Certificates) -> None:
        self.memory = memory
        self.context: ssl.SSLContext = certificates.client_context()
        self.tls = TlsServer(certificates.tls_options(), "Listeners[0].Tls", ("mqtt",))
        self.served: list[float] = []

    def open(self, *, websocket: bool = False, secure: bool = True) -> trio.abc.Stream:
        """Return the client's end; the handshake has not begun. `served` gets the instant of the connection's end."""
        ours, theirs = memory_stream_pair()
        options = ListenerOptions(type="websocket" if websocket else "tcp", connect_timeout=10.0)

        async def serve() -> None:
            await self.memory.clients.serve(theirs, options, "memory", self.tls if secure else None)
            self.served.append(trio.current_time())

        self.memory.nursery.start_soon(serve)
        return trio.SSLStream(ours, self.context, server_hostname="localhost") if secure else ours


@pytest.fixture
def secured(memory_broker: MemoryBroker, tmp_path: Path) -> Secured:
    return Secured(memory_broker, Certificates(tmp_path))


async def read_head(stream: trio.abc.Stream) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        part = await stream.receive_some(1)
        assert part
        data += part
    return data


async def test_a_client_that_never_shakes_hands(secured: Secured, autojump_clock: MockClock) -> None:
    start = trio.current_time()
    stream = secured.open()
    assert isinstance(stream, trio.SSLStream)
    await stream.transport_stream.send_all(b"\x16")
    await trio.sleep(11)
    assert [at - start for at in secured.served] == [10.0]
    assert secured.memory.broker.metrics.handshakes_failed == 1


@pytest.mark.parametrize("websocket", [False, True])
@pytest.mark.parametrize("secure", [False, True])
async def test_one_timeout_for_all_that_comes_before_connect(
    secured: Secured, autojump_clock: MockClock, websocket: bool, secure: bool
) -> None:
    start = trio.current_time()
    stream = secured.open(websocket=websocket, secure=secure)
    await trio.sleep(3)
    if isinstance(stream, trio.SSLStream):
        await stream.do_handshake()
    await trio.sleep(3)
    if websocket:
        await stream.send_all(REQUEST)
        assert b" 101 " in await read_head(stream)
    await trio.sleep(3)
    await stream.send_all(client_frame(CONNECT[:5]) if websocket else CONNECT[:5])
    await trio.sleep(5)
    assert [at - start for at in secured.served] == [10.0]
    assert secured.memory.broker.metrics.connections_timed_out == 1


@pytest.mark.parametrize("websocket", [False, True])
async def test_the_timeout_ends_with_connect(secured: Secured, autojump_clock: MockClock, websocket: bool) -> None:
    stream = secured.open(websocket=websocket)
    await trio.sleep(9)
    if websocket:
        await stream.send_all(REQUEST)
        await read_head(stream)
        await stream.send_all(client_frame(CONNECT))
    else:
        await stream.send_all(CONNECT)
    await trio.sleep(3600)
    assert secured.served == []
    assert secured.memory.broker.metrics.clients_connected == 1


async def test_an_upgrade_that_takes_too_long_is_told_so(secured: Secured, autojump_clock: MockClock) -> None:
    start = trio.current_time()
    stream = secured.open(websocket=True)
    await trio.sleep(6)
    await stream.send_all(REQUEST[:30])
    assert b" 408 " in await read_head(stream)
    assert trio.current_time() - start == 10.0


async def test_wss_carries_packets_of_any_size(secured: Secured, autojump_clock: MockClock) -> None:
    stream, decoder = secured.open(websocket=True), FrameDecoder(3_000_000, masked=False)
    await stream.send_all(REQUEST + client_frame(CONNECT))  # nobody has to wait for the 101
    assert b"Sec-WebSocket-Protocol: mqtt\r\n" in await read_head(stream)
    assert decoder.feed(bytes(await stream.receive_some(1000)))[0] == 0x20
    subscriber = await secured.memory.connect("plain")
    await subscriber.subscribe("big")
    data = encode(Publish("big", bytes(1_500_000)), V5)
    for start in range(0, len(data), 100_000):
        await stream.send_all(client_frame(data[start : start + 100_000]))
    assert len((await subscriber.next_message()).payload) == 1_500_000


async def test_the_farewell_of_a_frozen_peer_is_bounded(secured: Secured, autojump_clock: MockClock) -> None:
    stream = secured.open()
    client = TestClient(stream, V5)
    await client.send(Connect(client_id="c", protocol_version=V5))
    await client.expect(ConnAck)
    (link,) = secured.memory.clients.links
    frozen = trio.Event()

    async def never(_data: object) -> None:
        await frozen.wait()

    link.stream._transport._stream.send_stream.send_all = never  # type: ignore[attr-defined]
    start = trio.current_time()
    await secured.memory.clients.shut_down()
    assert trio.current_time() - start == CLOSE_GRACE
    await trio.testing.wait_all_tasks_blocked()
    assert secured.served == [trio.current_time()]
