"""Plans for share groups: members that come and go, with sessions that last and others."""

from __future__ import annotations

import random
from typing import Final

import attrs

from mqtt_trio.broker.limits import Limits
from tests.simulation.plan import CALM_AT, ClientPlan, Plan, make_publisher, make_subscriber, write_messages

PUBLISHERS: Final = 8
MESSAGES: Final = 60
GROUPS: Final = ("$share/a/t/#", "$share/b/u/+", "$share/c/t/+")


def has_store(seed: int) -> bool:
    """Whether the broker of a seed has a store, and is killed."""
    return seed % 3 == 2


def make_share_plan(seed: int) -> Plan:
    """Make the plan of a seed."""
    rng = random.Random(f"shares {seed}")
    limits = Limits(
        receive_maximum=rng.choice((2, 10, 1024)),
        inflight_messages=rng.choice((1, 4, 1024)),
        queue_messages=100_000,
    )
    publishers = [make_publisher(rng, number) for number in range(PUBLISHERS)]
    members: list[ClientPlan] = []
    for group in rng.sample(GROUPS, rng.choice((1, 1, 2))):
        for first in (True, *[False] * rng.randint(1, 3)):
            member = _member(rng, PUBLISHERS + len(members), group, lasts=has_store(seed))
            if first and rng.random() < 0.8:  # who stays, so that something is owed
                member.habits = attrs.evolve(member.habits, starts_clean=0.0, lasts=True)
                member.changes.clear()
            members.append(member)
    write_messages(rng, publishers, MESSAGES)
    return Plan(seed=seed, limits=limits, clients=[*publishers, *members], may_end=True)


def _member(rng: random.Random, number: int, group: str, *, lasts: bool) -> ClientPlan:
    member = make_subscriber(rng, number)
    member.filters, member.late_filters, member.changes = {group: rng.choice((1, 2, 2))}, {}, []
    kind = rng.choice(("lasts", "lasts", "ends", "ends now and then"))
    starts_clean = 0.0
    if not lasts and kind == "ends":
        starts_clean = 1.0
    elif not lasts and kind == "ends now and then" and member.habits.v5:
        starts_clean = 0.3
    member.habits = attrs.evolve(member.habits, starts_clean=starts_clean, lasts=starts_clean < 1)
    member.starts_at = rng.choice((0.0, 0.0, 3.0))
    if rng.random() < 0.5:
        instants = sorted(rng.random() * CALM_AT for _ in range(rng.randint(1, 4)))
        member.changes = [(at, turn % 2 == 1, group) for turn, at in enumerate(instants)]
    return member
