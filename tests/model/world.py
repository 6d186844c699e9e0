"""A broker without network, tasks or real time: whoever tests it moves the bytes and the clock.

The links are the server's own; only where bytes come from and go to is the test's. Runs inside `trio.run` with a
MockClock that nobody else moves; nothing here awaits.
"""

from __future__ import annotations

import trio
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.server.link import Link

EPOCH = 1_700_000_000.0
"""UTC seconds at which every world begins."""


class NoLane(FastLane):
    """A fast lane that takes nothing: everything goes the full path."""

    __slots__ = ()

    def handle(self, data: bytes, pos: int, now: float) -> int:
        return pos


class Wire(Link):
    """A Link whose frames are collected in `sent` until somebody takes them."""

    __slots__ = ("again", "sent")

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker, peer="wire", listener="test", connect_timeout=10)
        self.sent: list[bytes] = []
        self.again = False

    def flush(self) -> None:
        outbox = self.outbox
        self.sent += outbox.frames
        outbox.frames = []
        outbox.room = outbox.limit
        if outbox.starved and not self.ended:
            self.broker.has_room(outbox, trio.current_time())

    def take(self) -> bytes:
        """Return what the broker sent since the last call."""
        data = b"".join(self.sent)
        self.sent.clear()
        return data

    def reading_changed(self) -> None:
        pass

    def resume_soon(self) -> None:
        self.again = True


class World:
    """One broker and the time that passes for it."""

    def __init__(self, clock: trio.testing.MockClock, limits: Limits, lane: type[FastLane] = FastLane) -> None:
        self.clock = clock
        self.limits = limits
        self.lane = lane
        self.began_at = trio.current_time()
        self.broker = self.make_broker()

    def make_broker(self) -> Broker:
        """Make the broker; a restart would make another one on the same store."""
        numbers = iter(range(1_000_000))
        broker = Broker(self.limits, random_id=lambda: f"auto-{next(numbers)}", wall_offset=EPOCH - self.began_at)
        broker.connections.make_lane = self.lane
        return broker

    @property
    def now(self) -> int:
        """Seconds since the world began; the clock moves in whole ones."""
        return round(trio.current_time() - self.began_at)

    def open(self) -> Wire:
        """Open a network connection."""
        return Wire(self.broker)

    def feed(self, wire: Wire, data: bytes) -> None:
        """Let bytes of a client arrive, in one read."""
        wire.receive(data, trio.current_time())
        while wire.again:
            wire.again = False
            wire.resume(wire)
        self._flush()

    def lose(self, wire: Wire) -> None:
        """Break a network connection."""
        wire.end(None, "the network connection broke")
        self._flush()

    def _flush(self) -> None:
        self.broker.flush()
        while self.broker.run_deferred(trio.current_time()):
            self.broker.flush()

    def next_deadline(self) -> float:
        """When the broker has something to do, in seconds since the world began."""
        deadline = self.broker.next_deadline()
        return float("inf") if deadline is None else deadline - self.began_at

    def pass_to(self, now: float) -> None:
        """Let time pass, not beyond the next deadline."""
        self.clock.jump(self.began_at + now - trio.current_time())
        self.broker.run_deadlines(trio.current_time())
        self._flush()
