"""That what waits for a store which takes nothing is bounded, whoever brings it, and what the bound does [S2]."""

from __future__ import annotations

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.journal import Journal, size_of
from mqtt_trio.broker.limits import Limits
from tests.lane_worlds import Setup, World
from tests.wire import V5, V311, publish, subscribe, unsubscribe

LIMIT = 20_000
SLACK = 2_000
"""Bytes of what one step brings."""


def make_world() -> World:
    """Return a world whose store takes nothing from now on; `old` has a session that is kept, with one subscription."""
    world = World(FastLane, Setup(limits=Limits(), outbox_bytes=1_000_000, kept=True))
    world.broker.journal.limit = LIMIT
    world.feed(world.connect("old", V5, clean_start=False, session_expiry_interval=100), subscribe(V5, 1, ("a", 1)))
    world.feed(world.clients["old"], publish(V5, "set", b"x", flags=3, packet_id=1))
    world.do("commit", "", None)
    world.feed(world.clients["old"], publish(V5, "other", b"x", flags=1))
    world.do("fail", "", None)
    assert world.broker.journal.failing is not None
    return world


def bounded(world: World) -> bool:
    """Have the store fail once more; whether what it was asked to take is within the bound and is what was counted."""
    journal: Journal = world.broker.journal
    counted = journal.size
    world.do("fail", "", None)
    return counted <= LIMIT + SLACK and journal.size == size_of(journal.batch) <= LIMIT + SLACK


async def test_retained_messages_that_were_never_there_leave_nothing_behind() -> None:
    world = make_world()
    before = world.broker.journal.size
    for number in range(1000):
        world.feed(world.clients["old"], publish(V5, f"fresh/{number}", b"", flags=1))
    assert world.broker.journal.size == before


async def test_retained_messages_that_come_and_go_are_bounded() -> None:
    world = make_world()
    for number in range(1000):
        world.feed(world.clients["old"], publish(V5, f"fresh/{number}", b"x", flags=1))
        if number % 10 == 9:
            world.do("fail", "", None)
        world.feed(world.clients["old"], publish(V5, f"fresh/{number}", b"", flags=1))
    assert bounded(world)
    assert world.broker.metrics.retained_refused > 0
    world.feed(world.clients["old"], publish(V5, "set", b"new", flags=1))
    assert world.broker.retained.get("set") is None, "nobody gets an old one for a new one"
    world.do("commit", "", None)
    world.feed(world.clients["old"], publish(V5, "set", b"newer", flags=1))
    world.do("commit", "", None)
    assert {row[0] for row in world.store.load().retained} == {"other", "set"}


async def test_subscriptions_that_come_and_go_are_bounded() -> None:
    world = make_world()
    link = world.clients["old"]
    for number in range(1000):
        world.feed(link, subscribe(V5, 2, (f"fresh/{number}", 1)))
        if number % 10 == 9:
            world.do("fail", "", None)
        world.feed(link, unsubscribe(V5, 3, f"fresh/{number}"))
    assert bounded(world)
    assert world.broker.metrics.subscriptions_refused > 0
    world.do("commit", "", None)
    link.sent = b""
    world.feed(link, subscribe(V5, 2, ("b", 1)))
    world.do("commit", "", None)
    assert world.broker.metrics.subscriptions == 2
    assert [row[1] for row in world.store.load().subscriptions] == ["a", "b"]


async def test_sessions_that_come_and_go_are_bounded_and_others_are_not_concerned() -> None:
    world = make_world()
    for number in range(1000):
        world.connect(f"fresh-{number}", V5, clean_start=True, session_expiry_interval=10)
        if number % 10 == 9:
            world.do("fail", "", None)
        world.do("wait", "", 0.1)
        world.broker.run_deadlines(world.now)
    assert bounded(world)
    link = world.connect("late", V311, clean_start=False)
    assert link.ended
    assert link.sent == b"\x20\x02\x00\x03"
    assert world.connect("passing", V311, clean_start=True).sent == b"\x20\x02\x00\x00"
    link = world.connect("old", V5, clean_start=False, session_expiry_interval=100)
    assert not link.ended
    assert link.sent[2:4] == b"\1\0", "Session Present, success"
    world.do("commit", "", None)
    assert not world.connect("late", V311, clean_start=False).ended
