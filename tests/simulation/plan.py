"""A simulation before it begins, all of it from one seed: limits, clients and their habits, messages."""

from __future__ import annotations

import random
from typing import Final

import attrs

from mqtt_trio.broker.limits import Limits
from tests.simulation.history import NEVER, Message
from tests.wire import text

PUBLISHERS: Final = 50
MESSAGES: Final = 200
"""About that many per seed."""
DURABLE_PUBLISHERS: Final = 14
DURABLE_MESSAGES: Final = 60
"""The same for seeds whose broker has a store."""
CALM_AT: Final = 10.0
"""Seconds after which nothing is cut any more, and everybody comes back and finishes."""
TOPICS: Final = tuple(f"t/{number}" for number in range(6))
LATE_TOPICS: Final = ("u/0", "u/1")
"""What is subscribed to and unsubscribed from on the way."""
STATIC_FILTERS: Final = (
    {"t/#": 2},
    {"t/+": 1},
    {"t/+": 2, "t/0": 1, "#": 1},
    {"t/0": 2, "t/1": 1, "t/2": 2, "t/3": 1},
    {"t/1": 2, "t/+": 0},
    {"t/2": 1, "t/4": 2, "t/5": 2},
)
QOS: Final = ((0, 1, 1, 2, 2), (1,), (2,), (1, 2), (0, 1, 2))
"""What the messages of a seed are published at."""
BIG: Final = 1 << 20


@attrs.frozen(kw_only=True)
class Habits:
    """How one client and its network behave."""

    v5: bool
    window: int
    """Unacknowledged messages that it has at most; the server's Receive Maximum may be lower."""
    first_id: int = 1
    """Packet Identifier that it uses first; the next ones follow, as far as they are free."""
    reuses_ids: bool = False
    """Whether it always takes the lowest Packet Identifier that is free."""
    keep_alive: int = 0
    receive_maxima: tuple[int | None, ...] = (None,)
    """Each connection of a 5.0 client announces one of these."""
    topic_alias_maximum: int = 0
    outbox_bytes: int = BIG
    socket_bytes: int = BIG
    """Bytes that are on their way to the client at most; the broker keeps the rest."""
    latency: float = 0.02
    stalls: bool = False
    """Whether its network now and then delays bytes by up to half a second."""
    acknowledge_after: float = 0.0
    """Seconds for which acknowledgements are gathered."""
    delivers_at_pubrel: bool = False
    """Method A of [MQTT5-4.3.3], figure 4.3, rather than B."""
    starts_clean: float = 0.0
    """How likely a connection ends the session that was there."""
    lasts: bool = True
    """Whether its sessions outlive their connections; if not, `starts_clean` is 1."""
    mean_life: float = NEVER
    """Seconds that its connections last on average until the calm."""
    longest_pause: float = 1.0
    breaks_off: float = 0.0
    """How likely a connection ends while what was published on it is under way."""


@attrs.define(kw_only=True)
class ClientPlan:
    """One client: what it is and what it does when."""

    name: str
    number: int
    habits: Habits
    starts_at: float = 0.0
    filters: dict[str, int] = attrs.Factory(dict)
    """Subscribed to at the beginning."""
    late_filters: dict[str, int] = attrs.Factory(dict)
    changes: list[tuple[float, bool, str]] = attrs.Factory(list)
    """(instant, subscribe or unsubscribe, filter)."""
    bursts: list[tuple[float, list[Message]]] = attrs.Factory(list)
    """What it publishes, and when."""


@attrs.define(kw_only=True)
class Plan:
    seed: int
    limits: Limits
    clients: list[ClientPlan]
    may_end: bool = False
    """Whether sessions or share groups may end, and what waits for them with them."""

    @property
    def may_drop_qos0(self) -> bool:
        """Whether an outbox may fill: QoS 0 messages are dropped then."""
        return any(client.habits.outbox_bytes < BIG for client in self.clients)

    @property
    def messages(self) -> list[Message]:
        return [message for client in self.clients for _, messages in client.bursts for message in messages]


def make_plan(seed: int) -> Plan:
    """Make the plan of a seed."""
    rng = random.Random(seed)
    limits = Limits(
        receive_maximum=rng.choice((2, 10, 1024)),
        inflight_messages=rng.choice((1, 4, 20, 1024, 1024)),
        queue_messages=100_000,
    )
    clients = [make_publisher(rng, number) for number in range(PUBLISHERS)]
    if rng.random() < 0.3:  # somebody who does both
        both = rng.choice(clients)
        both.filters = dict(rng.choice(STATIC_FILTERS))
    clients += [make_subscriber(rng, PUBLISHERS + number) for number in range(rng.randint(2, 4))]
    write_messages(rng, clients[:PUBLISHERS])
    return Plan(seed=seed, limits=limits, clients=clients)


def make_durable_plan(seed: int) -> Plan:
    """Make the plan of a seed whose broker has a store: fewer clients, since its kills cut all their connections; some
    publish retained messages, too, which nobody subscribes to."""
    rng = random.Random(f"durable {seed}")
    limits = Limits(
        receive_maximum=rng.choice((2, 10, 1024)),
        inflight_messages=rng.choice((1, 4, 20, 1024, 1024)),
        queue_messages=100_000,
    )
    clients = [make_publisher(rng, number) for number in range(DURABLE_PUBLISHERS)]
    clients += [make_subscriber(rng, DURABLE_PUBLISHERS + number) for number in range(rng.randint(1, 3))]
    publishers = clients[:DURABLE_PUBLISHERS]
    write_messages(rng, publishers, DURABLE_MESSAGES)
    for number, publisher in enumerate(rng.sample(publishers, 3)):
        write_retained(rng, publisher, f"$kept/{number}")
    return Plan(seed=seed, limits=limits, clients=clients)


