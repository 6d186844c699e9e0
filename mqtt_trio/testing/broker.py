"""A whole broker without sockets, and the fixture that gives one to a test."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import pytest
import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.events import Event
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.store import Store
from mqtt_trio.errors import LocalProtocolError
from mqtt_trio.host import Host
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import ConnAck, Connect
from mqtt_trio.server.clients import Clients
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.storage import Storage, inline
from mqtt_trio.server.timers import DeadlineTimer
from mqtt_trio.testing.client import TestClient
from mqtt_trio.testing.gateway import FakeGateway
from mqtt_trio.testing.pipe import Pipe, PipeOptions, PipeStream
from mqtt_trio.testing.websocket import WebSocketStream

EPOCH: Final = 1_700_000_000.0
"""UTC seconds at which the broker in memory believes to start."""


class MemoryBroker:
    """A broker without sockets: its connections are Pipes, its events are in a list."""

    def __init__(self, broker: Broker, clients: Clients, nursery: trio.Nursery) -> None:
        self.broker = broker
        """The broker itself: `broker.metrics` has its counters."""
        self.clients = clients
        self.nursery = nursery
        self.events: list[Event] = []
        """What happened, oldest first."""
        self.storage: Storage | None = None
        """What commits to the store, where the broker has one."""
        self.host = Host(broker, node_id="memory", instance_id=bytes(16))
        self.host.complete.set()
        """The broker as gateways see it."""

    def utc_now(self) -> float:
        """UTC seconds since the epoch, as the broker believes."""
        return trio.current_time() + self.broker.wall_offset

    async def open_pipe(self, options: PipeOptions | None = None, *, websocket: bool = False) -> Pipe:
        """Open a network connection and send nothing; `websocket`: the broker waits for an HTTP request.

        `pipe.client` is the stream for any client of your own that speaks MQTT on a Trio stream.
        """
        pipe = Pipe(options)
        listener = ListenerOptions(type="websocket" if websocket else "tcp")
        self.nursery.start_soon(self.clients.serve, pipe.broker, listener, "memory")
        return pipe

    async def open_stream(self, *, websocket: bool = False) -> PipeStream:
        """Open a network connection and return the client's end of it."""
        return (await self.open_pipe(websocket=websocket)).client

    async def open_client(
        self,
        *,
        version: ProtocolVersion = ProtocolVersion.MQTT_5_0,
        websocket: bool = False,
        pipe: PipeOptions | None = None,
    ) -> TestClient:
        """Open a network connection, over WebSocket where wanted, for a client that sends its packets itself."""
        opened = await self.open_pipe(pipe, websocket=websocket)
        stream: PipeStream | WebSocketStream = opened.client
        if websocket:
            stream = WebSocketStream(opened.client)
            await stream.upgrade()
        return TestClient(stream, ProtocolVersion(version), pipe=opened)

    async def connect(
        self,
        client_id: str = "",
        *,
        version: ProtocolVersion = ProtocolVersion.MQTT_5_0,
        websocket: bool = False,
        pipe: PipeOptions | None = None,
        **fields: Any,
    ) -> TestClient:
        """Connect a client and wait for its CONNACK (`client.connack`).

        `fields` are those of `Connect`: `clean_start`, `keep_alive`, `will`, `session_expiry_interval`, ...
        """
        client = await self.open_client(version=version, websocket=websocket, pipe=pipe)
        await client.send(Connect(client_id=client_id, protocol_version=ProtocolVersion(version), **fields))
        client.connack = await client.expect(ConnAck)
        return client

    async def stop(self) -> None:
        """End in order: say goodbye to every client, commit what is to be kept."""
        await self.clients.shut_down()
        if self.storage is not None:
            await self.storage.stop()

    async def reconnect(self, client: TestClient, **fields: Any) -> TestClient:
        """Connect again with the Client Identifier and the CONNECT of `client`, Clean Start 0, and return a new client.

        `fields` replace those of the CONNECT; `version`, `websocket` and `pipe` are those of `connect`. The broker
        takes over from a connection that is still there. A 5.0 session outlives its connection only if the CONNECT had
        a `session_expiry_interval`.
        """
        if client.connect_packet is None:
            raise LocalProtocolError("a client that never sent a CONNECT cannot reconnect")
        old = {field.name: getattr(client.connect_packet, field.name) for field in attrs.fields(Connect)}
        old |= {"client_id": client.client_id, "clean_start": False, "version": old.pop("protocol_version")}
        old["websocket"] = isinstance(client.stream, WebSocketStream)
        again = await self.connect(**(old | fields))
        again.go_on_after(client)
        return again

    def add_gateway(self, *topic_filters: str) -> FakeGateway:
        """Attach a gateway that sees what is published to `topic_filters` (everything by default)."""
        return FakeGateway(self.host, topic_filters or ("#",), clock=self.utc_now)


@asynccontextmanager
async def open_memory_broker(
    limits: Limits | None = None, *, store: Store | None = None, **options: Any
) -> AsyncIterator[MemoryBroker]:
    """Run a broker in memory; leaving the block ends it with all its clients. It assigns ids `auto-1`, `auto-2`, ...

    With a `store`, such as a `MemoryStore` that the test keeps, sessions, their queues and retained messages outlive
    the broker: hand the same one to the next broker. Leaving the block is then like a kill: what was not committed is
    gone; `MemoryBroker.stop` ends it in order. `options` are those of `Broker`: `authenticator`, `authorizer`,
    `authentication_methods`, `wall_offset` (UTC seconds at which the clock stood at 0; by default it is EPOCH when the
    broker starts), ...
    """
    numbers = itertools.count(1)
    events: list[Event] = []
    broker = Broker(
        limits or Limits(),
        random_id=lambda: f"auto-{next(numbers)}",
        events=events.append,
        journal=Journal() if store is not None else None,
        **{"wall_offset": EPOCH - trio.current_time(), **options},
    )
    storage = Storage(broker, store, inline) if store is not None else None
    if storage is not None:
        await storage.load()
    clients = Clients(broker)
    async with trio.open_nursery() as nursery:
        await nursery.start(DeadlineTimer(broker).run)
        memory = MemoryBroker(broker, clients, nursery)
        memory.events = events
        memory.storage = storage
        if storage is not None:
            nursery.start_soon(storage.run)
        yield memory
        nursery.cancel_scope.cancel()


@pytest.fixture
async def memory_broker() -> AsyncIterator[MemoryBroker]:
    """A broker in memory with default limits."""
    async with open_memory_broker() as memory:
        yield memory
