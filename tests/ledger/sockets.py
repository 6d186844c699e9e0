"""The simulation's world on real sockets and a real clock, beside a broker process that is killed and comes back."""

from __future__ import annotations

import heapq
import selectors
import socket
import time
from collections.abc import Callable
from typing import Final

from tests.simulation.network import Connection, Peer, World

READ: Final = 65_536
TICK: Final = 0.05
"""Seconds until a condition is looked at again when nothing happens."""


class SocketWorld(World):
    """One thread with all clients. What they do is done when it is due, as far as this thread keeps up."""

    sees_all = False
    holds = True

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.generation = 0
        """Of the broker process; a connection belongs to the one that it was opened to."""
        self.is_ending = True
        """Whether there is no broker process, or it was told to end: connections may break."""
        self.is_served = False
        """Whether a process of this generation has said a word."""
        self.is_deaf = False
        """Whether what comes is lost on the way."""
        self.heard_at = 0.0
        """When bytes of the broker came last."""
        self.connections: set[SocketConnection] = set()
        self.selector = selectors.DefaultSelector()
        self._began_at = time.monotonic()

    def open(self, peer: Peer) -> SocketConnection:
        return SocketConnection(self, peer)

    def lose_connections(self) -> None:
        """All connections are gone, with everything that is on its way."""
        for connection in list(self.connections):
            connection.cut()
        self.is_deaf = False

    def run(self, until: Callable[[], bool], limit: float) -> bool:
        """Let time pass until a condition holds; False when it does not within `limit` seconds."""
        self._look_at_clock()
        end = self.now + limit
        while not until():
            if self.now > end:
                return False
            self._step(end)
        return True

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        self.run(lambda: False, seconds)

    def _look_at_clock(self) -> None:
        self.now = time.monotonic() - self._began_at

    def _step(self, end: float) -> None:
        events = self.events
        for _ in range(len(events)):  # not those that are made meanwhile
            if events[0][0] > self.now:
                break
            heapq.heappop(events)[4]()
        self._look_at_clock()
        until = min(end + 0.001, self.now + TICK, events[0][0] if events else end)
        for key, mask in self.selector.select(max(0.0, until - self.now)):
            self._look_at_clock()
            key.data.ready(mask)
        self._look_at_clock()

    def close(self) -> None:
        """Close every socket."""
        for connection in list(self.connections):
            connection.release()
        self.selector.close()


class SocketConnection(Connection):
    """A TCP connection to the broker."""

    def __init__(self, world: SocketWorld, peer: Peer) -> None:
        super().__init__(world, peer)
        self.generation = world.generation
        self._world = world
        self._connected = self._broken = False
        self._unsent = b""
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.connect_ex(("127.0.0.1", world.port))
        self._mask = selectors.EVENT_READ | selectors.EVENT_WRITE
        world.selector.register(self._socket, self._mask, self)
        world.connections.add(self)

    def ready(self, mask: int) -> None:
        """The socket can be read or written."""
        if self.ended:
            return
        if not self._connected:
            if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._gone()
                return
            self._connected = True
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if mask & selectors.EVENT_READ and not self._world.is_deaf:
            self._read()

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone()
            return
        world = self._world
        world.heard_at = world.now
        world.is_served = world.is_served or self.generation == world.generation
        if self.attached:
            self.peer.received(self, data)

    def send(self, data: bytes) -> None:
        if self.ended or self._broken:
            return
        self._unsent += data
        if self._connected:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # what came before is read to its end, as the client may be in the middle of something
            self._broken, self._unsent = True, b""
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        if mask != self._mask and not self.ended:
            self._mask = mask
            self._world.selector.modify(self._socket, mask, self)

    def _gone(self) -> None:
        """The broker, or its process, has ended the connection."""
        world = self._world
        may_end = world.is_ending or self.generation != world.generation or not self._connected
        self.reset = self.attached and not may_end
        self.cut()

    def cut(self) -> None:
        self.release()
        if self.attached:
            self.attached = False
            self.peer.missed(self, b"")
            self.peer.closed(self)

    def close(self) -> None:
        self.cut()

    def cut_at_broker(self) -> None:
        self.cut()

    def go_silent(self) -> None:
        self.cut()

    def leave_open(self) -> None:
        self.attached = False

    def release(self) -> None:
        """Close the socket."""
        if not self.ended:
            self.ended = True
            self._world.selector.unregister(self._socket)
            self._world.connections.discard(self)
            self._socket.close()
