"""The WebSocket upgrade [MQTT5-6]: from the first byte of a connection to the first byte behind the HTTP request.

h11 reads the request, bounded in bytes and time; what is no upgrade to MQTT gets a page that says so. trio-websocket
makes the handshake over a stream that shows it one clean request and nothing behind it; the frames that follow are
not its business but `protocol.frames`'.
"""

from __future__ import annotations

import base64
import binascii
import logging
from typing import Final, Protocol

import attrs
import h11
import trio
import trio_websocket

logger = logging.getLogger(__name__)

MAXIMUM_REQUEST_SIZE: Final = 16_384
"""Bytes of request line and headers. Outcome: HTTP 431."""
ANSWER_TIMEOUT: Final = 2.0
"""Seconds that an HTTP answer may take until the connection is closed anyway."""
SUBPROTOCOLS: Final = ("mqtt", "mqttv3.1")
"""[MQTT5-6.0.0-4]; the second one is what 3.1 clients say."""
RECEIVE_SIZE: Final = 4096
LINGER_SIZE: Final = 65_536
"""Bytes that are read and thrown away behind a refused request: closing over unread bytes would reset the connection,
and the client would lose the answer."""

REASONS: Final = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
}
NOT_HTTP: Final = (
    "This port speaks MQTT over WebSocket, and what came is no HTTP request. Plain MQTT belongs on a tcp listener.\n"
)
TLS_CAME: Final = "This port speaks MQTT over WebSocket in the clear (http, ws), and what came is TLS (https, wss).\n"


class UpgradeOptions(Protocol):
    """What the upgrade needs of `ListenerOptions`."""

    @property
    def path(self) -> str: ...
    @property
    def allowed_origins(self) -> tuple[str, ...]: ...
    @property
    def connect_timeout(self) -> float: ...


@attrs.frozen
class Upgraded:
    """The connection speaks WebSocket now."""

    rest: bytes
    """What has been read behind the request: the beginning of the first frames."""
    subprotocol: str | None


@attrs.frozen
class _Offer:
    """A request that we accept."""

    target: bytes
    key: bytes
    subprotocol: str | None

    def request(self) -> bytes:
        """Return the request that trio-websocket sees. What the client sent beside it (odd hosts, extensions, two
        keys, any bytes in headers) can neither confuse nor crash the handshake."""
        protocol = f"Sec-WebSocket-Protocol: {self.subprotocol}\r\n" if self.subprotocol else ""
        return (
            b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n%b\r\n"
        ) % (self.target, self.key, protocol.encode())


class _Refusal(Exception):
    """An HTTP answer that is not 101."""

    def __init__(self, status: int, text: str, *headers: str, whole: bool = True) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers
        self.whole = whole
        """Whether the request was read to its end."""
        self.head_only = False

    def __bytes__(self) -> bytes:
        body = self.text.encode()
        connection = "Upgrade, close" if self.status == 426 else "close"
        head = [
            f"HTTP/1.1 {self.status} {REASONS.get(self.status, 'Error')}",
            f"Connection: {connection}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            *self.headers,
        ]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + (b"" if self.head_only else body)


