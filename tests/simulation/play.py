"""Plays one seed and says what went wrong, with the story of the first flow that did."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable

import attrs
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.testing import open_memory_broker
from tests.simulation.client import Client
from tests.simulation.direct import DirectWorld, NoLane
from tests.simulation.disks import Disk, MemoryDisk
from tests.simulation.durable import DurableWorld, make_fate
from tests.simulation.groups import judge_groups
from tests.simulation.history import History
from tests.simulation.keepsakes import judge_keepsakes
from tests.simulation.mixed_plan import make_mixed_plan
from tests.simulation.network import World
from tests.simulation.on_trio import TrioWorld
from tests.simulation.oracle import Violation, judge, judge_retained
from tests.simulation.plan import Plan, make_durable_plan, make_plan
from tests.simulation.share_plan import has_store, make_share_plan

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
    run(world, history)
    return conclude(plan, history, world.broker, clients)


def play_durable(
    clock: trio.testing.MockClock,
    seed: int,
    lane: type[FastLane] = FastLane,
    *,
    disk: Disk | None = None,
    traced: bool = False,
) -> Outcome:
    """Play a seed on brokers with a store, which are killed; without a disk, on one in memory."""
    plan = make_durable_plan(seed)
    history = History(plan.messages, trace=[] if traced else None)
    world = DurableWorld(clock, plan.limits, lane, disk or MemoryDisk(), make_fate(seed), seed)
    clients = start_clients(plan, world, history)
    run(world, history)
    return conclude_durable(plan, history, world, clients)


def play_mixed(
    clock: trio.testing.MockClock, seed: int, lane: type[FastLane] = FastLane, *, traced: bool = False
) -> Outcome:
    """Play a seed with sessions that are kept beside others, and with subscribers of retained messages."""
    plan = make_mixed_plan(seed)
    history = History(plan.messages, trace=[] if traced else None)
    world = DurableWorld(clock, plan.limits, lane, MemoryDisk(), make_fate(seed), seed)
    clients = start_clients(plan, world, history)
    run(world, history)
    outcome = conclude_durable(plan, history, world, clients)
    outcome.violations += judge_keepsakes(history)
    return outcome


def play_shares(
    clock: trio.testing.MockClock, seed: int, lane: type[FastLane] = FastLane, *, traced: bool = False
) -> Outcome:
    """Play a seed about share groups; some have a broker with a store."""
    plan = make_share_plan(seed)
    history = History(plan.messages, trace=[] if traced else None)
    if has_store(seed):
        world = DurableWorld(clock, plan.limits, lane, MemoryDisk(), make_fate(seed), seed)
        clients = start_clients(plan, world, history)
        run(world, history)
        outcome = conclude_durable(plan, history, world, clients)
    else:
        direct = DirectWorld(clock, plan.limits, lane)
        clients = start_clients(plan, direct, history)
        run(direct, history)
        outcome = conclude(plan, history, direct.broker, clients)
    outcome.violations += judge_groups(history)
    return outcome


def run(world: DirectWorld, history: History) -> None:
    """Let time pass to the end; whatever fails is a complaint."""
    try:
        world.run()
    except Exception as exc:  # of the broker, or of a client that met bytes which are no packet
        history.complaints.append(("everybody", "".join(traceback.format_exception(exc))))
    history.counts["queued"] = world.most_queued
    history.counts["silent"] = world.keep_alive_timeouts


def conclude_durable(plan: Plan, history: History, world: DurableWorld, clients: list[Client]) -> Outcome:
    """Judge what happened, and what the store holds now."""
    history.kills, history.restless = world.kills, bool(world.kills) or world.failed_at >= 0
    history.lives, history.last_life_at = world.life, world.last_life_at
    outcome = conclude(plan, history, world.broker, clients, world.past)
    counts = history.counts
    counts["kills"], counts["commits"] = world.kills, world.commits
    counts["outage"] += world.failed_at >= 0
    world.commit_all()
    world.disk.close()
    state = world.disk.load()
    world.disk.close()
    live = {message.topic_name: message.payload for message in world.broker.retained}
    outcome.violations += judge_retained(history.messages, live)
    stored = {row[0] for row in state.retained}
    left = {"deliveries": state.deliveries, "contents": state.contents, "received": state.received}
    texts = [f"{what} in the store: {rows}" for what, rows in left.items() if rows]
    if stored != set(live):
        texts.append(f"retained in the store: {sorted(stored)}, in the broker: {sorted(live)}")
    outcome.violations += [Violation("left over", "store", text) for text in texts]
    return outcome


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
    world.clients = list(clients)
    return clients


def conclude(
    plan: Plan, history: History, broker: Broker, clients: list[Client], past: Counter[str] | None = None
) -> Outcome:
    """Judge what happened, now that nothing happens any more."""
    violations = judge(history)
    violations += [Violation("left over", "broker", text) for text in leftovers(broker, plan, past or Counter())]
    violations += [Violation("left over", c.name, "is not done") for c in clients if not c.idle or c.talk is None]
    counts = history.counts
    metrics = (past or Counter()) + Counter(broker.metrics.snapshot())
    counts["fast lane"] = metrics["fast_lane_messages"]
    counts["taken over"] = metrics["sessions_taken_over"]
    counts["dropped at QoS 0"] = metrics["dropped_outbox_full"]
    counts["messages"] = len(history.messages)
    counts["deliveries"] = sum(len(interest.deliveries) for interest in history.interests.values())
    return Outcome(plan, history, violations, counts)


def leftovers(broker: Broker, plan: Plan, past: Counter[str]) -> list[str]:
    """Say what the broker still holds, or has dropped, although all is said and done; `past` are the metrics of those
    before it."""
    found = [
        f"{what} of {session.client_id}: {left}"
        for session in broker.connections.sessions.values()
        for what in ("inflight", "resending", "bursts", "queue", "received", "acks")
        if (left := getattr(session, what))
    ]
    found += [f"queue of {name}: {group.queue}" for name, group in broker.shares.groups.items() if group.queue]
    now = broker.metrics.snapshot()
    metrics = {name: past[name] * (name != "messages_queued") + now[name] for name in now}
    bad = [name for name in metrics if name.startswith("dropped_")]
    bad += ["messages_queued", "protocol_errors", "client_failures"]
    if plan.may_end:
        bad.remove("dropped_session_ended")
    if plan.may_drop_qos0:
        bad.remove("dropped_outbox_full")
    return found + [f"{name} is {metrics[name]}" for name in bad if metrics[name]]


def explain(clock: trio.testing.MockClock, seed: int, lane: str, player: Callable[..., Outcome] = play) -> str:
    """Play a failing seed again and tell its story."""
    outcome = player(clock, seed, LANES[lane], traced=True)
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
