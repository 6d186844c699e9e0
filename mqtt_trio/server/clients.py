"""From an accepted stream to a supervised client: upgrade where it is WebSocket, Link, farewell, log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.frames import FrameDecoder
from mqtt_trio.server.link import Link
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.streams import StreamLink
from mqtt_trio.server.websocket import upgrade

if TYPE_CHECKING:
    from mqtt_trio.server.poller import Poller

logger = logging.getLogger(__name__)

REFERENCE_OVERHEAD: Final = 12
"""Bytes of a DISCONNECT around its Server Reference, at most."""


class Clients:
    """All network clients of one broker. With a poller, plain sockets are driven by it; everything else by tasks."""

    def __init__(self, broker: Broker, poller: Poller | None = None) -> None:
        self.broker = broker
        self.poller = poller
        self.links: set[Link] = set()
        self._gone = trio.Event()

    async def serve(self, stream: trio.abc.Stream, options: ListenerOptions, listener: str = "memory") -> None:
        """Serve one connection from its first byte to its last; the stream is closed in any case.

        Errors of the connection end here: nothing but Cancelled leaves.
        """
        peer = peer_of(stream)
        rest = b""
        codec = None
        try:
            if options.type == "websocket":
                upgraded = await upgrade(stream, options)
                if upgraded is None:
                    self.broker.metrics.upgrades_refused += 1
                    await trio.aclose_forcefully(stream)
                    return
                rest, codec = upgraded.rest, FrameDecoder(self.broker.limits.maximum_packet_size + 1024)
            await self._serve_link(stream, rest, codec, peer, options, listener)
        except Exception:
            logger.exception("client at %s ended by an error of the broker", peer)
            self.broker.metrics.client_failures += 1
            await trio.aclose_forcefully(stream)

    async def _serve_link(
        self,
        stream: trio.abc.Stream,
        rest: bytes,
        codec: FrameDecoder | None,
        peer: str,
        options: ListenerOptions,
        listener: str,
    ) -> None:
        timeout = options.connect_timeout
        link: Link
        if self.poller is not None and isinstance(stream, trio.SocketStream):
            from mqtt_trio.server.poller import SocketLink, take_socket

            link = SocketLink(
                self.broker,
                take_socket(stream),
                self.poller,
                peer=peer,
                listener=listener,
                connect_timeout=timeout,
                codec=codec,
            )
            self.links.add(link)
            try:
                if rest:
                    link.receive(rest, trio.current_time())
                    self.broker.flush()
                await link.supervise()
            finally:
                self._left(link)
            return
        link = StreamLink(self.broker, stream, peer=peer, listener=listener, connect_timeout=timeout, codec=codec)
        self.links.add(link)
        try:
            await link.serve(rest)
        finally:
            self._left(link)

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