class _HandshakeStream(trio.abc.Stream):
    """Shows trio-websocket one request and nothing behind it; closing it leaves the connection open."""

    def __init__(self, stream: trio.abc.Stream, request: bytes) -> None:
        self._stream = stream
        self._request = request

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._request:
            await trio.sleep_forever()
        size = len(self._request) if max_bytes is None else max_bytes
        shown, self._request = self._request[:size], self._request[size:]
        return shown

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def upgrade(
    stream: trio.abc.Stream, options: UpgradeOptions, *, deadline: float | None = None, peer: str = "unknown"
) -> Upgraded | None:
    """Read the request and answer it, until `deadline` (monotonic seconds; without one, `options.connect_timeout` from
    now). `peer` stands in logs.

    Returns:
      None when the connection is no WebSocket: it has its answer, as far as it took it, and is closed. No task is
      left behind in either case. Cancellation closes the stream.
    """
    try:
        if deadline is None:
            deadline = trio.current_time() + options.connect_timeout
        return await _upgrade(stream, options, deadline, peer)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _upgrade(stream: trio.abc.Stream, options: UpgradeOptions, deadline: float, peer: str) -> Upgraded | None:
    refusal: _Refusal | None = None
    reader = _RequestReader()
    with trio.move_on_at(deadline) as timeout:
        try:
            offer = check(await reader.read(stream), options)
            await _handshake(stream, offer)
            return Upgraded(reader.rest, offer.subprotocol)
        except _Refusal as exc:
            refusal = exc
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio_websocket.ConnectionClosed, _Gone) as exc:
            logger.debug("a client left during the WebSocket upgrade: %r", exc)
    if timeout.cancelled_caught and reader.size and not reader.whole:
        refusal = _Refusal(408, "The request took too long.\n", whole=False)
    if refusal is not None:
        refusal.head_only = reader.method == b"HEAD"
        if refusal.text == TLS_CAME:
            logger.info("client at %s refused: TLS at a port that speaks plain WebSocket", peer)
        await _answer(stream, refusal)
    await trio.aclose_forcefully(stream)
    return None


class _Gone(Exception):
    """The client closed before its request was whole."""


class _RequestReader:
    """Reads one HTTP request head."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes read so far."""
        self.whole = False
        self.method = b""
        self.rest = b""

    async def read(self, stream: trio.abc.Stream) -> h11.Request:
        """Return the request; the bytes behind it are in `rest` then.

        Raises:
          _Refusal: no HTTP, or too much of it.
          _Gone: the client closed first.
        """
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAXIMUM_REQUEST_SIZE)
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError as exc:
                if exc.error_status_hint == 431:
                    raise _too_large() from None
                raise _Refusal(400, NOT_HTTP, whole=False) from None
            if isinstance(event, h11.Request):
                break
            data = await stream.receive_some(RECEIVE_SIZE)
            if not data:
                raise _Gone
            if not self.size and not data[:1].isupper():  # h11 would wait for the end of a line that never comes
                raise _Refusal(400, TLS_CAME if data[:1] == b"\x16" else NOT_HTTP, whole=False)
            self.size += len(data)
            parser.receive_data(bytes(data))
        self.whole = True
        self.method = event.method
        self.rest = parser.trailing_data[0]
        if self.size - len(self.rest) > MAXIMUM_REQUEST_SIZE:  # it ended inside the read that took it over the bound
            raise _too_large()
        return event


def _too_large() -> _Refusal:
    return _Refusal(431, f"The request is larger than {MAXIMUM_REQUEST_SIZE} bytes.\n", whole=False)


