"""The same simulation on the whole broker: its tasks, its streams, its timers, on Trio's autojump clock."""

from __future__ import annotations

import heapq
import math

import trio
import trio.testing

from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.testing import MemoryBroker
from tests.simulation.network import MOST_EVENTS, Connection, Peer, Restless, World


class TrioWorld(World):
    """One broker in memory; the network of the simulation lies between its streams and the clients."""

    sees_all = False

    def __init__(self, memory: MemoryBroker) -> None:
        super().__init__()
        self.memory = memory
        self.began_at = trio.current_time()

    def open(self, peer: Peer) -> TrioConnection:
        return TrioConnection(self, peer)

    async def run(self) -> None:
        """Let time pass until nothing happens any more.

        Raises:
          Restless: that does not come.
        """
        for _ in range(MOST_EVENTS):
            if not self.waiting:
                await trio.testing.wait_all_tasks_blocked()  # what is in the broker's tasks becomes events
            if not self.waiting:
                return
            await trio.sleep_until(self.began_at + self.events[0][0])
            self.now, _, _, idle, action = heapq.heappop(self.events)
            self.waiting -= not idle
            action()
        raise Restless(f"{MOST_EVENTS} events, and no end")


class TrioConnection(Connection):
    """A connection whose other end is served by the broker's own tasks."""

    def __init__(self, world: TrioWorld, peer: Peer) -> None:
        super().__init__(world, peer)
        self._stream, theirs = trio.testing.memory_stream_pair()
        self._outgoing, self._to_write = trio.open_memory_channel[bytes](math.inf)
        nursery = world.memory.nursery
        nursery.start_soon(world.memory.clients.serve, theirs, ListenerOptions(type="tcp"), "memory")
        nursery.start_soon(self._write)
        nursery.start_soon(self._read)

    def arrived(self, data: bytes) -> None:
        if not self.ended:
            self._outgoing.send_nowait(data)

    def part(self) -> None:
        self._outgoing.close()

    async def _write(self) -> None:
        """Bring the client's bytes to the broker, then the end of the connection."""
        try:
            async for data in self._to_write:
                await self._stream.send_all(data)
        except trio.BrokenResourceError:
            return
        await trio.aclose_forcefully(self._stream)

    async def _read(self) -> None:
        """Take what the broker writes, to the end."""
        try:
            while data := await self._stream.receive_some(65_536):
                self.written.append(bytes(data))
                self.down.send(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.broker_ended()
