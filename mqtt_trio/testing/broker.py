"""A whole broker without sockets, and the fixture that gives one to a test."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.events import Event
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import ConnAck, Connect, Will
from mqtt_trio.server.clients import Clients
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.timers import DeadlineTimer
from mqtt_trio.testing.client import TestClient

EPOCH: Final = 1_700_000_000.0
"""UTC seconds at which the broker in memory believes to start."""


class MemoryBroker:
    """A broker without sockets; `connect` is its only listener."""

    def __init__(self, broker: Broker, clients: Clients, nursery: trio.Nursery) -> None:
        self.broker = broker
        self.clients = clients
        self.nursery = nursery
        self.events: list[Event] = []

    async def open_stream(self, *, websocket: bool = False) -> trio.StapledStream[Any, Any]:
        """Open a raw connection to the broker: one end of a pair of memory streams."""
        ours, theirs = trio.testing.memory_stream_pair()
        options = ListenerOptions(type="websocket" if websocket else "tcp")
        self.nursery.start_soon(self.clients.serve, theirs, options, "memory")
        return ours

    async def connect(
        self,
        client_id: str = "",
        *,
        version: ProtocolVersion = ProtocolVersion.MQTT_5_0,
        clean_start: bool = True,
        keep_alive: int = 0,
        will: Will | None = None,
        **fields: Any,
    ) -> TestClient:
        """Connect a client and wait for its CONNACK (`client.connack`); `fields` are those of `Connect`."""
        client = TestClient(await self.open_stream(), ProtocolVersion(version))
        await client.send(
            Connect(
                client_id=client_id,
                protocol_version=ProtocolVersion(version),
                clean_start=clean_start,
                keep_alive=keep_alive,
                will=will,
                **fields,
            )
        )
        client.connack = await client.expect(ConnAck)
        return client


@asynccontextmanager
async def open_memory_broker(limits: Limits | None = None, **options: Any) -> AsyncIterator[MemoryBroker]:
    """Run a broker in memory; leaving the block ends it with all its clients. It assigns ids `auto-1`, `auto-2`, ...

    `options` are those of `Broker`: `authenticator`, `authorizer`, `authentication_methods`, ...
    """
    numbers = itertools.count(1)
    events: list[Event] = []
    broker = Broker(
        limits or Limits(),
        random_id=lambda: f"auto-{next(numbers)}",
        wall_offset=EPOCH - trio.current_time(),
        events=events.append,
        **options,
    )
    clients = Clients(broker)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(DeadlineTimer(broker).run)
        memory = MemoryBroker(broker, clients, nursery)
        memory.events = events
        yield memory
        nursery.cancel_scope.cancel()


@pytest.fixture
async def memory_broker() -> AsyncIterator[MemoryBroker]:
    """A broker in memory with default limits."""
    async with open_memory_broker() as memory:
        yield memory