def write_retained(rng: random.Random, publisher: ClientPlan, topic: str) -> None:
    """Have one publisher set the retained message of a topic, and now and then remove it, at one QoS."""
    qos = rng.choice((1, 2))
    instants = sorted(rng.random() * CALM_AT for _ in range(rng.randint(1, 4)))
    for number, at in enumerate(instants):
        message = _message(rng, publisher, topic, number, qos)
        message.retain, message.removes = True, rng.random() < 0.3
        publisher.bursts.append((at, [message]))


def make_publisher(rng: random.Random, number: int) -> ClientPlan:
    """Make somebody who publishes; `write_messages` says what."""
    habits = Habits(
        v5=rng.random() < 0.5,
        window=rng.choice((1, 3, 20, 20)),
        first_id=rng.choice((1, 65_530)),
        reuses_ids=rng.random() < 0.5,
        keep_alive=rng.choice((0, 0, 0, 0, 3)),
        latency=rng.choice((0.002, 0.02, 0.1)),
        stalls=rng.random() < 0.3,
        mean_life=rng.choice((NEVER, 8.0, 3.0)),
        longest_pause=rng.choice((0.1, 2.0, 6.0)),
        breaks_off=rng.choice((0.0, 0.2, 0.4)),
    )
    return ClientPlan(name=f"p{number}", number=number, habits=habits, starts_at=rng.random())


def make_subscriber(rng: random.Random, number: int) -> ClientPlan:
    """Make somebody who subscribes."""
    v5 = rng.random() < 0.5
    habits = Habits(
        v5=v5,
        window=20,
        keep_alive=rng.choice((0, 2, 3)),
        receive_maxima=rng.choice(((None,), (1,), (3,), (10, 1), (None, 4, 2), (20, 5, 3))),
        topic_alias_maximum=rng.choice((0, 0, 0, 3)),
        outbox_bytes=rng.choice((BIG, BIG, 1000, 150)),
        socket_bytes=rng.choice((BIG, 2000, 100)),
        latency=rng.choice((0.002, 0.02, 0.1)),
        stalls=rng.random() < 0.5,
        acknowledge_after=rng.choice((0.0, 0.0, 0.05, 0.5)),
        delivers_at_pubrel=rng.random() < 0.5,
        mean_life=rng.choice((NEVER, 4.0, 1.5, 0.7)),
        longest_pause=rng.choice((0.1, 1.0, 6.0)),
    )
    plan = ClientPlan(name=f"s{number}", number=number, habits=habits, filters=dict(rng.choice(STATIC_FILTERS)))
    if rng.random() < 0.5:
        _change_subscriptions(rng, plan)
    return plan


def _change_subscriptions(rng: random.Random, plan: ClientPlan) -> None:
    """Subscribe to topics on the way, leave them, repeat what is subscribed to already."""
    if "#" not in plan.filters:
        plan.late_filters = {topic: rng.choice((1, 2)) for topic in LATE_TOPICS}
        for topic_filter in plan.late_filters:
            for turn, at in enumerate(sorted(rng.random() * CALM_AT for _ in range(rng.randint(1, 4)))):
                plan.changes.append((at, turn % 2 == 0, topic_filter))
    plan.changes += [(rng.random() * CALM_AT, True, f) for f in plan.filters if rng.random() < 0.5]
    plan.changes.sort()


def write_messages(rng: random.Random, publishers: list[ClientPlan], count: int = MESSAGES) -> None:
    """Every publisher has at least one burst, a few have most messages, so that flows are long."""
    qos = rng.choice(QOS)
    busy = rng.sample(publishers, min(8, len(publishers) // 2))
    topics = {p.name: rng.sample((*TOPICS, *LATE_TOPICS), rng.randint(1, 3)) for p in publishers}
    numbers = dict.fromkeys(topics, 0)
    order = publishers[:]
    written = 0
    while order or written < count:
        publisher = order.pop() if order else rng.choice(busy)
        topic = rng.choice(topics[publisher.name])
        size = 1 if order else rng.randint(1, 9)
        burst = []
        level = rng.choice(qos)
        for _ in range(size):
            if rng.random() < 0.15:
                topic, level = rng.choice(topics[publisher.name]), rng.choice(qos)
            numbers[publisher.name] += 1
            burst.append(_message(rng, publisher, topic, numbers[publisher.name], level))
        publisher.bursts.append((rng.random() * CALM_AT, burst))
        written += size
    for publisher in publishers:
        # Numbers are to rise with time: the bursts keep their order, their instants are sorted.
        instants = sorted(at for at, _ in publisher.bursts)
        publisher.bursts = [(at, burst) for at, (_, burst) in zip(instants, publisher.bursts, strict=True)]


def _message(rng: random.Random, publisher: ClientPlan, topic: str, number: int, qos: int) -> Message:
    size = rng.choice((0, 0, 0, 20, 150)) if rng.random() < 0.5 else 0
    payload = f"{publisher.name}|{topic}|{number:04}|".encode() + b"." * size
    properties = b""
    if publisher.habits.v5 and rng.random() < 0.2:
        properties = b"\x26" + text("n") + text(str(number % 3))
    return Message(publisher.name, topic, number, qos, payload, properties)
