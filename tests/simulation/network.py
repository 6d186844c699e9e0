"""Virtual time, and a network that delays, cuts apart and loses bytes.

Everything happens as an event at an instant. Whoever decides by chance has a generator of its own, and events at one
instant are ordered by who they belong to: the broker walks through the members of an audience in an order that differs
between runs, and a seed must not.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from tests.simulation.plan import Habits

MOST_EVENTS: Final = 200_000
"""A simulation with more does not come to rest."""


class Restless(Exception):
    """Events go on for ever."""


class Peer(Protocol):
    """What the network needs to know of a client."""

    name: str
    number: int
    """Unique in its world; orders events."""
    rng: random.Random
    habits: Habits

    def received(self, connection: Connection, data: bytes) -> None:
        """Bytes of the broker came."""

    def closed(self, connection: Connection) -> None:
        """The network connection is gone."""

    def restarted(self, *, killed: bool) -> None:
        """The broker began anew."""

    def missed(self, connection: Connection, data: bytes) -> None:
        """The broker wrote this and it never came; once per connection, when both ends have let go."""


class World:
    """The time and what is to happen; a subclass has the broker."""

    sees_all: bool = True
    """Whether `Connection.written` has all that the broker meant to write, also what its outbox held at the end."""
    kills = 0
    """How often the broker was killed."""
    life = 0
    """How often it began anew."""
    last_life_at = 0.0
    """When it did last."""
    failed_at = -1.0
    """When its store last took nothing; publishers were refused until then."""
    outages = 0
    """Outages of the store that the broker of today has seen."""
    outages_before_kill = 0
    """Outages that the last broker that was killed had seen."""
    holds: bool = False
    """Whether messages at QoS 2 wait for a store, so that those at QoS 1 overtake them, and a connection may end in
    front of them."""
    commits = 0
    """Batches that the store took."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the world began."""
        self.events: list[tuple[float, int, int, bool, Callable[[], None]]] = []
        self.waiting = 0
        """Events that are not idle."""
        self._number = 0
        self.clients: list[Peer] = []

    def open(self, peer: Peer) -> Connection:
        """Open a network connection for a client."""
        raise NotImplementedError

    def after(self, delay: float, owner: int, action: Callable[[], None], *, idle: bool = False) -> None:
        """Do something later. The simulation does not go on for the sake of an `idle` event."""
        self._number += 1
        self.waiting += not idle
        heapq.heappush(self.events, (self.now + delay, owner, self._number, idle, action))


class Pipe:
    """One direction of a connection: bytes arrive late and in pieces, in order."""

    __slots__ = ("arrive", "dead", "habits", "last_at", "parts", "peer", "world")

    def __init__(self, world: World, peer: Peer, arrive: Callable[[bytes], None]) -> None:
        self.world = world
        self.peer = peer
        self.habits = peer.habits
        self.parts: deque[tuple[float, bytes]] = deque()
        self.last_at = 0.0
        self.arrive = arrive
        self.dead = False

    def send(self, data: bytes) -> None:
        """Send bytes on their way."""
        if self.dead:
            return
        rng = self.peer.rng
        if len(data) > 1 and rng.random() < 0.2:
            cut = rng.randrange(1, len(data))
            self._send(data[:cut])
            data = data[cut:]
        self._send(data)

    def _send(self, data: bytes) -> None:
        at = self._arrival()
        self.parts.append((at, data))
        self.world.after(at - self.world.now, self.peer.number, self._deliver)

    def _arrival(self) -> float:
        rng, habits = self.peer.rng, self.habits
        delay = rng.random() * habits.latency
        if habits.stalls and rng.random() < 0.03:
            delay += rng.random() / 2
        self.last_at = max(self.last_at, self.world.now + delay)
        return self.last_at

    def _deliver(self) -> None:
        """Hand over everything that has arrived, as one read."""
        parts, now = self.parts, self.world.now
        data = []
        while parts and parts[0][0] <= now:
            data.append(parts.popleft()[1])
        if data:
            self.arrive(b"".join(data))

    def then(self, action: Callable[[], None]) -> None:
        """Do something behind everything that is on its way."""
        self.world.after(self._arrival() - self.world.now, self.peer.number, action)

    def lose(self) -> None:
        """Lose what is on its way and all that follows."""
        self.dead = True
        self.parts.clear()


class Connection:
    """A network connection between a client and the broker, as the client and the network see it.

    A subclass has the broker's end: it calls `write` and `broker_ended`, and implements `arrived`, `taken` and `part`.
    """

    def __init__(self, world: World, peer: Peer) -> None:
        self.world = world
        self.peer = peer
        self.up = Pipe(world, peer, self.arrived)
        self.down = Pipe(world, peer, self._came)
        self.attached = True
        """The client still uses it."""
        self.ended = False
        """The broker does not use it any more."""
        self.reset = False
        """The broker ended it while the client still used it."""
        self.written: list[bytes] = []
        """All that the broker wrote."""
        self.consumed = 0
        """Bytes of it that the client has read as whole packets."""
        self.kills = world.kills
        """How often the broker had been killed when it was opened."""
        self.excused = False
        """The broker may end it, and the client knows why: it stops, or its store takes nothing."""

    # The broker's end

    def arrived(self, data: bytes) -> None:
        """Bytes of the client reach the broker."""
        raise NotImplementedError

    def taken(self, size: int) -> None:
        """The network has brought that many bytes of the broker to the client."""

    def part(self) -> None:
        """The broker learns that the connection is gone."""
        raise NotImplementedError

    def unwritten(self) -> list[bytes]:
        """What the broker has yet to write."""
        return []

    def broker_ended(self) -> None:
        """The broker uses the connection no more; if that was its own wish, the client learns it at once."""
        self.ended = True
        if self.attached and not self.up.dead:
            self.reset = True
            self.up.lose()
            self.down.lose()
            self.hang_up()
        else:
            self._settle()

    def _settle(self) -> None:
        """Once both ends have let go, tell the client what it has missed."""
        if self.ended and not self.attached:
            self.peer.missed(self, b"".join((*self.written, *self.unwritten()))[self.consumed :])

    # The client's end

    def send(self, data: bytes) -> None:
        """Send bytes of the client."""
        self.up.send(data)

    def _came(self, data: bytes) -> None:
        if self.attached:
            self.peer.received(self, data)
        self.taken(len(data))

    def hang_up(self) -> None:
        """The client learns of the end."""
        if self.attached:
            self.let_go()
            self.peer.closed(self)

    def let_go(self) -> None:
        """The client uses the connection no more."""
        self.attached = False
        self._settle()

    # Faults

    def cut(self) -> None:
        """The network breaks; both ends learn it at once, what was under way is lost."""
        self.up.lose()
        self.down.lose()
        self.part()
        self.hang_up()

    def close(self) -> None:
        """The client closes: what it sent arrives, then the end; what was under way to it is lost."""
        self.down.lose()
        self.up.then(self.part)
        self.hang_up()

    def cut_at_broker(self) -> None:
        """The broker learns of a break first; what it sent before still arrives."""
        self.up.lose()
        self.part()
        self.down.then(self.hang_up)

    def go_silent(self) -> None:
        """The network swallows everything; the client gives up, the broker learns nothing."""
        self.up.lose()
        self.down.lose()
        self.hang_up()

    def leave_open(self) -> None:
        """The client turns away, to open another connection; what it sent arrives."""
        self.down.lose()
        self.let_go()
