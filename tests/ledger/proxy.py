"""A network between our nodes and Kafka that can be cut, frozen and slowed.

One relay stands in front of each Kafka node, which tells its clients to come there (`scripts/kafka start --proxies`),
so that nothing goes around it. Faults begin and end at once, for connections that stand and for new ones.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

import attrs
import trio

CHUNK: Final = 16_384
QUEUE: Final = 64
"""Chunks of one direction that are on their way; beyond them the sender waits, as behind a full socket."""
START_LIMIT: Final = 20.0


@attrs.frozen(kw_only=True)
class Weather:
    """What the network does."""

    cut: bool = False
    """Connections are reset, new ones as soon as they come."""
    frozen: bool = False
    """Nothing passes, and nobody is told: new connections stand and are silent."""
    delay: float = 0.0
    """Seconds that everything takes in each direction."""
    rate: float = 0.0
    """Bytes per second of one direction of one connection, 0: any number."""


FAIR: Final = Weather()


class Relay:
    """What stands in front of one server. Trio thread only."""

    def __init__(self, connect: Callable[[], Awaitable[trio.abc.Stream]]) -> None:
        """`connect` opens a stream to the server; OSError: it is not there."""
        self.weather = FAIR
        self.passed = 0
        """Bytes that went through, both ways."""
        self._connect = connect
        self._changed = trio.Event()
        self._scopes: set[trio.CancelScope] = set()

    def set(self, weather: Weather) -> None:
        """Change the weather."""
        self.weather = weather
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        if weather.cut:
            for scope in list(self._scopes):
                scope.cancel()

    async def serve(self, client: trio.abc.Stream) -> None:
        """Carry one connection until either end or the weather ends it."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await self._carry(client)
            finally:
                self._scopes.discard(scope)
                await reset(client)

    async def _carry(self, client: trio.abc.Stream) -> None:
        if self.weather.cut:
            return
        await self._wait_for_thaw()
        try:
            server = await self._connect()
        except OSError:
            return
        try:
            async with trio.open_nursery() as nursery:
                for source, target in ((client, server), (server, client)):
                    nursery.start_soon(self._pump, source, target, nursery.cancel_scope)
        finally:
            await reset(server)

    async def _pump(self, source: trio.abc.Stream, target: trio.abc.Stream, ends: trio.CancelScope) -> None:
        """Carry one direction; its end is that of the connection."""
        send, receive = trio.open_memory_channel[tuple[float, bytes]](QUEUE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, source, send)
            await self._write(target, receive)
            ends.cancel()

    async def _read(self, source: trio.abc.Stream, send: trio.MemorySendChannel[tuple[float, bytes]]) -> None:
        async with send:
            try:
                while data := await source.receive_some(CHUNK):
                    await send.send((trio.current_time(), bytes(data)))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async def _write(self, target: trio.abc.Stream, receive: trio.MemoryReceiveChannel[tuple[float, bytes]]) -> None:
        async for came_at, data in receive:
            while self.weather.frozen or trio.current_time() < came_at + self.weather.delay:
                await self._wait_for_thaw()
                changed = self._changed
                with trio.move_on_at(came_at + self.weather.delay):
                    await changed.wait()
            self.passed += len(data)
            try:
                await target.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if self.weather.rate:
                await trio.sleep(len(data) / self.weather.rate)

    async def _wait_for_thaw(self) -> None:
        while self.weather.frozen:
            await self._changed.wait()


async def reset(stream: trio.abc.Stream) -> None:
    """Close a connection as a network does that lost it."""
    if isinstance(stream, trio.SocketStream):
        try:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        stream.socket.close()
    else:
        await trio.aclose_forcefully(stream)


class Network:
    """Relays on ports of this machine, in a thread with a loop of its own. Methods may be called from any thread."""

    def __init__(self, ports: Sequence[int]) -> None:
        """`ports` are those of the relays; `go` opens them."""
        self.ports = list(ports)
        self._relays: list[Relay] = []
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._error: BaseException | None = None

    def go(self, targets: Mapping[int, int]) -> None:
        """Open a relay on each port, which leads to a port of `targets`; return when all are open.

        Raises:
          OSError: a port is taken.
        """
        self._thread = threading.Thread(target=self._run, args=(dict(targets),), name="network", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_LIMIT):
            raise OSError("the relays do not open")
        if self._error is not None:
            raise self._error

    def _run(self, targets: Mapping[int, int]) -> None:
        try:
            trio.run(self._main, targets)
        except BaseException as exc:  # told to whoever waits in `go`, or in `close`
            self._error = exc
        finally:
            self._ready.set()

    async def _main(self, targets: Mapping[int, int]) -> None:
        self._token, self._stop = trio.lowlevel.current_trio_token(), trio.Event()
        async with trio.open_nursery() as nursery:
            for port in self.ports:
                relay = Relay(partial(trio.open_tcp_stream, "127.0.0.1", targets[port]))
                self._relays.append(relay)
                listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
                nursery.start_soon(trio.serve_listeners, relay.serve, listeners)
            self._ready.set()
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    def set(self, weather: Weather, index: int | None = None) -> None:
        """Change the weather at one relay, or at all of them; it has changed when this returns."""
        relays = self._relays if index is None else [self._relays[index]]

        def change() -> None:
            for relay in relays:
                relay.set(weather)
            done.set()

        done = threading.Event()
        assert self._token is not None
        self._token.run_sync_soon(change)
        done.wait()

    @property
    def passed(self) -> int:
        """Bytes that went through all relays."""
        return sum(relay.passed for relay in self._relays)

    def close(self) -> None:
        """End all connections and the thread. Idempotent."""
        if self._token is not None and self._stop is not None:
            try:
                self._token.run_sync_soon(self._stop.set)
            except trio.RunFinishedError:
                pass
        if self._thread is not None:
            self._thread.join(START_LIMIT)
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
