"""A broker with TLS listeners on real ports, and clients of it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from mqtt_trio.broker.access import Credentials, Decision, Granted, Principal
from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import ConnAck, Connect
from mqtt_trio.server.clients import Clients
from mqtt_trio.server.listeners import Listener, ListenerOptions, open_listener
from mqtt_trio.server.poller import Poller
from mqtt_trio.testing import TestClient

LIMIT = 30
"""Seconds that a test may take."""


class Recorder:
    """Authenticator that remembers what clients showed."""

    def __init__(self) -> None:
        self.shown: list[Credentials] = []

    def authenticate(self, credentials: Credentials) -> Decision:
        self.shown.append(credentials)
        return Granted(Principal(credentials.client_id, credentials.user_name))


@attrs.define
class Served:
    """A broker on real ports."""

    broker: Broker
    clients: Clients
    listeners: list[Listener[ListenerOptions]]
    seen: Recorder
    streams: list[trio.SocketStream] = attrs.field(factory=list)

    async def open(self, index: int = 0) -> trio.SocketStream:
        """Open a plain connection to a listener."""
        self.streams.append(await trio.open_tcp_stream("127.0.0.1", self.listeners[index].port))
        return self.streams[-1]

    async def open_tls(self, context: ssl.SSLContext, index: int = 0) -> trio.SSLStream[trio.SocketStream]:
        """Open a TLS connection and shake hands."""
        stream = trio.SSLStream(await self.open(index), context, server_hostname="localhost")
        await stream.do_handshake()
        return stream

    async def shake_hands(self, context: ssl.SSLContext, index: int = 0) -> None:
        """Shake hands and read on to the end, as a client does that speaks `ssl` without trio (alerts are sent).

        Raises:
          ssl.SSLError: what OpenSSL says.
        """
        port = self.listeners[index].port

        def talk() -> None:
            with (
                socket.create_connection(("127.0.0.1", port), LIMIT) as sock,
                context.wrap_socket(sock, server_hostname="localhost") as secure,
            ):
                while secure.recv(1000):
                    pass

        await trio.to_thread.run_sync(talk)

    async def connect(self, stream: trio.abc.Stream, client_id: str, *, version: int = 5, **fields: Any) -> TestClient:
        """Send CONNECT and wait for its CONNACK."""
        client = TestClient(stream, ProtocolVersion(version))
        await client.send(Connect(client_id=client_id, protocol_version=ProtocolVersion(version), **fields))
        client.connack = await client.expect(ConnAck)
        return client


@asynccontextmanager
async def serve(*options: ListenerOptions, limits: Limits | None = None) -> AsyncIterator[Served]:
    """Serve listeners with a poller, as the node does."""
    seen = Recorder()
    numbers = iter(range(10_000))
    broker = Broker(limits or Limits(), random_id=lambda: f"auto-{next(numbers)}", authenticator=seen)
    poller = Poller(broker)
    clients = Clients(broker, poller)
    listeners = [await open_listener(one, f"Listeners[{index}]") for index, one in enumerate(options)]
    served = Served(broker, clients, listeners, seen)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poller.run)
            for listener in listeners:
                nursery.start_soon(listener.serve, clients.serve, nursery, broker.metrics)
            try:
                yield served
            finally:
                for stream in served.streams:
                    stream.socket.close()
                for listener in listeners:
                    listener.close()
                nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something in this process that no event announces; `serve` bounds it."""
    while not condition():
        await trio.lowlevel.checkpoint()
