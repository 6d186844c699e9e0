"""Who takes part in a ledger, and what they publish."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import count
from typing import Final, TypeVar

import attrs

from tests.ledger.devices import Device, Lodger, Mortal, Notice
from tests.ledger.sockets import SocketWorld
from tests.ledger.verdict import Case, Legacy
from tests.simulation.history import History, Message
from tests.simulation.plan import ClientPlan, Habits

D = TypeVar("D", bound=Device)
VERSIONS: Final = {"5": (True,), "3.1.1": (False,), "mixed": (True, False)}
FILTERS: Final[tuple[dict[str, int], ...]] = (
    {"t/#": 2},
    {"t/#": 1},
    {"t/+/0": 2, "t/+/1": 1},
    {"t/0/#": 1, "t/1/#": 2, "u/0": 2},
)
TOPICS: Final = (*("t",) * 12, *("u",) * 3, *("g",) * 3, "n", *("r",) * 2)
"""First levels, as often as they are published to: for everybody, for those that come and go, the share group, new
subscriptions, retained."""
CHANGING: Final = {"u/0": 2, "u/1": 1}
GROUP: Final = "$share/crew/g/#"
MEMBERS: Final = 3
JUDGED: Final = ("publisher", "subscriber", "changing", "novice")
"""Roles whose deliveries the simulation's oracle understands."""
SIZES: Final = (0, 0, 0, 0, 20, 150, 300, 4000)
"""Bytes that a payload is longer than its number; from 200 on several sessions share one copy in the store."""
RETAINED: Final = 100
"""Topics of each publisher with retained messages: most were not written again after the last kill."""
BACKLOG: Final = 300
"""Messages of one publisher on their way; it publishes no more until some are acknowledged."""


@attrs.frozen(kw_only=True)
class CrewOptions:
    publishers: int = 4
    subscribers: int = 4
    version: str = "mixed"
    rate: float = 400.0
    """Messages/s of all publishers together."""


