"""A broker on a real port, driven by the poller, in the test's own process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import ConnAck, Connect
from mqtt_trio.server.clients import Clients
from mqtt_trio.server.listeners import Listener, ListenerOptions, open_listener
from mqtt_trio.server.poller import Poller
from mqtt_trio.testing import TestClient

V5 = ProtocolVersion.MQTT_5_0
LIMIT = 20
"""Seconds that a test with it may take."""


class Served:
    """A broker on a real port."""

    def __init__(self, broker: Broker, clients: Clients, listener: Listener[ListenerOptions]) -> None:
        self.broker = broker
        self.clients = clients
        self.listener = listener
        self.streams: list[trio.SocketStream] = []

    async def open(self) -> trio.SocketStream:
        self.streams.append(await trio.open_tcp_stream("127.0.0.1", self.listener.port))
        return self.streams[-1]

    async def connect(self, client_id: str, version: ProtocolVersion = V5, keep_alive: int = 0) -> TestClient:
        client = TestClient(await self.open(), version)
        await client.send(Connect(client_id=client_id, protocol_version=version, keep_alive=keep_alive))
        client.connack = await client.expect(ConnAck)
        return client


@asynccontextmanager
async def serve(limits: Limits | None = None) -> AsyncIterator[Served]:
    numbers = iter(range(10_000))
    broker = Broker(limits or Limits(), random_id=lambda: f"auto-{next(numbers)}", wall_offset=1e9)
    poller = Poller(broker)
    clients = Clients(broker, poller)
    listener = await open_listener(ListenerOptions(port=0))
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poller.run)
            nursery.start_soon(listener.serve, clients.serve, nursery, broker.metrics)
            served = Served(broker, clients, listener)
            try:
                yield served
            finally:
                for stream in served.streams:
                    stream.socket.close()
                listener.close()
                nursery.cancel_scope.cancel()
