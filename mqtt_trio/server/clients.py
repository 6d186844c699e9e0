"""From an accepted stream to a supervised client: TLS, upgrade where it is WebSocket, Link, farewell, log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import attrs
import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.frames import FrameDecoder
from mqtt_trio.server.link import Link
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.streams import StreamLink
from mqtt_trio.server.tls import TlsFailure, TlsServer, TlsStream
from mqtt_trio.server.websocket import upgrade

if TYPE_CHECKING:
    from mqtt_trio.server.poller import Poller

logger = logging.getLogger(__name__)

REFERENCE_OVERHEAD: Final = 12
"""Bytes of a DISCONNECT around its Server Reference, at most."""


@attrs.define
class _Arrival:
    """What is known of a connection before it has its Link."""

    peer: str
    listener: str
    options: ListenerOptions
    at: float
    """Monotonic instant at which it was accepted."""
    certificate_subject: str | None = None
    codec: FrameDecoder | None = None
    rest: bytes = b""
    """Bytes of MQTT (in WebSocket frames) that have been read already."""

    @property
    def deadline(self) -> float:
        return self.at + self.options.connect_timeout


class Clients:
    """All network clients of one broker. With a poller, plain sockets are driven by it; everything else by tasks."""

    def __init__(self, broker: Broker, poller: Poller | None = None) -> None:
        self.broker = broker
        self.poller = poller
        self.links: set[Link] = set()
        self._gone = trio.Event()

    async def serve(
        self,
        stream: trio.abc.Stream,
        options: ListenerOptions,
        listener: str = "memory",
        tls: TlsServer | None = None,
    ) -> None:
        """Serve one connection from its first byte to its last; the stream is closed in any case.

        TLS handshake, WebSocket request and CONNECT share one `options.connect_timeout`. Errors of the connection end
        here: nothing but Cancelled leaves.
        """
        arrival = _Arrival(peer_of(stream), listener, options, trio.current_time())
        try:
            if tls is not None:
                secured = await self._secure(stream, tls, arrival)
                if secured is None:
                    return
                stream = secured
            if options.type == "websocket":
                upgraded = await upgrade(stream, options, deadline=arrival.deadline, peer=arrival.peer)
                if upgraded is None:
                    self.broker.metrics.upgrades_refused += 1
                    return
                arrival.rest = upgraded.rest
                arrival.codec = FrameDecoder(self.broker.limits.maximum_packet_size + 1024)
            await self._serve_link(stream, arrival)
        except Exception:
            logger.exception("client at %s ended by an error of the broker", arrival.peer)
            self.broker.metrics.client_failures += 1
        finally:
            await trio.aclose_forcefully(stream)

    async def _secure(self, stream: trio.abc.Stream, tls: TlsServer, arrival: _Arrival) -> TlsStream | None:
        """Shake hands; None when that failed, which is logged and counted."""
        reason = f"no end of it within {arrival.options.connect_timeout:g} s"
        with trio.move_on_at(arrival.deadline):
            try:
                secured = await tls.handshake(stream)
            except TlsFailure as exc:
                reason = str(exc)
            else:
                arrival.certificate_subject = secured.certificate_subject
                return secured
        self.broker.metrics.handshakes_failed += 1
        logger.info("TLS handshake of %s at %s failed: %s", arrival.peer, arrival.listener, reason)
        return None

    async def _serve_link(self, stream: trio.abc.Stream, arrival: _Arrival) -> None:
        link = self._make_link(stream, arrival)
        link.opened_at = arrival.at  # what came before the CONNECT is part of its ConnectTimeout
        link.certificate_subject = arrival.certificate_subject
        self.links.add(link)
        try:
            if isinstance(link, StreamLink):
                await link.serve(arrival.rest)
                return
            if arrival.rest:
                link.receive(arrival.rest, trio.current_time())
                self.broker.flush()
            await link.supervise()
        finally:
            self._left(link)

    def _make_link(self, stream: trio.abc.Stream, arrival: _Arrival) -> Link:
        peer, listener, codec = arrival.peer, arrival.listener, arrival.codec
        timeout = arrival.options.connect_timeout
        if self.poller is not None and isinstance(stream, trio.SocketStream):
            from mqtt_trio.server.poller import SocketLink

            return SocketLink(
                self.broker,
                self.poller.take_socket(stream),
                self.poller,
                peer=peer,
                listener=listener,
                connect_timeout=timeout,
                codec=codec,
            )
        return StreamLink(self.broker, stream, peer=peer, listener=listener, connect_timeout=timeout, codec=codec)

    def _left(self, link: Link) -> None:
        self.links.discard(link)
        if not self.links:
            self._gone.set()
        if logger.isEnabledFor(logging.DEBUG):
            reason = link.end_reason.name if link.end_reason is not None else ""
            logger.debug("connection of %s ended: %s %s", link.peer, reason, link.end_text)

    async def shut_down(self, server_reference: str | None = None) -> None:
        """Say goodbye to everybody and wait until all are gone; bounded by the caller's cancel scope [K18].

        `server_reference` sends 5.0 clients to another server for the time being [MQTT5-4.11].
        """
        size = len((server_reference or "").encode()) + REFERENCE_OVERHEAD
        for link in list(self.links):
            v5 = link.connection.protocol_version == ProtocolVersion.MQTT_5_0
            if server_reference and v5 and size <= link.outbox.maximum_packet_size:
                link.end(ReasonCode.USE_ANOTHER_SERVER, "the server shuts down", server_reference)
            else:
                link.end(ReasonCode.SERVER_SHUTTING_DOWN, "the server shuts down")
        self.broker.flush()
        while self.links:
            self._gone = trio.Event()
            await self._gone.wait()


def peer_of(stream: trio.abc.Stream) -> str:
    """Name the other end for logs: host:port of a socket, `memory` for a stream in memory."""
    if isinstance(stream, trio.SocketStream):
        try:
            address = stream.socket.getpeername()
        except OSError:
            return "unknown"
        if isinstance(address, tuple):
            return f"{address[0]}:{address[1]}"
        return str(address) or "unix"
    return "memory"