def check(request: h11.Request, options: UpgradeOptions) -> _Offer:
    """Decide on a request; `_Refusal` is every answer but 101."""
    path = request.target.partition(b"?")[0].decode("ascii", "replace")
    if path not in (options.path, "/"):
        raise _Refusal(404, f"Nothing is served here. MQTT over WebSocket is at {options.path}\n")
    if request.method != b"GET" and request.method != b"HEAD":
        raise _Refusal(405, "A WebSocket starts with GET.\n", "Allow: GET", whole=False)
    tokens = _Headers(request)
    if "websocket" not in tokens.lowered(b"upgrade") or "upgrade" not in tokens.lowered(b"connection"):
        raise _Refusal(
            426,
            f"This is an MQTT broker. It speaks MQTT over WebSocket at {options.path}: open the address with an MQTT\n"
            "client (a ws:// URL), not with a browser's address bar.\n",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            whole=not tokens.body_follows(),
        )
    if request.method != b"GET" or request.http_version < b"1.1" or tokens.body_follows():
        raise _Refusal(400, "A WebSocket starts with a GET of HTTP/1.1 without a body.\n", whole=False)
    if tokens.values(b"sec-websocket-version") != [b"13"]:
        text = "Only version 13 of WebSocket (RFC 6455) is served.\n"
        raise _Refusal(426, text, "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    _check_origin(tokens.values(b"origin"), options.allowed_origins)
    offered = tokens.of(b"sec-websocket-protocol")
    # `mqtt` wherever it is offered; offering nothing is tolerated, offering only others is not [MQTT5-6.0.0-3].
    subprotocol = next((name for name in SUBPROTOCOLS if name in offered), None)  # [MQTT5-6.0.0-4]
    if offered and subprotocol is None:
        raise _Refusal(400, 'Offer the WebSocket subprotocol "mqtt" (or "mqttv3.1"); none of yours is served.\n')
    return _Offer(request.target, _check_key(tokens.values(b"sec-websocket-key")), subprotocol)


def _check_origin(origins: list[bytes], allowed: tuple[str, ...]) -> None:
    """Keep pages of other sites away. Browsers always send Origin; who sends none is no browser."""
    if not allowed or "*" in allowed or not origins:
        return
    if len(origins) != 1 or origins[0].decode("latin-1").lower() not in allowed:
        raise _Refusal(403, "Pages of this origin may not connect: it is not among the listener's AllowedOrigins.\n")


def _check_key(keys: list[bytes]) -> bytes:
    try:
        if len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16:
            return keys[0]
    except (binascii.Error, ValueError):
        pass
    raise _Refusal(400, "Sec-WebSocket-Key must stand there once, with 16 bytes in base64.\n")


class _Headers:
    """The headers of a request as this module asks for them."""

    def __init__(self, request: h11.Request) -> None:
        self._headers = list(request.headers)

    def values(self, name: bytes) -> list[bytes]:
        return [value for found, value in self._headers if found == name]

    def of(self, name: bytes) -> list[str]:
        """Return the items of a comma-separated list, which may be spread over several headers."""
        items = b",".join(self.values(name)).decode("latin-1").split(",")
        return [item.strip() for item in items if item.strip()]

    def lowered(self, name: bytes) -> list[str]:
        return [item.lower() for item in self.of(name)]

    def body_follows(self) -> bool:
        return bool(self.values(b"transfer-encoding")) or any(
            value.strip(b"0") for value in self.values(b"content-length")
        )


async def _handshake(stream: trio.abc.Stream, offer: _Offer) -> None:
    """Have trio-websocket answer the request; its reader task ends with the nursery.

    Raises:
      trio_websocket.ConnectionClosed: the client left.
    """
    gone: trio_websocket.ConnectionClosed | None = None
    async with trio.open_nursery() as nursery:
        request = await trio_websocket.wrap_server_stream(
            nursery, _HandshakeStream(stream, offer.request()), receive_buffer_size=MAXIMUM_REQUEST_SIZE
        )
        try:
            await request.accept(subprotocol=offer.subprotocol)
        except trio_websocket.ConnectionClosed as exc:
            gone = exc  # not raised in here, so that no exception group needs unwrapping
        nursery.cancel_scope.cancel()
    if gone is not None:
        raise gone


async def _answer(stream: trio.abc.Stream, refusal: _Refusal) -> None:
    """Send a page and let the client take it, for ANSWER_TIMEOUT at most."""
    logger.debug("WebSocket upgrade refused with %d: %s", refusal.status, refusal.text.strip())
    with trio.move_on_after(ANSWER_TIMEOUT):
        try:
            await stream.send_all(bytes(refusal))
            if refusal.whole:
                return
            if isinstance(stream, trio.abc.HalfCloseableStream):
                await stream.send_eof()
            thrown_away = 0
            while thrown_away < LINGER_SIZE and (data := await stream.receive_some(RECEIVE_SIZE)):
                thrown_away += len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client did not wait for it
