"""The same Link on any trio Stream: TLS, memory streams in tests, later Unix sockets."""

from __future__ import annotations

from typing import Final

import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.protocol.frames import FrameDecoder
from mqtt_trio.server.link import CLOSE_GRACE, Link

RECEIVE_SIZE: Final = 65_536
READER_TURNS: Final = 4
"""Rounds of all tasks in which a reader, with TLS in between, notices what has arrived."""


class StreamLink(Link):
    """A Link with a reader and a writer task; `serve` is the client's supervising task."""

    __slots__ = ("_again", "_idle", "_reads", "_resumed", "_sending", "_wake", "raw", "stream")

    def __init__(
        self,
        broker: Broker,
        stream: trio.abc.Stream,
        *,
        peer: str,
        listener: str,
        connect_timeout: float,
        codec: FrameDecoder | None = None,
    ) -> None:
        super().__init__(broker, peer=peer, listener=listener, connect_timeout=connect_timeout, codec=codec)
        self.stream = stream
        self.raw: list[bytes] = []
        """WebSocket control frames that wait."""
        self._wake = trio.Event()
        self._idle = trio.Event()
        self._resumed = trio.Event()
        self._again = False
        """The reader is to resume the link itself."""
        self._reads = 0
        self._sending = 0
        """Bytes that the writer has taken and the stream has not."""

    async def serve(self, rest: bytes = b"") -> None:
        """Drive the connection to its end; `rest` are bytes that were read before. Closes the stream."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, rest)
                nursery.start_soon(self._write)
                await self.supervise()
                nursery.cancel_scope.cancel()
            if not self._sending:  # the client reads: it is told the end of the stream where there is one (TLS)
                with trio.move_on_after(CLOSE_GRACE):
                    await self.stream.aclose()
        finally:
            await trio.aclose_forcefully(self.stream)

    async def _read(self, rest: bytes) -> None:
        data: bytes | bytearray = rest
        try:
            while not self.ended:
                if data:
                    self._reads += 1
                    self._receive(bytes(data))
                while self.paused and not self.ended:
                    await self._wait_for_resume()
                data = await self.stream.receive_some(RECEIVE_SIZE)
                if not data:
                    self.end(None, "the client closed the network connection")
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
            self.end(None, f"the network connection broke: {exc}")
        self.broker.flush()

    async def _wait_for_resume(self) -> None:
        if self._again:
            self._again = False
            await trio.lowlevel.checkpoint()
            self.resume(self)
            self.broker.flush()
        else:
            self._resumed = trio.Event()
            await self._resumed.wait()

    def _receive(self, data: bytes) -> None:
        try:
            self.receive(data, trio.current_time())
        except Exception as exc:
            self.failed(exc)
        self.broker.flush()

    async def _write(self) -> None:
        outbox = self.outbox
        try:
            while True:
                while not outbox.frames and not self.raw:
                    self._idle.set()
                    self._wake = trio.Event()
                    await self._wake.wait()
                frames, outbox.frames = outbox.frames, []
                raw, self.raw = self.raw, []
                data = (self.wrap(b"".join(frames)) if frames else b"") + b"".join(raw)
                del frames, raw  # a client that does not read keeps one copy alive, not two
                self._sending = len(data)
                await self.stream.send_all(data)
                self.broker.metrics.bytes_sent += len(data)
                self._sending = 0
                outbox.room = outbox.limit - sum(map(len, outbox.frames)) - sum(map(len, self.raw))
                if outbox.starved and not self.ended:
                    self.broker.has_room(outbox, trio.current_time())
                    self.broker.flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
            outbox.frames, self.raw, self._sending = [], [], 0
            self._idle.set()
            self.sending_failed(f"sending failed: {exc}")

    def flush(self) -> None:
        """Wake the writer; a client that does not read the answers to its own packets is ended."""
        if self.broken is not None:
            self.outbox.frames = []
            return
        # A message may be larger than the room it found: it alone is no reason.
        if self.outbox.room < -self.outbox.limit - self.broker.limits.maximum_packet_size:
            self.outbox.frames, self.raw = [], []
            self.end_unread()
        self._wake.set()

    def send_raw(self, data: bytes) -> None:
        if self.broken is not None:
            return
        self.raw.append(data)
        self.outbox.room -= len(data)
        self.flush()

    def reading_changed(self) -> None:
        if self.ended or not self.paused:
            self._resumed.set()

    def resume_soon(self) -> None:
        self._again = True
        self._resumed.set()

    async def read_more(self) -> bool:
        """Let the reader run first."""
        before = self._reads
        for _ in range(READER_TURNS):
            await trio.lowlevel.checkpoint()
            if self._reads != before:
                return True
        return False

    async def drained(self) -> None:
        """Wait until the writer has nothing left."""
        await trio.lowlevel.checkpoint()
        while self.outbox.frames or self.raw or self._sending:
            self._idle = trio.Event()
            await self._idle.wait()

    def release(self) -> None:
        self._resumed.set()
