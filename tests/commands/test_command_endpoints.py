"""How pub and sub reach a server [F3]: TCP, TLS, WebSocket, Unix sockets, and what they say when they do not."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from mqtt_trio.commands.client import Session
from mqtt_trio.commands.endpoint import Endpoint, TlsFiles
from mqtt_trio.commands.failures import CommandError, UnreachableError
from mqtt_trio.commands.pub import Publisher, PubOptions
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import Connect
from mqtt_trio.server.listeners import ListenerOptions
from tests.certificates import Certificates
from tests.command_support import FakeTerminal
from tests.server.tls_support import Served, serve

LIMIT = 30
"""Seconds that a step may take."""
BIG = bytes(range(256)) * 4000


async def publish(endpoint: Endpoint, payload: bytes = b"hello") -> int:
    session = Session(opener=endpoint.open, where=str(endpoint), connect=Connect(client_id="cli"))
    options = PubOptions(topic_name="a", payload=payload, qos=QoS.EXACTLY_ONCE)
    with trio.fail_after(LIMIT):
        return await Publisher(options, FakeTerminal()).run(session)


async def arrives(served: Served, endpoint: Endpoint, watch: int) -> bool:
    """Whether a large message published to `endpoint` reaches a client of the plain listener number `watch`."""
    with trio.fail_after(LIMIT):
        watcher = await served.connect(await served.open(watch), "watcher", version=5, clean_start=True)
        await watcher.subscribe("a")
        assert await publish(endpoint, BIG) == 0
        return (await watcher.next_message()).payload == BIG


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.mark.parametrize("type_", ["tcp", "websocket"])
async def test_in_the_clear(type_: str) -> None:
    async with serve(ListenerOptions(port=0, type=type_), ListenerOptions(port=0)) as served:  # type: ignore[arg-type]
        path = "/mqtt" if type_ == "websocket" else None
        endpoint = Endpoint(host="127.0.0.1", port=served.listeners[0].port, websocket_path=path)
        assert await arrives(served, endpoint, 1)


@pytest.mark.parametrize("type_", ["tcp", "websocket"])
async def test_with_tls(certificates: Certificates, type_: str) -> None:
    options = ListenerOptions(port=0, type=type_, tls=certificates.tls_options())  # type: ignore[arg-type]
    async with serve(options, ListenerOptions(port=0)) as served:
        endpoint = Endpoint(
            port=served.listeners[0].port,
            tls=TlsFiles(ca_file=certificates.ca_file, alpn="mqtt" if type_ == "tcp" else None).context(),
            websocket_path="/mqtt" if type_ == "websocket" else None,
        )
        assert await arrives(served, endpoint, 1)


async def test_with_a_client_certificate(certificates: Certificates) -> None:
    async with serve(ListenerOptions(port=0, tls=certificates.tls_options(mutual=True))) as served:
        pair = certificates.client("me")
        port = served.listeners[0].port
        with_one = TlsFiles(ca_file=certificates.ca_file, cert_file=pair.cert_file, key_file=pair.key_file)
        assert await publish(Endpoint(port=port, tls=with_one.context())) == 0
        assert served.seen.shown[-1].certificate_subject == "me"
        with pytest.raises(CommandError, match="certificate required"):
            await publish(Endpoint(port=port, tls=TlsFiles(ca_file=certificates.ca_file).context()))


@pytest.mark.parametrize(
    "host, wrong_ca, check, words",
    [
        ("localhost", True, True, "the certificate of the server is refused: unable to get local issuer certificate"),
        ("localhost", True, False, "the certificate of the server is refused"),
        ("127.0.0.2", False, True, "IP address mismatch"),
        ("127.0.0.2", False, False, ""),
    ],
)
async def test_certificates_are_checked(
    certificates: Certificates, tmp_path: Path, host: str, wrong_ca: bool, check: bool, words: str
) -> None:
    other = Certificates(tmp_path, "other")
    options = ListenerOptions(port=0, host="0.0.0.0", tls=certificates.tls_options())
    async with serve(options) as served:
        files = TlsFiles(ca_file=(other if wrong_ca else certificates).ca_file, check_host_name=check)
        endpoint = Endpoint(host=host, port=served.listeners[0].port, tls=files.context())
        if not words:
            assert await publish(endpoint) == 0
            return
        with pytest.raises(UnreachableError) as caught:
            await publish(endpoint)
        assert words in str(caught.value)


async def test_wrong_doors(certificates: Certificates) -> None:
    """Each names what is wrong, within the time for it."""
    async with serve(ListenerOptions(port=0), ListenerOptions(port=0, type="websocket")) as served:
        tcp, websocket = (listener.port for listener in served.listeners)
        context = TlsFiles(ca_file=certificates.ca_file).context()
        for endpoint, words in (
            (Endpoint(port=websocket, websocket_path="/other"), "answers the WebSocket request with HTTP 404"),
            (Endpoint(port=tcp, websocket_path="/mqtt"), "closed the connection instead of answering as a WebSocket"),
            (Endpoint(port=tcp, tls=context), "may not speak TLS"),
            (Endpoint(port=websocket), "There was no CONNACK"),
        ):
            with pytest.raises(CommandError) as caught:
                await publish(endpoint)
            assert words in str(caught.value)
            assert caught.value.exit_code == 1


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "mqtt.sock")
    with pytest.raises(UnreachableError, match="No such file or directory"):
        await publish(Endpoint(unix_path=path))
    async with relay(path) as served:
        assert await arrives(served, Endpoint(unix_path=path), 0)


@asynccontextmanager
async def relay(path: str) -> AsyncIterator[Served]:
    """A broker whose TCP port is reached through a Unix socket."""
    async with serve(ListenerOptions(port=0)) as served, trio.open_nursery() as nursery:
        listener = trio.socket.socket(socket.AF_UNIX)
        await listener.bind(path)
        listener.listen()

        async def accept() -> None:
            taken, _ = await listener.accept()
            async with trio.SocketStream(taken) as near:
                far = await served.open()
                nursery.start_soon(pump, near, far)
                await pump(far, near)

        nursery.start_soon(accept)
        try:
            yield served
        finally:
            nursery.cancel_scope.cancel()
            listener.close()


async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()


@pytest.mark.parametrize(
    "endpoint, text",
    [
        (Endpoint(host="127.0.0.1", port=1), "Error: Connection refused (127.0.0.1 port 1)"),
        (Endpoint(host="localhost", port=1), "Error: Connection refused (localhost port 1)"),
        (Endpoint(host="a" * 70, port=1), "Error: "),
        (
            Endpoint(host="127.0.0.1", port=1, bind_address="192.0.2.1"),
            "Error: local_address='192.0.2.1' is incompatible",
        ),
    ],
)
async def test_no_connection_is_one_line(endpoint: Endpoint, text: str) -> None:
    with pytest.raises(UnreachableError) as caught:
        await publish(endpoint)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


async def test_a_host_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_args: object, **_options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("trio.open_tcp_stream", unknown)
    with pytest.raises(UnreachableError, match="Unable to connect to nowhere: the host is unknown"):
        await publish(Endpoint(host="nowhere"))


@pytest.mark.parametrize(
    "frames, words",
    [
        (b"\x81\x02hi", "sent text over the WebSocket"),
        (b"\x83\x02hi", "the WebSocket was closed: 1002"),
        (b"\x88\x02\x03\xf0", "the WebSocket was closed: 1008"),
        (b"\x82\x00\x88\x00", "The connection was lost"),
    ],
)
async def test_websocket_servers_that_send_no_mqtt(nursery: trio.Nursery, frames: bytes, words: str) -> None:
    """No exception group reaches the user."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]

    async def serve_one() -> None:
        async with await listener.accept() as stream:
            request = bytes(await stream.receive_some(4096)).decode()
            found = re.search(r"(?i)sec-websocket-key: (\S+)", request)
            assert found is not None
            await stream.send_all(accepted(found[1]) + frames)
            async for _ in stream:
                pass

    async with listener:
        nursery.start_soon(serve_one)
        port = listener.socket.getsockname()[1]
        with pytest.raises(CommandError) as caught:
            await publish(Endpoint(host="127.0.0.1", port=port, websocket_path="/mqtt"))
        assert words in str(caught.value)


def accepted(key: str) -> bytes:
    """The answer to a WebSocket request (RFC 6455, 4.2.2)."""
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
    accept = base64.b64encode(digest).decode()
    lines = (
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept}",
        "Sec-WebSocket-Protocol: mqtt",
        "",
        "",
    )
    return "\r\n".join(lines).encode()


def test_tls_1_2_is_the_least() -> None:
    assert TlsFiles().context().minimum_version >= ssl.TLSVersion.TLSv1_2
