"""Plain sockets on one level-triggered epoll (Linux): one task reads every ready client, then flushes each once.

A client costs no epoll_ctl and no task switch per message; its own task only supervises. Whatever goes wrong while
its bytes are handled ends that client and nobody else.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final

import trio
from trio.lowlevel import wait_readable

from mqtt_trio.broker.broker import Broker
from mqtt_trio.protocol.frames import FrameDecoder, frame
from mqtt_trio.server.link import Link
from mqtt_trio.server.sockets import HoldingSocket, ReceiveBuffer

EPOLLIN: Final = select.EPOLLIN
RECEIVE_SIZE: Final = 262_144
"""Bytes read from one client in one wake, at most."""
SMALL_RECEIVE_SIZE: Final = 32_768
"""Bytes asked of a client that sends little. The C library maps and unmaps a larger buffer for each read, which
interrupts the other core each time when a thread of the store or of a gateway is busy there: 15 µs instead of 2."""
EVENTS: Final = 512
"""Clients served in one wake; the others are ready at the next one."""
BACKLOG_FACTOR: Final = 2
"""A backlog beyond this many OutboxBytes, a read and the largest packet ends the client: only answers to its own
packets can make it so large."""


class SocketLink(Link):
    """A Link on a non-blocking socket that the Poller watches."""

    __slots__ = ("_drained", "backlog", "fd", "poller", "receive_size", "sock")

    def __init__(
        self,
        broker: Broker,
        sock: socket.socket | HoldingSocket,
        poller: Poller,
        *,
        peer: str,
        listener: str,
        connect_timeout: float,
        codec: FrameDecoder | None = None,
    ) -> None:
        super().__init__(broker, peer=peer, listener=listener, connect_timeout=connect_timeout, codec=codec)
        self.sock = sock
        self.fd = sock.fileno()
        self.receive_size = SMALL_RECEIVE_SIZE
        self.poller = poller
        self.backlog: bytearray | None = None
        """Bytes that the socket would not take."""
        self._drained: trio.Event | None = None
        poller.add(self)

    def flush(self) -> None:
        """Send the outbox in one call; what the socket does not take waits for the poller."""
        outbox = self.outbox
        frames = outbox.frames
        if not frames:
            return
        outbox.frames = []
        if self.broken is not None:
            return
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        if self.codec is not None:
            data = frame(data)
        try:
            self._send(data)
            if self.backlog is None and self.broken is None:
                outbox.room = outbox.limit
                if outbox.starved and not self.ended:
                    self.broker.has_room(outbox, trio.current_time())
        except Exception as exc:
            self.failed(exc)

    def send_raw(self, data: bytes) -> None:
        """Send bytes at once, or behind the backlog."""
        if self.outbox.frames:
            self.flush()
        self._send(data)

    def _send(self, data: bytes) -> None:
        if self.backlog is not None:
            self.backlog += data
            self._bound_backlog()
            return
        if self.broken is not None:
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._broke(f"sending failed: {exc.strerror}")
            return
        self.broker.metrics.bytes_sent += sent
        if sent < len(data):
            self.backlog = bytearray(memoryview(data)[sent:])
            self.outbox.room = self.outbox.limit - len(self.backlog)
            self.poller.watch(self)
            self._bound_backlog()

    def _bound_backlog(self) -> None:
        bound = BACKLOG_FACTOR * self.outbox.limit + RECEIVE_SIZE + self.broker.limits.maximum_packet_size
        if self.backlog is not None and len(self.backlog) > bound:
            self._send_no_more()
            self.end_unread()
            self.outbox.frames = []

    def _give_up(self, text: str) -> None:
        """Nothing can or may be sent any more, and nothing is there to be read."""
        self._send_no_more()
        self.end(None, text)
        self.outbox.frames = []

    def _broke(self, text: str) -> None:
        """Nothing can be sent any more. The client's own task reads the rest; the socket would be ready for ever."""
        self._send_no_more()
        self.poller.remove(self)
        self.sending_failed(text)

    def _send_no_more(self) -> None:
        self.backlog = None
        self.outbox.frames = []
        if self._drained is not None:
            self._drained.set()

    def write_backlog(self) -> None:
        """The socket takes bytes again."""
        backlog = self.backlog
        if backlog is None:
            return
        sent = self.sock.send(backlog)
        self.broker.metrics.bytes_sent += sent
        self.outbox.room += sent
        if sent < len(backlog):
            del backlog[:sent]
            return
        self.backlog = None
        self.outbox.room = self.outbox.limit
        self.poller.watch(self)
        if self._drained is not None:
            self._drained.set()
        if self.outbox.starved and not self.ended:
            self.broker.has_room(self.outbox, trio.current_time())

    def read(self, now: float) -> bool:
        """Read once and handle it; False when there was nothing."""
        try:
            size = self.receive_size
            data = self.sock.recv(size)
            if len(data) == size:
                self.receive_size = RECEIVE_SIZE
            elif len(data) < SMALL_RECEIVE_SIZE // 2:
                self.receive_size = SMALL_RECEIVE_SIZE
            if data:
                self.receive(data, now)
                return True
            self.end(None, "the client closed the network connection")
        except BlockingIOError:
            pass
        except OSError as exc:
            self._give_up(f"the network connection broke: {exc.strerror}")
        except Exception as exc:
            self.failed(exc)
        return False

    def ready(self, event: int, now: float) -> None:
        """Serve an epoll event that is more than input."""
        if event & select.EPOLLOUT:
            try:
                self.write_backlog()
            except BlockingIOError:
                pass
            except OSError as exc:
                self._broke(f"sending failed: {exc.strerror}")
                return
            except Exception as exc:
                self.failed(exc)
        if not event & ~select.EPOLLOUT:
            return
        if not self.ended and not self.paused:
            self.read(now)
        elif event & (select.EPOLLHUP | select.EPOLLERR):
            self._broke("the network connection broke")  # nobody reads it, so that it would come back at once

    def reading_changed(self) -> None:
        self.poller.watch(self)

    def resume_soon(self) -> None:
        self.poller.resume_soon(self)

    async def read_more(self) -> bool:
        await trio.lowlevel.checkpoint()
        if self.ended or self.paused:
            return False
        found = self.read(trio.current_time())
        self.broker.flush()
        return found

    async def drained(self) -> None:
        """Wait until the backlog has left."""
        await trio.lowlevel.checkpoint()
        while self.backlog is not None:
            self._drained = trio.Event()
            await self._drained.wait()

    def release(self) -> None:
        self.poller.remove(self)
        self.sock.close()


