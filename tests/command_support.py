"""Commands in tests: a terminal without a terminal, sessions with the broker in memory or with a script of bytes."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio
import trio.testing

from mqtt_trio.commands.client import Session
from mqtt_trio.commands.runner import Terminal
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import Connect
from mqtt_trio.testing import MemoryBroker
from tests.wire import Wire

V5 = ProtocolVersion.MQTT_5_0
CONNACK = b"\x20\x03\x00\x00\x00"
"""5.0, success, no properties."""


@attrs.define(kw_only=True, slots=False)
class FakeTerminal(Terminal):
    """Remembers what it is told; `give` and `end` are the other side of standard input."""

    said: list[str] = attrs.field(factory=list)
    written: bytes = b""
    broken: OSError | None = None
    """Raised by the next write."""
    changed: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self._give, self._take = trio.open_memory_channel[bytes](0)

    def say(self, text: str) -> None:
        self.said.append(text)

    async def read(self) -> bytes:
        try:
            return await self._take.receive()
        except trio.EndOfChannel:
            return b""

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken is not None:
            raise self.broken
        self.written += data
        self.changed.set()
        self.changed = trio.Event()

    async def give(self, data: bytes) -> None:
        """Return when somebody has read it."""
        await self._give.send(data)

    def end(self) -> None:
        self._give.close()

    async def until_written(self, count: int) -> list[bytes]:
        """Wait for `count` lines on standard output; return them."""
        while self.written.count(b"\n") < count:
            await self.changed.wait()
        return self.written.splitlines()


def session_with(memory: MemoryBroker, client_id: str = "cli", *, websocket: bool = False, **fields: Any) -> Session:
    """A session with the broker in memory; `fields` are those of Connect."""

    async def open_stream(_nursery: trio.Nursery) -> trio.abc.Stream:
        return await memory.open_stream(websocket=websocket)

    fields.setdefault("protocol_version", V5)
    return Session(opener=open_stream, where="memory", connect=Connect(client_id=client_id, **fields))


@attrs.define
class Server:
    """A server whose every word the test says; each connection is handed to `serve`."""

    nursery: trio.Nursery
    serve: Callable[[Wire], Awaitable[None]]
    connections: int = 0

    async def open(self, _nursery: trio.Nursery) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        self.connections += 1
        self.nursery.start_soon(self.serve, Wire(theirs))
        return ours

    def session(self, client_id: str = "cli", **fields: Any) -> Session:
        fields.setdefault("protocol_version", V5)
        return Session(opener=self.open, where="script", connect=Connect(client_id=client_id, **fields))


def pid_free(text: str) -> str:
    """Replace the process id, which Client Identifiers may contain."""
    return text.replace(str(os.getpid()), "PID")
