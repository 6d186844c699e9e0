"""Plays one seed and says what went wrong, with the story of the first flow that did."""

from __future__ import annotations

import random
import traceback
from collections import Counter

import attrs
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.testing import open_memory_broker
from tests.simulation.client import Client
from tests.simulation.direct import DirectWorld, NoLane
from tests.simulation.history import History
from tests.simulation.network import World
from tests.simulation.on_trio import TrioWorld
from tests.simulation.oracle import Violation, judge
from tests.simulation.plan import Plan, make_plan

LINES = 60
"""Of a trace that are shown."""
LANES = {"on": FastLane, "off": NoLane}


@attrs.define
class Outcome:
    """How a simulation ended."""

    plan: Plan
    history: History
    violations: list[Violation]
    counts: Counter[str]
    """How often something happened that the simulation is for."""


def play(clock: trio.testing.MockClock, seed: int, lane: type[FastLane] = FastLane, *, traced: bool = False) -> Outcome:
    """Play a seed to its end; the broker's own errors count as violations."""
    plan = make_plan(seed)
    history = History(plan.messages, trace=[] if traced else None)
    world = DirectWorld(clock, plan.limits, lane)
    clients = start_clients(plan, world, history)
    try:
        world.run()
    except Exception as exc:  # of the broker, or of a client that met bytes which are no packet
        history.complaints.append(("everybody", "".join(traceback.format_exception(exc))))
    history.counts["queued"] = world.most_queued
    history.counts["silent"] = world.keep_alive_timeouts
    return conclude(plan, history, world.broker, clients)


async def play_on_trio(seed: int) -> Outcome:
    """Play a seed on the whole broker, whose tasks see to keep alive and to slow readers; wants an autojump clock."""
    plan = make_plan(seed)
    history = History(plan.messages)
    async with open_memory_broker(plan.limits) as memory:
        world = TrioWorld(memory)
        clients = start_clients(plan, world, history)
        await world.run()
        history.counts["silent"] = memory.broker.metrics.keep_alive_timeouts
        return conclude(plan, history, memory.broker, clients)


def start_clients(plan: Plan, world: World, history: History) -> list[Client]:
    """Make the clients of a plan and let them begin."""
    clients = [Client(world, c, history, random.Random(plan.seed * 1000 + c.number)) for c in plan.clients]
    for client in clients:
        client.start()
    return clients


def conclude(plan: Plan, history: History, broker: Broker, clients: list[Client]) -> Outcome:
    """Judge what happened, now that nothing happens any more."""
    violations = judge(history)
    violations += [Violation("left over", "broker", text) for text in leftovers(broker, plan)]
    violations += [Violation("left over", c.name, "is not done") for c in clients if not c.idle or c.talk is None]
    counts = history.counts
    counts["fast lane"] = broker.metrics.fast_lane_messages
    counts["taken over"] = broker.metrics.sessions_taken_over
    counts["dropped at QoS 0"] = broker.metrics.dropped_outbox_full
    counts["messages"] = len(history.messages)
    counts["deliveries"] = sum(len(interest.deliveries) for interest in history.interests.values())
    return Outcome(plan, history, violations, counts)


def leftovers(broker: Broker, plan: Plan) -> list[str]:
    """Say what the broker still holds, or has dropped, although all is said and done."""
    found = [
        f"{what} of {session.client_id}: {left}"
        for session in broker.connections.sessions.values()
        for what in ("inflight", "resending", "bursts", "queue", "received", "acks")
        if (left := getattr(session, what))
    ]
    metrics = broker.metrics.snapshot()
    bad = [name for name in metrics if name.startswith("dropped_")]
    bad += ["messages_queued", "protocol_errors", "client_failures"]
    if plan.may_drop_qos0:
        bad.remove("dropped_outbox_full")
    return found + [f"{name} is {metrics[name]}" for name in bad if metrics[name]]


def explain(clock: trio.testing.MockClock, seed: int, lane: str) -> str:
    """Play a failing seed again and tell its story."""
    outcome = play(clock, seed, LANES[lane], traced=True)
    lines = [f"seed {seed}, fast lane {lane}: {len(outcome.violations)} violations"]
    lines += [f"  {violation}" for violation in outcome.violations[:10]]
    if outcome.violations:
        lines += story(outcome, outcome.violations[0])
    lines.append(f"again: SEED={seed} scripts/test unit tests/simulation")
    return "\n".join(lines)


def story(outcome: Outcome, violation: Violation) -> list[str]:
    """Return the part of the trace that is about a violation: its flow, its clients and their connections."""
    notes = outcome.history.trace or []
    clients = {client.name: client for client in outcome.plan.clients}
    flow = violation.flow
    who = {violation.client, flow[0] if flow else violation.client} & set(clients)
    if who:
        notes = [note for note in notes if note.who in who]
    if flow:
        notes = [note for note in notes if note.message is None or note.message.flow == flow]
    lines = [f"  {name}: {clients[name].habits} {clients[name].filters}" for name in sorted(who)]
    if len(notes) > LINES:
        lines.append(f"  ... the last {LINES} of {len(notes)} lines")
    return lines + [f"  {note}" for note in notes[-LINES:]]
