"""Where a client connects to: TCP or a Unix socket, TLS and WebSocket on top; errors say what to mend."""

from __future__ import annotations

import os
import ssl
from typing import Any, Final, cast

import attrs
import trio
import trio_websocket

from mqtt_trio.commands.failures import CommandError, ConnectionLostError, UnreachableError, printable
from mqtt_trio.protocol.wire import MAXIMUM_POSSIBLE_PACKET_SIZE

SUBPROTOCOL: Final = "mqtt"
"""[MQTT5-6.0.0-3]"""


@attrs.frozen(kw_only=True)
class TlsFiles:
    """What the TLS flags name."""

    ca_file: str | None = None
    ca_path: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    check_host_name: bool = True
    alpn: str | None = None

    def context(self) -> ssl.SSLContext:
        """Read the files; without authorities those of the operating system are trusted.

        Raises:
          CommandError: names the flag, the file and what is wrong with it.
        """
        what = f"--cafile {self.ca_file}" if self.ca_file else f"--capath {self.ca_path}"
        try:
            context = ssl.create_default_context(cafile=self.ca_file, capath=self.ca_path)
            context.check_hostname = self.check_host_name
            if self.alpn is not None:
                what = f"--tls-alpn {self.alpn}"
                context.set_alpn_protocols([self.alpn])
            if self.cert_file is not None:
                what = f"--cert {self.cert_file} with --key {self.key_file}"
                context.load_cert_chain(self.cert_file, self.key_file)
        except ssl.SSLError as exc:
            reason = (exc.reason or str(exc)).lower().replace("_", " ")
            raise CommandError(f"Error: {what}: {reason}; PEM files are expected") from None
        except (OSError, ValueError) as exc:
            raise CommandError(f"Error: {what}: {getattr(exc, 'strerror', None) or exc}") from None
        return context


@attrs.frozen(kw_only=True)
class Endpoint:
    """One server, and the way to it."""

    host: str = "localhost"
    port: int = 1883
    unix_path: str | None = None
    """A Unix socket in place of host and port."""
    bind_address: str | None = None
    tls: ssl.SSLContext | None = None
    websocket_path: str | None = None
    """Path of the WebSocket; None: MQTT without WebSocket."""

    def __str__(self) -> str:
        return self.unix_path or f"{self.host} port {self.port}"

    async def open(self, nursery: trio.Nursery) -> trio.abc.Stream:
        """Connect; the reader of a WebSocket runs in `nursery`. Cancellation closes what was opened.

        A server that answers the WebSocket request with anything but 101 makes that reader raise
        `trio_websocket.ConnectionRejected` in the nursery.

        Raises:
          UnreachableError: no connection, or no TLS on it.
        """
        stream: trio.abc.Stream = await self._open_socket()
        try:
            if self.tls is not None:
                stream = await self._encrypt(stream, self.tls)
            if self.websocket_path is not None:
                stream = await self._upgrade(stream, self.websocket_path, nursery)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    async def _open_socket(self) -> trio.SocketStream:
        try:
            if self.unix_path is not None:
                return await trio.open_unix_socket(self.unix_path)
            return await trio.open_tcp_stream(self.host, self.port, local_address=self.bind_address)
        except trio.socket.gaierror as exc:
            raise UnreachableError(f"Unable to connect to {self.host}: the host is unknown ({exc.strerror})") from None
        except (OSError, ValueError) as exc:  # ValueError: a host that no resolver takes
            raise UnreachableError(f"Error: {_why(exc)} ({self})") from None

    async def _encrypt(self, stream: trio.abc.Stream, context: ssl.SSLContext) -> trio.abc.Stream:
        secure = trio.SSLStream(stream, context, server_hostname=self.host, https_compatible=True)
        try:
            await secure.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise UnreachableError(f"Error: TLS with {self}: {_why_not_secure(exc.__cause__)}") from None
        return EncryptedStream(secure)

    async def _upgrade(self, stream: trio.abc.Stream, path: str, nursery: trio.Nursery) -> trio.abc.Stream:
        host = f"[{self.host}]" if ":" in self.host else self.host
        watched = _Watched(stream)
        websocket: trio_websocket.WebSocketConnection | None = None
        async with trio.open_nursery() as racing:
            racing.start_soon(watched.cancel_at_end, racing.cancel_scope)
            websocket = await trio_websocket.wrap_client_stream(
                nursery,
                cast("trio.SocketStream", watched),  # any Stream will do; its annotation is narrower
                f"{host}:{self.port}",
                path,
                subprotocols=[SUBPROTOCOL],
                max_message_size=MAXIMUM_POSSIBLE_PACKET_SIZE,
                receive_buffer_size=65_536,
            )
            racing.cancel_scope.cancel()
        if websocket is None:
            raise UnreachableError(f"Error: {self} closed the connection instead of answering as a WebSocket")
        return WebSocketStream(websocket, stream)