class _Alarm:
    """Ends the Poller's sleep when another task has something for it."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def read(self, now: float) -> None:
        """Be silent again."""
        os.eventfd_read(self.fd)

    def ready(self, event: int, now: float) -> None:
        """Only input comes."""


class Poller:
    """The one task that reads from and writes to plain sockets."""

    def __init__(self, broker: Broker, *, beside_threads: bool = False) -> None:
        """`beside_threads`: threads of the same process compute while clients are served."""
        self.broker = broker
        self.epoll = select.epoll()
        self._buffer = ReceiveBuffer() if beside_threads else None
        self.links: dict[int, SocketLink | _Alarm] = {}
        """By file descriptor, also what wakes the task."""
        self._alarm: _Alarm | None = None
        """While the task runs."""
        self.again: list[SocketLink] = []
        """Links that have read more than they could handle in one wake."""

    def take_socket(self, stream: trio.SocketStream) -> socket.socket | HoldingSocket:
        """Take the socket out of a trio stream, which is closed; the connection stays open."""
        sock = socket.socket(fileno=os.dup(stream.socket.fileno()))
        stream.socket.close()
        sock.setblocking(False)
        return sock if self._buffer is None else HoldingSocket(sock, self._buffer)

    def add(self, link: SocketLink) -> None:
        """Watch a link from now on."""
        self.links[link.fd] = link
        self.epoll.register(link.fd, select.EPOLLIN)

    def remove(self, link: SocketLink) -> None:
        """Watch a link no more. Idempotent."""
        if self.links.get(link.fd) is link:
            del self.links[link.fd]
            self.epoll.unregister(link.fd)

    def watch(self, link: SocketLink) -> None:
        """Watch for what the link needs now: input unless paused or ended, room while there is a backlog."""
        if self.links.get(link.fd) is link:
            reading = 0 if link.paused or link.ended else select.EPOLLIN
            writing = 0 if link.backlog is None else select.EPOLLOUT
            self.epoll.modify(link.fd, reading | writing)

    def resume_soon(self, link: SocketLink) -> None:
        """Resume a link once everybody else has had their turn."""
        if not self.again and self._alarm is not None:
            self._alarm.ring()  # whoever handled its bytes need not be this task
        self.again.append(link)

    async def run(self) -> None:
        """Serve until cancelled."""
        epoll, links, broker = self.epoll, self.links, self.broker
        fd = epoll.fileno()
        self._alarm = alarm = _Alarm()
        links[alarm.fd] = alarm
        epoll.register(alarm.fd, EPOLLIN)
        try:
            while True:
                if self.again:
                    await trio.lowlevel.checkpoint()
                else:
                    await wait_readable(fd)
                now = trio.current_time()
                again, self.again = self.again, []
                for link in again:
                    link.resume(link)
                for link_fd, event in epoll.poll(0, EVENTS):
                    # An earlier event of the same wake may have ended this one.
                    ready = links.get(link_fd)
                    if ready is None:
                        continue
                    if event == EPOLLIN:
                        ready.read(now)
                    else:
                        ready.ready(event, now)
                broker.flush()
        finally:
            links.clear()  # their tasks may still end them
            epoll.close()
            self._alarm = None
            os.close(alarm.fd)
