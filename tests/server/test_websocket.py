"""The WebSocket upgrade on memory streams: what is accepted, what is answered with a page, what it is bounded by."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock, memory_stream_pair
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Request

from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.websocket import ANSWER_TIMEOUT, MAXIMUM_REQUEST_SIZE, Upgraded, upgrade

KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = ("Host: broker", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", KEY)
MQTT = "Sec-WebSocket-Protocol: mqtt"
Results = list[Upgraded | None]


def request(*headers: str, line: str = "GET /mqtt HTTP/1.1") -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1")


def without(name: str) -> tuple[str, ...]:
    return tuple(header for header in HANDSHAKE if not header.startswith(name))


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while part := await stream.receive_some(65_536):
        data += part
    return data


async def read_head(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        part = await stream.receive_some(1)
        assert part, f"closed after {data!r}"
        data += part
    return data


async def answer_to(data: bytes, **options: Any) -> tuple[Upgraded | None, bytes]:
    """Send `data`, nothing more; return what `upgrade` gave and all that came back."""
    ours, theirs = memory_stream_pair()
    results: Results = []
    received = b""
    tasks = trio.lowlevel.current_statistics().tasks_living

    async def serve() -> None:
        results.append(await upgrade(theirs, ListenerOptions(type="websocket", **options)))
        if results[0] is not None:
            await theirs.send_eof()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await ours.send_all(data)
            received = await read_all(ours)
            await ours.aclose()
    assert trio.lowlevel.current_statistics().tasks_living == tasks, "a task is left"
    return results[0], received


async def refused(data: bytes, **options: Any) -> tuple[int, str]:
    """Return status and text of the page that `data` is answered with."""
    result, received = await answer_to(data, **options)
    assert result is None
    head, _, body = received.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    assert b"close" in head
    return int(head.split()[1]), body.decode()


@pytest.mark.spec("MQTT5-6.0.0-4", "MQTT3-6.0.0-4")
@pytest.mark.parametrize(
    "offered, chosen",
    [
        ((MQTT,), "mqtt"),
        (("Sec-WebSocket-Protocol: mqttv3.1",), "mqttv3.1"),
        (("Sec-WebSocket-Protocol: mqttv3.1, mqtt",), "mqtt"),
        (("Sec-WebSocket-Protocol: mqttv3.1", MQTT), "mqtt"),
        (("Sec-WebSocket-Protocol: chat,mqtt",), "mqtt"),
        (("Sec-WebSocket-Protocol: chat", MQTT), "mqtt"),
        ((), None),
    ],
)
async def test_the_subprotocol_is_echoed(offered: tuple[str, ...], chosen: str | None) -> None:
    """It is mqtt wherever that was offered; what 3.1 clients offer alone is a courtesy."""
    result, received = await answer_to(request(*HANDSHAKE, *offered))
    assert result == Upgraded(b"", chosen)
    lines = received.decode().lower().split("\r\n")
    assert lines[0].startswith("http/1.1 101")
    assert "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in lines, "the example of RFC 6455"
    echoed = [line for line in lines if line.startswith("sec-websocket-protocol")]
    assert echoed == ([f"sec-websocket-protocol: {chosen}"] if chosen else [])


async def test_a_foreign_client_accepts_the_handshake_and_gets_no_extension() -> None:
    client = WSConnection(ConnectionType.CLIENT)
    opening = client.send(Request(host="bücher.example", target="/mqtt?token=1", subprotocols=["mqtt"]))
    opening = opening.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
    result, received = await answer_to(opening)
    assert result == Upgraded(b"", "mqtt")
    client.receive_data(received)
    assert list(client.events()) == [AcceptConnection(subprotocol="mqtt")]
    assert b"extensions" not in received.lower()


@pytest.mark.parametrize("path", ["/mqtt", "/", "/mqtt?x=/y", "/?"])
async def test_both_paths_are_served(path: str) -> None:
    result, _ = await answer_to(request(*HANDSHAKE, MQTT, line=f"GET {path} HTTP/1.1"))
    assert result == Upgraded(b"", "mqtt")


async def test_the_path_is_an_option() -> None:
    result, _ = await answer_to(request(*HANDSHAKE, line="GET /ws HTTP/1.1"), path="/ws")
    assert result == Upgraded(b"", None)
    assert (await refused(request(*HANDSHAKE), path="/ws"))[0] == 404


async def test_bytes_behind_the_request_are_returned() -> None:
    frames = bytes(range(256)) * 8
    result, _ = await answer_to(request(*HANDSHAKE, MQTT) + frames)
    assert result is not None
    assert frames.startswith(result.rest)
    assert result.rest


async def test_byte_by_byte(autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    data = request(*HANDSHAKE, MQTT)
    async with trio.open_nursery() as nursery:

        async def dribble() -> None:
            for byte in data:
                await ours.send_all(bytes([byte]))
                await trio.sleep(0.01)

        nursery.start_soon(dribble)
        assert await upgrade(theirs, ListenerOptions(type="websocket")) == Upgraded(b"", "mqtt")
        assert (await read_head(ours)).startswith(b"HTTP/1.1 101")
        await theirs.send_all(b"frames")
        assert await ours.receive_some() == b"frames", "the stream is still open"


@pytest.mark.parametrize("line", ["GET /mqtt HTTP/1.1", "GET / HTTP/1.1", "GET / HTTP/1.0"])
async def test_a_plain_get_gets_a_readable_page(line: str) -> None:
    status, text = await refused(request("Host: broker", "Connection: keep-alive", line=line))
    assert status == 426
    assert "MQTT over WebSocket at /mqtt" in text


async def test_head_gets_no_body() -> None:
    result, received = await answer_to(request("Host: broker", line="HEAD / HTTP/1.1"))
    assert result is None
    assert received.startswith(b"HTTP/1.1 426 ")
    assert received.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "data",
    [
        bytes.fromhex("101000044d5154540402003c000474657374"),  # MQTT CONNECT
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS ClientHello
        b"hello\r\n\r\n",
        b"GET /mqtt\r\n\r\n",
        b"GET /mqtt HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /mqtt HTTP/1.1\r\n\r\n",  # no Host
        request(*HANDSHAKE, "X: \x00"),
        b"\xff" * 5000 + b"\r\n",
        b"\r\n\r\n",
    ],
)
async def test_garbage_gets_a_readable_answer(data: bytes) -> None:
    status, text = await refused(data)
    assert status == 400
    assert "MQTT over WebSocket" in text


@pytest.mark.parametrize(
    "data, status, word",
    [
        (request(*HANDSHAKE, line="GET /other HTTP/1.1"), 404, "/mqtt"),
        (request(*HANDSHAKE, line="GET http://broker/mqtt HTTP/1.1"), 404, "/mqtt"),
        (request(*HANDSHAKE, "Content-Length: 3", line="POST /mqtt HTTP/1.1") + b"abc", 405, "GET"),
        (request(*HANDSHAKE, "Content-Length: 3") + b"abc", 400, "body"),
        (request(*HANDSHAKE, "Transfer-Encoding: chunked"), 400, "body"),
        (request(*HANDSHAKE, line="GET /mqtt HTTP/1.0"), 400, "HTTP/1.1"),
        (request(*without("Upgrade")), 426, "MQTT"),
        (request(*without("Connection"), "Connection: close"), 426, "MQTT"),
        (request(*without("Sec-WebSocket-Version"), "Sec-WebSocket-Version: 8"), 426, "13"),
        (request(*without("Sec-WebSocket-Version")), 426, "13"),
        (request(*without("Sec-WebSocket-Key")), 400, "Key"),
        (request(*HANDSHAKE, KEY), 400, "Key"),
        (request(*without("Sec-WebSocket-Key"), "Sec-WebSocket-Key: c2hvcnQ="), 400, "Key"),
        (request(*without("Sec-WebSocket-Key"), "Sec-WebSocket-Key: \xe4\xf6"), 400, "Key"),
        (request(*HANDSHAKE, "Sec-WebSocket-Protocol: chat, \xe4"), 400, "subprotocol"),
    ],
)
async def test_requests_that_are_no_upgrade_to_mqtt(data: bytes, status: int, word: str) -> None:
    found, text = await refused(data)
    assert found == status
    assert word in text


@pytest.mark.parametrize("host", ["\xe4\xf6", "a" * 300 + ".example", "xn--\xff", "[::1]:8083"])
async def test_odd_hosts_do_no_harm(host: str) -> None:
    result, _ = await answer_to(request(*without("Host"), f"Host: {host}", MQTT))
    assert result == Upgraded(b"", "mqtt")


@pytest.mark.parametrize(
    "origin, allowed, status",
    [
        ("https://evil.example", (), 101),
        ("https://evil.example", ("*",), 101),
        ("https://app.example", ("https://app.example",), 101),
        ("HTTPS://App.Example", ("https://app.example/",), 101),
        ("https://app.example", ("https://APP.example:443",), 101),
        (None, ("https://app.example",), 101),
        ("null", ("null",), 101),
        ("https://evil.example", ("https://app.example",), 403),
        ("https://app.example.evil.example", ("https://app.example",), 403),
        ("http://app.example", ("https://app.example",), 403),
        ("https://app.example:8443", ("https://app.example",), 403),
        ("null", ("https://app.example",), 403),
        ("", ("https://app.example",), 403),
        ("https://app.example, https://evil.example", ("https://app.example",), 403),
    ],
)
async def test_allowed_origins(origin: str | None, allowed: tuple[str, ...], status: int) -> None:
    headers = () if origin is None else (f"Origin: {origin}",)
    _, received = await answer_to(request(*HANDSHAKE, MQTT, *headers), allowed_origins=allowed)
    assert int(received.split()[1]) == status


async def test_two_origins_are_refused() -> None:
    origins = ("Origin: https://app.example", "Origin: https://evil.example")
    status, text = await refused(request(*HANDSHAKE, *origins), allowed_origins=("https://app.example",))
    assert status == 403
    assert "AllowedOrigins" in text


@pytest.mark.parametrize("ended", [True, False])
async def test_the_request_is_bounded_in_size(ended: bool) -> None:
    data = request(*HANDSHAKE, "X: " + "x" * MAXIMUM_REQUEST_SIZE)
    status, _ = await refused(data if ended else data[:-4] + b"y" * 40_000)
    assert status == 431


async def test_the_largest_request_is_served() -> None:
    data = request(*HANDSHAKE, "X: ")
    data = data[:-4] + b"x" * (MAXIMUM_REQUEST_SIZE - len(data)) + data[-4:]
    result, _ = await answer_to(data + b"frames")
    assert result is not None


@pytest.mark.parametrize(
    "sent, answer",
    [(b"", b""), (b"GET / HT", b"HTTP/1.1 408 Request Timeout"), (request(*HANDSHAKE)[:-2], b"HTTP/1.1 408")],
)
async def test_the_request_is_bounded_in_time(sent: bytes, answer: bytes, autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        await ours.send_all(sent or b"")
        nursery.start_soon(upgrade, theirs, ListenerOptions(type="websocket", connect_timeout=7.0))
        received = await read_all(ours)
        assert trio.current_time() == start + 7.0
        await ours.aclose()
    assert received.startswith(answer)
    assert bool(received) is bool(answer)


async def test_one_byte_per_second_does_not_extend_the_time(autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    start = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def dribble() -> None:
            with contextlib.suppress(trio.BrokenResourceError):  # the server closed: how it ends
                for byte in request(*HANDSHAKE):
                    await ours.send_all(bytes([byte]))
                    await trio.sleep(1)

        nursery.start_soon(dribble)
        assert await upgrade(theirs, ListenerOptions(type="websocket", connect_timeout=5.0)) is None
        assert trio.current_time() <= start + 5.0 + ANSWER_TIMEOUT
        nursery.cancel_scope.cancel()


async def test_a_client_that_does_not_close_is_closed(autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    await ours.send_all(b"\x10\x00")
    start = trio.current_time()
    assert await upgrade(theirs, ListenerOptions(type="websocket")) is None
    assert trio.current_time() == start + ANSWER_TIMEOUT
    with pytest.raises(trio.ClosedResourceError):
        await theirs.send_all(b"x")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", request(*HANDSHAKE)])
async def test_a_client_that_leaves_early(sent: bytes) -> None:
    ours, theirs = memory_stream_pair()
    await ours.send_all(sent)
    await ours.aclose()
    assert await upgrade(theirs, ListenerOptions(type="websocket")) is None


async def test_cancellation_closes_the_stream(autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    with trio.move_on_after(1) as scope:
        await upgrade(theirs, ListenerOptions(type="websocket"))
    assert scope.cancelled_caught
    assert await ours.receive_some() == b""


async def test_on_a_socket() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener, await trio.testing.open_stream_to_socket_listener(listener) as client:
        server = await listener.accept()
        async with server:
            await client.send_all(request(*HANDSHAKE, MQTT) + b"frames")
            assert await upgrade(server, ListenerOptions(type="websocket")) == Upgraded(b"frames", "mqtt")
            assert b"101" in await read_head(client)