class _Watched(trio.abc.Stream):
    """Tells of the end of a stream: trio-websocket would wait on for an answer to its request."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._ended = trio.Event()

    async def cancel_at_end(self, scope: trio.CancelScope) -> None:
        await self._ended.wait()
        scope.cancel()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = b""
        try:
            data = bytes(await self._stream.receive_some(max_bytes))
        finally:
            if not data:
                self._ended.set()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class EncryptedStream(trio.abc.Stream):
    """A trio SSLStream whose failures say what TLS said; an end without close_notify is an end."""

    def __init__(self, stream: trio.SSLStream[Any]) -> None:
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as exc:
            if isinstance(exc.__cause__, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                return b""
            if isinstance(exc.__cause__, ssl.SSLError):  # TLS 1.3 servers refuse a client certificate only here
                raise ConnectionLostError(f"Error: {_why_not_secure(exc.__cause__)}") from None
            raise

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class WebSocketStream(trio.abc.Stream):
    """The bytes in the binary messages of a WebSocket; their bounds mean nothing [MQTT5-6.0.0-2]."""

    def __init__(self, websocket: trio_websocket.WebSocketConnection, stream: trio.abc.Stream) -> None:
        self._websocket = websocket
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return the next message, whatever `max_bytes` is.

        Raises:
          ConnectionLostError: a text message, or a close frame that names a mistake.
        """
        del max_bytes
        while True:
            try:
                message = await self._websocket.get_message()
            except trio_websocket.ConnectionClosed as exc:
                _check_reason(exc)
                return b""
            if isinstance(message, str):
                raise ConnectionLostError("Error: the server sent text over the WebSocket")  # [MQTT5-6.0.0-1]
            if message:
                return message

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._websocket.send_message(bytes(data))
        except trio_websocket.ConnectionClosed as exc:
            _check_reason(exc)
            raise trio.BrokenResourceError("the WebSocket is closed") from None

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once: the WebSocket does not know."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Say close and close; the WebSocket alone would leave the closing to a server that closed first."""
        try:
            await self._websocket.aclose()
        finally:
            await trio.aclose_forcefully(self._stream)


def _check_reason(exc: trio_websocket.ConnectionClosed) -> None:
    """Raise ConnectionLostError where the server's close frame names a mistake."""
    if exc.reason is not None and exc.reason.code not in (1000, 1001, 1005, 1006):
        said = printable(f"{exc.reason.code} {exc.reason.reason or ''}".rstrip())
        raise ConnectionLostError(f"Error: the WebSocket was closed: {said}")


def _why(exc: OSError | ValueError) -> str:
    """Say why a connection was not made; trio groups the attempts at several addresses."""
    cause = exc.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    found = cause if isinstance(cause, OSError) else exc
    return os.strerror(found.errno) if isinstance(found, OSError) and found.errno else str(found)


def _why_not_secure(exc: BaseException | None) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        mend = " (--cafile names the authority that signed it)" if "issuer" in exc.verify_message else ""
        return f"the certificate of the server is refused: {exc.verify_message}{mend}"
    if isinstance(exc, ssl.SSLEOFError):
        return "the server closed the connection in the handshake; the port may not speak TLS"
    if isinstance(exc, ssl.SSLError):
        reason = exc.reason or str(exc)
        if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "the port does not speak TLS"
        return reason.lower().replace("_", " ")
    return f"the connection broke ({_why(exc) if isinstance(exc, OSError) else exc}); the port may not speak TLS"