class Crew:
    """All clients of one ledger."""

    def __init__(self, world: SocketWorld, options: CrewOptions, rng: random.Random, notice: Notice) -> None:
        self.world, self.options, self.rng, self.notice = world, options, rng, notice
        self.case = Case(History([]))
        self.publishes = False
        self._clients = count()
        self._numbers = {number: count(1) for number in range(options.publishers)}
        complaints, counts = self.case.history.complaints, self.case.history.counts
        self._aside = History([], complaints=complaints, counts=counts)
        """Of Wills and the like: the oracle does not judge it, but what they see on the wire counts."""
        self._histories = {"member": self.case.group, **dict.fromkeys(JUDGED, self.case.history)}
        self.subscribers = [self._subscriber(FILTERS[n % len(FILTERS)]) for n in range(options.subscribers)]
        self.sleepers = [self._subscriber({"t/#": 2}), self._subscriber({"t/#": 1, "u/1": 2})]
        self.changing = [self._changing() for _ in range(2)]
        self.members = [self._member() for _ in range(MEMBERS)]
        self.heir = self._make(Device, "heir", {"w/#": 2})
        self.lodgers = [self._make(Lodger, "lodger", {f"e/{n}": 1}, v5=True) for n in range(2)]
        self.mortals: list[Mortal] = []
        self.novices: list[Device] = []
        self.publishers = [self._make(Device, "publisher", {}) for _ in range(options.publishers)]

    # Making clients

    def _make(
        self,
        kind: type[D],
        role: str,
        filters: dict[str, int],
        *,
        v5: bool | None = None,
        late: dict[str, int] | None = None,
    ) -> D:
        rng, number = self.rng, next(self._clients)
        if v5 is None:
            v5 = rng.choice(VERSIONS[self.options.version])
        habits = Habits(
            v5=v5,
            window=rng.choice((10, 50, 200)),
            first_id=rng.choice((1, 65_500)),
            reuses_ids=rng.random() < 0.5,
            receive_maxima=rng.choice(((None,), (None,), (5,), (20, None))),
            topic_alias_maximum=rng.choice((0, 0, 5)),
            acknowledge_after=rng.choice((0.0, 0.0, 0.01)),
            delivers_at_pubrel=rng.random() < 0.5,
            longest_pause=0.1,
        )
        plan = ClientPlan(
            name=f"{role}-{number}", number=number, habits=habits, filters=dict(filters), late_filters=late or {}
        )
        client = kind(
            self.world,
            plan,
            self._histories.get(role, self._aside),
            random.Random(rng.random()),
            self.notice,
        )
        client.start()
        return client

    def _subscriber(self, filters: dict[str, int]) -> Device:
        return self._make(Device, "subscriber", filters)

    def _changing(self) -> Device:
        return self._make(Device, "changing", {}, late=CHANGING)

    def _member(self) -> Device:
        return self._make(Device, "member", {GROUP: 2})

    def add_mortal(self) -> Mortal:
        """Have a client with a Will connect."""
        mortal = self._make(Mortal, "mortal", {}, late={"nothing/here": 1})
        mortal.legacy = Legacy(f"w/{mortal.number}", f"will of {mortal.name}".encode(), 1)
        if mortal.habits.v5 and self.rng.random() < 0.5:
            mortal.legacy.delay = 60  # it will be back before that
        mortal.subscribe(True, "nothing/here")
        self.case.legacies.append(mortal.legacy)
        self.mortals.append(mortal)
        return mortal

    def add_novice(self) -> Device:
        """Have a client come for its first time, and subscribe."""
        novice = self._make(Device, "novice", {"n/#": self.rng.choice((1, 2))})
        self.novices.append(novice)
        return novice

    @property
    def steady(self) -> list[Device]:
        """Those that stay connected, publishers apart."""
        return [*self.subscribers, *self.sleepers, *self.changing, *self.members, self.heir, *self.novices]

    # Publishing

    def publish_on(self) -> None:
        """Publish from now on, as fast as the options say."""
        self.publishes = True
        for publisher in self.publishers:
            self._next(publisher)

    def _next(self, publisher: Device) -> None:
        if not self.publishes:
            return
        size = self.rng.randint(1, 10)
        backlog = len(publisher.to_send) + len(publisher.outgoing)
        if backlog < BACKLOG:
            publisher.publish(self.make_messages(publisher, size))
        delay = size * len(self.publishers) / self.options.rate * (0.5 + self.rng.random())
        self.world.after(delay, publisher.number, lambda: self._next(publisher))

    def make_messages(self, publisher: Device, size: int) -> list[Message]:
        """Make messages of one publisher and note them where they are judged."""
        rng, case = self.rng, self.case
        index = self.publishers.index(publisher)
        made = []
        for _ in range(size):
            first, last, qos = rng.choice(TOPICS), rng.randint(0, 1), rng.randint(1, 2)
            if first == "r":
                last = rng.randrange(RETAINED)
            number = next(self._numbers[index])
            topic_name = f"{first}/{last}" if first == "u" else f"{first}/{index}/{last}"
            payload = f"{publisher.name}|{topic_name}|{number}|".encode() + b"." * rng.choice(SIZES)
            message = Message(publisher.name, topic_name, number, qos, payload)
            if first == "r":  # one QoS per topic: a QoS 1 message that comes again may overwrite a later one at QoS 2
                message.retain, message.qos = True, last % 2 + 1
                message.removes = rng.random() < 0.2
                case.retained_messages.append(message)
            elif first == "g":
                case.group.messages.append(message)
            else:
                case.history.messages.append(message)
            made.append(message)
        return made

    def burst(self) -> None:
        """Have every publisher send a lot at once."""
        for publisher in self.publishers:
            publisher.publish(self.make_messages(publisher, self.rng.randint(50, 200)))

    # Coming and going

    def change(self, wanted: bool | None = None) -> None:
        """Have somebody subscribe to a filter, or leave it."""
        client = self.rng.choice(self.changing)
        for topic_filter in CHANGING:
            client.subscribe(self.rng.random() < 0.6 if wanted is None else wanted, topic_filter)

    def broker_died(self) -> None:
        """Those with a Will die with the broker, or are back in time."""
        for mortal in self.mortals:
            legacy = mortal.legacy
            if mortal.is_away or legacy.revoked:
                continue
            legacy.promised = mortal.is_sure
            if legacy.delay == 60 and mortal.is_sure:
                mortal.subscribe(True, "nothing/here")  # the SUBACK promises that the Will is gone, too
            else:
                legacy.died = True
                mortal.leave()

    def dismiss(self) -> None:
        """Let those go whose part is over."""
        for mortal in self.mortals:
            if mortal.legacy.revoked and mortal.is_ready:
                mortal.leave()
        self.mortals = [mortal for mortal in self.mortals if not mortal.is_away]

    def conclude(self) -> Case:
        """Return what is to be judged."""
        case, kills = self.case, self.world.kills
        for history in (case.history, case.group):
            history.kills, history.restless = kills, bool(kills)
        case.will_deliveries = self.heir.subscriber.interest.deliveries
        return case

    def reader_of_retained(self) -> Device:
        """Have a client come that is sent all retained messages."""
        return self._make(Device, "reader", {"r/#": 2})


def all_ready(clients: Iterable[Device]) -> bool:
    """Whether all are connected and subscribed."""
    return all(client.is_ready for client in clients)
