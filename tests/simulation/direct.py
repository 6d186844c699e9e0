"""The broker without sockets and tasks: the server's own links, moved by the events of the simulation."""

from __future__ import annotations

import heapq
from typing import Final

import trio
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.server.link import Link
from tests.simulation.network import MOST_EVENTS, Connection, Peer, Restless, World

EPOCH: Final = 1_700_000_000.0


class NoLane(FastLane):
    """A fast lane that takes nothing: everything goes the full path."""

    __slots__ = ()

    def handle(self, data: bytes, pos: int, now: float) -> int:
        return pos


class DirectWorld(World):
    """One broker. Runs inside `trio.run` with a MockClock that nobody else moves, for links look at Trio's clock."""

    def __init__(self, clock: trio.testing.MockClock, limits: Limits, lane: type[FastLane]) -> None:
        super().__init__()
        self.clock = clock
        self.limits = limits
        self.lane = lane
        self.began_at = trio.current_time()
        self.keep_alive_timeouts = 0
        self.most_queued = 0
        """Messages that waited in queues at the same time."""
        self.broker = self.make_broker()

    def make_broker(self) -> Broker:
        """Make the broker."""
        numbers = iter(range(1_000_000))
        broker = Broker(self.limits, random_id=lambda: f"auto-{next(numbers)}", wall_offset=EPOCH - self.began_at)
        broker.connections.make_lane = self.lane
        return broker

    def settle(self) -> None:
        """Send what is to be sent."""
        if self.broker.touched:
            self.broker.flush()

    def excuses(self, reason_code: ReasonCode | None) -> bool:
        """Whether the broker may end a connection with this reason, although its client did nothing."""
        return False

    def open(self, peer: Peer) -> DirectConnection:
        return DirectConnection(self, peer)

    def run(self) -> None:
        """Let time pass until nothing happens any more.

        Raises:
          Restless: that does not come.
        """
        events, clock = self.events, self.clock
        for _ in range(MOST_EVENTS):
            if not self.waiting:
                return
            at, _, _, idle, action = heapq.heappop(events)
            self.waiting -= not idle
            if at > self.now:
                clock.jump(at - self.now)
                self.now = at
            action()
            self.settle()
            if self.broker.metrics.messages_queued > self.most_queued:
                self.most_queued = self.broker.metrics.messages_queued
        raise Restless(f"{MOST_EVENTS} events, and no end")


class DirectConnection(Connection):
    """A connection whose other end is a link without a driver."""

    def __init__(self, world: DirectWorld, peer: Peer) -> None:
        super().__init__(world, peer)
        self.link = SimulatedLink(world, self)
        self.dead = False
        """The broker was killed."""

    def arrived(self, data: bytes) -> None:
        self.link.receive(data, trio.current_time())

    def taken(self, size: int) -> None:
        if not self.dead:
            self.link.in_socket -= size
            self.link.fill_socket()

    def part(self) -> None:
        if not self.dead:
            self.link.backlog = b""
            self.link.end(None, "the network connection is gone")

    def killed(self, *, arrives: bool) -> None:
        """The broker is no more. What it had sent still arrives, or nothing does; what it had not is lost."""
        self.dead = True
        self.up.lose()
        self.link.backlog = b""
        self.link.outbox.frames = []
        if self.ended:
            return
        self.ended = True
        if not self.attached:
            self._settle()
        elif arrives:
            self.down.then(self.hang_up)
        else:
            self.down.lose()
            self.hang_up()

    def unwritten(self) -> list[bytes]:
        return self.link.outbox.frames


class SimulatedLink(Link):
    """The server's Link; its socket holds `Habits.socket_bytes`, what it does not take stays in the broker."""

    __slots__ = ("backlog", "in_socket", "network", "world")

    def __init__(self, world: DirectWorld, network: DirectConnection) -> None:
        super().__init__(world.broker, peer=network.peer.name, listener="simulation", connect_timeout=10)
        self.world = world
        self.network = network
        habits = network.peer.habits
        self.outbox.limit = self.outbox.room = habits.outbox_bytes
        self.backlog = b""
        self.in_socket = 0
        if habits.keep_alive:
            world.after(habits.keep_alive, network.peer.number, self._look_at_silence, idle=True)

    def flush(self) -> None:
        frames = self.outbox.frames
        if frames:
            data = b"".join(frames)
            self.outbox.frames = []
            self.network.written.append(data)
            self.backlog += data
        self.fill_socket()

    def fill_socket(self) -> None:
        """Send what the socket takes; the rest takes room in the outbox, as in `poller.SocketLink`."""
        network, outbox = self.network, self.outbox
        if self.backlog and (space := network.peer.habits.socket_bytes - self.in_socket) > 0:
            data, self.backlog = self.backlog[:space], self.backlog[space:]
            self.in_socket += len(data)
            network.down.send(data)
        outbox.room = outbox.limit - len(self.backlog) - sum(map(len, outbox.frames))
        if not self.backlog and outbox.starved and not self.ended:
            self.broker.has_room(outbox, trio.current_time())

    def end(self, reason_code: ReasonCode | None, text: str = "", server_reference: str | None = None) -> None:
        ended = self.ended
        super().end(reason_code, text, server_reference)
        if not ended:
            self.network.excused = self.world.excuses(reason_code)
            self.network.broker_ended()

    def _look_at_silence(self) -> None:
        """What the supervising task of a link does: end a client that was silent for too long."""
        if self.ended or self.network.dead:
            return
        left = self.silence_deadline() - trio.current_time()
        if left <= 0:
            self.world.keep_alive_timeouts += 1
            self.end(ReasonCode.KEEP_ALIVE_TIMEOUT, "silent for 1.5 times its Keep Alive")
        else:
            self.world.after(left + 0.001, self.network.peer.number, self._look_at_silence, idle=True)

    def reading_changed(self) -> None:
        pass

    def resume_soon(self) -> None:
        raise AssertionError("no client sends that many packets at once")
