"""A network connection in memory that fails on command: bounded, slow, frozen, chopped, torn, cut.

A `Pipe` has two ends, which are Trio streams, and two directions, which have the faults:

    client = await memory_broker.connect("meter", pipe=PipeOptions(capacity=4096))
    client.pipe.to_client.freeze()       # the client reads nothing; the broker's writes pile up to the capacity
    client.pipe.to_broker.delay = 0.2    # what the client sends from now on takes 200 ms
    client.pipe.to_broker.cut_after(7)   # a torn write: seven more bytes, then the connection breaks
    client.pipe.cut()                    # it breaks now, and what was on its way is lost

Nothing runs in the background and nothing is random unless a seed was handed in, so a test plays the same way each
time. Times are those of Trio's clock: under `autojump_clock` a delay costs nothing.
"""

from __future__ import annotations

import enum
import math
import operator
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import attrs
import trio
from attrs.validators import ge

CAPACITY: Final = 65_536
"""Bytes that one direction holds unless told otherwise: what a socket takes from a writer whose peer does not read."""


@attrs.frozen(kw_only=True)
class PipeOptions:
    """How both directions of a pipe begin."""

    capacity: int = attrs.field(default=CAPACITY, validator=ge(1))
    """Bytes of one direction that are sent and not yet received. Outcome: the sender waits."""
    delay: float = attrs.field(default=0.0, validator=ge(0))
    """Seconds that every byte takes."""


class _End(enum.Enum):
    """What stands behind the last byte of a direction."""

    EOF = enum.auto()
    """The sender sends no more and still receives (half close)."""
    CLOSED = enum.auto()
    """The sender is gone."""
    BROKEN = enum.auto()
    """The connection broke."""


