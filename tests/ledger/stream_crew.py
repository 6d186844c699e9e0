"""Who takes part in a ledger that ends in Kafka: publishers that number what they send, subscribers on the nodes."""

from __future__ import annotations

import random
from itertools import count
from typing import Final

import attrs

from tests.ledger.crew import VERSIONS
from tests.ledger.devices import Device, Notice
from tests.ledger.sockets import SocketWorld
from tests.ledger.stream_verdict import Numbered
from tests.simulation.client import Outgoing, Talk
from tests.simulation.history import History, Message
from tests.simulation.network import Connection
from tests.simulation.plan import ClientPlan, Habits

TOPICS: Final = 3
"""Of each publisher."""
RETAINED_SHARE: Final = 0.25
"""Of the messages of one that has topics with retained messages."""
REMOVALS: Final = 0.2
SIZES: Final = (0, 0, 0, 20, 150, 2000)
BACKLOG: Final = 300
"""Messages of one publisher on their way; it publishes no more until some are acknowledged."""
REFUSALS: Final = (0x80, 0x83, 0x97)
"""Reason Codes of a broker that cannot keep a promise for the time being [K9]."""
FILTERS: Final[tuple[dict[str, int], ...]] = ({"t/#": 2}, {"t/#": 1}, {"$share/ledger/t/#": 2})
"""Of the subscribers on each node; the last ones are one group."""


@attrs.frozen(kw_only=True)
class StreamOptions:
    publishers: int = 4
    """On each node that has publishers."""
    version: str = "mixed"
    rate: float = 300.0
    """Messages/s of all publishers together."""
    refuses: bool = False
    """Whether the broker may refuse: a negative answer to 5.0 clients, the end of the connection to others."""
    retained: int = 0
    """Further topics of each publisher: those of its retained messages, which nobody subscribes to."""


class Reporter(Device):
    """A publisher that knows which processes it gave a message to."""

    refuses = False

    def _publish(self, talk: Talk, message: Numbered, packet_id: int, *, dup: bool) -> None:  # type: ignore[override]
        message.lives.add(self.sockets.generation)
        super()._publish(talk, message, packet_id, dup=dup)

    def _confirmed(self, talk: Talk, kind: int, packet_id: int, code: int) -> Outgoing | None:
        if code >= 0x80 and self.refuses and code in REFUSALS and self.habits.v5:
            self.sockets.failed_at = self.sockets.now + 1  # what follows is as if the store took nothing
            code = 0x97
        return super()._confirmed(talk, kind, packet_id, code)

    def missed(self, connection: Connection, data: bytes) -> None:
        if connection.reset and self.refuses and not self.habits.v5:
            self.history.counts["disconnected instead of refused"] += 1
            for out in self.outgoing.values():
                if isinstance(out.message, Numbered) and not out.released:
                    out.message.given_back += 1
            return
        super().missed(connection, data)


class StreamCrew:
    """All clients of one ledger, on all nodes."""

    def __init__(self, options: StreamOptions, rng: random.Random, notice: Notice) -> None:
        self.options, self.rng, self.notice = options, rng, notice
        self.history = History([])
        self.messages: list[Numbered] = []
        self.retained: list[Message] = []
        """Those of them that are to be retained, or remove what was."""
        self.publishers: list[Reporter] = []
        self.subscribers: list[Device] = []
        self.publishes = False
        self._clients = count()
        self._numbers = count(1)

    def add_publishers(self, world: SocketWorld) -> None:
        """Have publishers connect to a node."""
        for _ in range(self.options.publishers):
            reporter = Reporter(world, self._plan("publisher", {}), self.history, self._rng(), self.notice)
            reporter.refuses = self.options.refuses
            reporter.start()
            self.publishers.append(reporter)

    def add_subscribers(self, world: SocketWorld) -> None:
        """Have subscribers with sessions that last connect to a node."""
        for filters in FILTERS:
            client = Device(world, self._plan("subscriber", filters), self.history, self._rng(), lambda kind: None)
            client.start()
            self.subscribers.append(client)

    def reader_of_retained(self, world: SocketWorld) -> Device:
        """Have a client come to a node that is sent all retained messages."""
        plan = self._plan("reader", {"r/#": 2})
        client = Device(world, plan, History([]), self._rng(), lambda kind: None)
        client.start()
        return client

    def _rng(self) -> random.Random:
        return random.Random(self.rng.random())

    def _plan(self, role: str, filters: dict[str, int]) -> ClientPlan:
        rng, number = self.rng, next(self._clients)
        habits = Habits(
            v5=rng.choice(VERSIONS[self.options.version]),
            window=rng.choice((10, 50, 200)),
            first_id=rng.choice((1, 65_500)),
            reuses_ids=rng.random() < 0.5,
            acknowledge_after=rng.choice((0.0, 0.0, 0.01)),
            delivers_at_pubrel=rng.random() < 0.5,
            longest_pause=0.1,
        )
        return ClientPlan(name=f"{role}-{number}", number=number, habits=habits, filters=dict(filters))

    def publish_on(self) -> None:
        """Publish from now on, as fast as the options say."""
        self.publishes = True
        for publisher in self.publishers:
            self._next(publisher)

    def _next(self, publisher: Reporter) -> None:
        if not self.publishes:
            return
        size = self.rng.randint(1, 10)
        if len(publisher.to_send) + len(publisher.outgoing) < BACKLOG:
            publisher.publish([self._message(publisher) for _ in range(size)])
        delay = size * len(self.publishers) / self.options.rate * (0.5 + self.rng.random())
        publisher.world.after(delay, publisher.number, lambda: self._next(publisher))

    def _message(self, publisher: Reporter) -> Numbered:
        rng, number = self.rng, next(self._numbers)
        if self.options.retained and rng.random() < RETAINED_SHARE:
            return self._retained(publisher, number)
        topic_name = f"t/{publisher.number}/{rng.randrange(TOPICS)}"
        payload = f"{publisher.name}|{topic_name}|{number}|".encode() + b"." * rng.choice(SIZES)
        message = Numbered(publisher.name, topic_name, number, rng.randint(1, 2), payload)
        self.messages.append(message)
        self.history.messages.append(message)
        return message

    def _retained(self, publisher: Reporter, number: int) -> Numbered:
        """One QoS per topic: a QoS 1 message that comes again may overwrite a later one at QoS 2."""
        rng = self.rng
        last = rng.randrange(self.options.retained)
        topic_name = f"r/{publisher.number}/{last}"
        payload = f"{publisher.name}|{topic_name}|{number}|".encode() + b"." * rng.choice(SIZES)
        message = Numbered(publisher.name, topic_name, number, last % 2 + 1, payload)
        message.retain, message.removes = True, rng.random() < REMOVALS
        self.messages.append(message)
        self.retained.append(message)
        return message

    def busy(self) -> list[str]:
        """Return who has something under way."""
        everybody: list[Device] = [*self.publishers, *self.subscribers]
        return [client.name for client in everybody if not (client.idle and client.is_ready)]
