"""Plans with sessions that outlive their connections beside others, and with subscribers of retained messages."""

from __future__ import annotations

import random
from typing import Final

import attrs

from mqtt_trio.broker.limits import Limits
from tests.simulation.history import NEVER
from tests.simulation.plan import (
    CALM_AT,
    ClientPlan,
    Plan,
    make_publisher,
    make_subscriber,
    write_messages,
    write_retained,
)

PUBLISHERS: Final = 10
MESSAGES: Final = 45
RETAINED: Final = 3
"""Topics with retained messages, each with a publisher of its own."""
KEEPSAKES: Final = ("$kept/0", "$kept/+", "$kept/#")
"""One of them per subscriber: of overlapping ones each brings a retained message of its own."""


def make_mixed_plan(seed: int) -> Plan:
    """Make the plan of a seed."""
    rng = random.Random(f"mixed {seed}")
    limits = Limits(
        receive_maximum=rng.choice((2, 10, 1024)),
        inflight_messages=rng.choice((1, 4, 1024, 1024)),
        queue_messages=100_000,
    )
    publishers = [make_publisher(rng, number) for number in range(PUBLISHERS)]
    subscribers: list[ClientPlan] = []
    for lasts in (True, False, *[rng.random() < 0.3 for _ in range(rng.randint(0, 2))]):
        subscribers.append(_subscriber(rng, PUBLISHERS + len(subscribers), lasts=lasts))
    write_messages(rng, publishers, MESSAGES)
    for number, publisher in enumerate(rng.sample(publishers, RETAINED)):
        write_retained(rng, publisher, f"$kept/{number}")
    return Plan(seed=seed, limits=limits, clients=[*publishers, *subscribers], may_end=True)


def _subscriber(rng: random.Random, number: int, *, lasts: bool) -> ClientPlan:
    subscriber = make_subscriber(rng, number)
    if rng.random() < 0.8:
        keepsakes = rng.choice(KEEPSAKES)
        subscriber.filters[keepsakes] = rng.choice((1, 2, 2))
        # Each SUBSCRIBE brings what is retained once more.
        subscriber.changes += [(rng.random() * CALM_AT, True, keepsakes) for _ in range(rng.choice((0, 2, 6)))]
        subscriber.changes.sort()
    if not lasts:
        subscriber.late_filters = {}
        subscriber.changes = [change for change in subscriber.changes if change[2] in subscriber.filters]
        life = rng.choice((NEVER, NEVER, 4.0, 1.5))
        subscriber.habits = attrs.evolve(subscriber.habits, starts_clean=1.0, lasts=False, mean_life=life)
    return subscriber