class Direction:
    """One way of a pipe. Order is kept whatever the faults; they may change at any time, and from any task."""

    def __init__(self, options: PipeOptions) -> None:
        self.delay = options.delay
        """Seconds that bytes take which are sent from now on; they never overtake earlier ones."""
        self.sent_size = 0
        """Bytes that the sender got rid of since the beginning; those that a torn write swallowed do not count."""
        self.waiting_size = 0
        """Bytes that are sent and not yet received."""
        self._capacity = options.capacity
        self._opposite = self
        self._chunks: deque[tuple[float, bytes]] = deque()
        """What is on its way: (instant of its arrival, bytes)."""
        self._end: _End | None = None
        self._end_at = math.inf
        self._frozen = False
        self._until_cut: int | None = None
        self._piece_size: Callable[[], int] | None = None
        self._lot = trio.lowlevel.ParkingLot()

    @property
    def capacity(self) -> int:
        """Bytes that may wait here; beyond it the sender waits. A lower one holds for what is sent from now on."""
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity of a pipe is 1 byte or more, not {capacity}")
        self._capacity = capacity
        self._lot.unpark_all()

    @property
    def frozen(self) -> bool:
        """Whether nothing arrives here until `thaw`."""
        return self._frozen

    def freeze(self) -> None:
        """Let nothing arrive, not even the end of the connection; the sender goes on until `capacity` is full."""
        self._frozen = True

    def thaw(self) -> None:
        """Undo `freeze`. What is due by now arrives at once, in order."""
        self._frozen = False
        self._wake()

    def chop(self, largest: int, *, seed: int | None = None) -> None:
        """Hand the receiver pieces of `largest` bytes at most, however they were written.

        With a `seed` the size of each piece is drawn from 1 to `largest`.
        """
        if largest < 1:
            raise ValueError(f"a piece has 1 byte or more, not {largest}")
        if seed is None:
            self._piece_size = lambda: largest
        else:
            draw = random.Random(seed)
            self._piece_size = lambda: draw.randint(1, largest)

    def cut_after(self, size: int) -> None:
        """Break the connection behind exactly `size` more bytes of this direction: a torn write.

        The write that crosses the border succeeds, as it does with a socket whose kernel took the bytes; the rest of
        it is lost. The receiver gets every byte in front of the border and then BrokenResourceError, the sender gets
        that with its next operation, and what is on its way to the sender is lost.
        """
        if size < 0:
            raise ValueError(f"a connection is cut after 0 bytes or more, not {size}")
        self._until_cut = size
        self._tear_if_due()

    # What the streams at its ends call

    def join(self, opposite: Direction) -> None:
        """Tell the way of the other direction (used by `Pipe`)."""
        self._opposite = opposite

    def put(self, data: memoryview) -> int:
        """Take what there is room for; return how many bytes the sender is rid of."""
        allowed = len(data) if self._until_cut is None else self._until_cut
        taken = bytes(data[: max(0, min(self._capacity - self.waiting_size, allowed))])
        if taken:
            self._chunks.append((self._arrival(), taken))
            self.waiting_size += len(taken)
            self.sent_size += len(taken)
            self._lot.unpark_all()
        if self._until_cut is not None:
            self._until_cut -= len(taken)
            if self._tear_if_due():
                return len(data)
        return len(taken)

    def has_room(self) -> bool:
        """Whether `put` would take a byte."""
        return self.waiting_size < self._capacity

    def take(self, max_bytes: int | None) -> bytes | None:
        """Return what has arrived, nothing at the end of the stream, None when the receiver has to wait.

        Raises:
          trio.BrokenResourceError: the connection broke, and all that was to arrive did.
        """
        now = trio.current_time()
        if self._frozen:
            return None
        if self._chunks:
            return self._take_chunks(max_bytes, now) if self._chunks[0][0] <= now else None
        if self._end is None or self._end_at > now:
            return None
        if self._end is _End.BROKEN:
            raise trio.BrokenResourceError("the connection was cut")
        return b""

    def _take_chunks(self, max_bytes: int | None, now: float) -> bytes:
        most = self.waiting_size if max_bytes is None else max_bytes
        if self._piece_size is not None:
            most = min(most, self._piece_size())
        parts, size = [], 0
        while self._chunks and self._chunks[0][0] <= now and size < most:
            arrival, chunk = self._chunks.popleft()
            part, rest = chunk[: most - size], chunk[most - size :]
            if rest:
                self._chunks.appendleft((arrival, rest))
            parts.append(part)
            size += len(part)
        self.waiting_size -= size
        self._wake()
        return b"".join(parts)

    async def wait_for_data(self) -> None:
        """Wait until something happened that the receiver should look at."""
        arrival = self._chunks[0][0] if self._chunks else self._end_at
        with trio.move_on_at(math.inf if self._frozen else arrival):
            await self._lot.park()

    async def wait_for_room(self) -> None:
        """Wait until something happened that the sender should look at."""
        with trio.move_on_at(self._receiver_gone_at()):
            await self._lot.park()

    def finish(self, *, closed: bool) -> None:
        """Put the end behind what was sent; `closed`: the sender does not receive any more either."""
        if self._end is not _End.BROKEN:
            self._end, self._end_at = _End.CLOSED if closed else _End.EOF, self._arrival()
            self._wake()

    def break_now(self) -> None:
        """Lose what is on its way; both ends see at once that the connection broke."""
        self._frozen = False
        self._chunks.clear()
        self.waiting_size = 0
        self._end, self._end_at = _End.BROKEN, trio.current_time()
        self._wake()

    def check_sendable(self) -> None:
        """Raise what a sender gets that can send no more: BrokenResourceError, or ClosedResourceError of its own."""
        if self._end is _End.BROKEN:
            raise trio.BrokenResourceError("the connection was cut")
        if self._end is not None:
            raise trio.ClosedResourceError("this end of the pipe has said that it sends no more")
        if self._receiver_gone_at() <= trio.current_time():
            raise trio.BrokenResourceError("the other end has closed")

    def _receiver_gone_at(self) -> float:
        """The instant at which the sender learns that the other end has closed.

        While there is room, it receives what the other end sent before: a write that fails never hides that.
        """
        back = self._opposite
        closed = back._end is _End.CLOSED and not back._frozen
        return back._end_at if closed and not (back._chunks and self.has_room()) else math.inf

    def _tear_if_due(self) -> bool:
        if self._until_cut != 0 or self._end is not None:
            return False
        self._until_cut = None
        self._end, self._end_at = _End.BROKEN, self._arrival()
        self._opposite.break_now()
        return True

    def _arrival(self) -> float:
        """The instant at which what is sent now arrives."""
        last = self._chunks[-1][0] if self._chunks else 0.0
        return max(last, trio.current_time() + self.delay)

    def _wake(self) -> None:
        """Have both ends look: at one a direction ends for the receiver, at the other for the sender."""
        self._lot.unpark_all()
        self._opposite._lot.unpark_all()


class PipeStream(trio.abc.HalfCloseableStream):
    """One end of a pipe. Bytes of one `send_all` that wait for room are sent piece by piece, as by a socket."""

    def __init__(self, pipe: Pipe, outgoing: Direction, incoming: Direction) -> None:
        self.pipe = pipe
        self._outgoing = outgoing
        self._incoming = incoming
        self._closed = False
        self._busy: set[str] = set()

    @contextmanager
    def _one_task(self, what: str) -> Iterator[None]:
        if what in self._busy:
            raise trio.BusyResourceError(f"another task is {what} at this end of the pipe")
        self._busy.add(what)
        try:
            yield
        finally:
            self._busy.discard(what)

    def _check_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this end of the pipe is closed")
        self._outgoing.check_sendable()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send; waits while the direction is full.

        Raises:
          trio.BrokenResourceError: the connection broke, or the other end is known to have closed.
        """
        with self._one_task("sending"):
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            rest = memoryview(bytes(data))
            while len(rest := rest[self._outgoing.put(rest) :]):
                await self._outgoing.wait_for_room()
                self._check_sendable()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room for a byte."""
        with self._one_task("sending"):
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            while not self._outgoing.has_room():
                await self._outgoing.wait_for_room()
                self._check_sendable()

    async def send_eof(self) -> None:
        """Half close: the other end reads the end of the stream behind what was sent, and may go on sending."""
        with self._one_task("sending"):
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("this end of the pipe is closed")
            self._outgoing.finish(closed=False)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has arrived; nothing when the other end has closed.

        Raises:
          trio.BrokenResourceError: the connection broke.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError(f"max_bytes is 1 or more, not {max_bytes}")
        with self._one_task("receiving"):
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("this end of the pipe is closed")
                if (data := self._incoming.take(max_bytes)) is not None:
                    return data
                await self._incoming.wait_for_data()

    async def aclose(self) -> None:
        """Close. What was sent still arrives; what comes from now on is not received."""
        if not self._closed:
            self._closed = True
            self._outgoing.finish(closed=True)
        await trio.lowlevel.checkpoint()


class Pipe:
    """A connection between a client and the broker."""

    def __init__(self, options: PipeOptions | None = None) -> None:
        options = options or PipeOptions()
        self.to_broker = Direction(options)
        """What the client sends."""
        self.to_client = Direction(options)
        """What the broker sends."""
        self.to_broker.join(self.to_client)
        self.to_client.join(self.to_broker)
        self.client = PipeStream(self, self.to_broker, self.to_client)
        """The client's end."""
        self.broker = PipeStream(self, self.to_client, self.to_broker)
        """The broker's end."""

    def freeze(self) -> None:
        """Freeze both directions: an unplugged cable. Neither end learns anything until `thaw`."""
        self.to_broker.freeze()
        self.to_client.freeze()

    def thaw(self) -> None:
        """Thaw both directions."""
        self.to_broker.thaw()
        self.to_client.thaw()

    def cut(self) -> None:
        """Break the connection now. What is on its way, or has not been read, is lost; both ends get
        BrokenResourceError, also out of a freeze."""
        self.to_broker.break_now()
        self.to_client.break_now()
