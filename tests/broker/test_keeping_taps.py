"""Taps that note what they take in the node's store: after a crash nothing is shown to them a second time."""

from __future__ import annotations

from typing import Any

import pytest

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, TapRoute, keeps, read_run
from mqtt_trio.protocol.codes import ReasonCode
from tests.broker.test_gates import LANES, PUBREC, PUBREL, Gate, commit, connect, fail, message
from tests.lane_worlds import Setup, World
from tests.wire import V5, V311, publish


class Keeper:
    """Notes what it takes as a mark; lets go when it is told to."""

    keeps = True

    def __init__(self, world: World) -> None:
        self.world = world
        self.seen: list[bytes] = []
        self.holds: list[Hold] = []
        world.broker.journal.sources.append(lambda: {"seen": b",".join(self.seen)})
        world.broker.add_tap(self)

    def route(self, topic_name: str) -> TapRoute | None:
        return self

    def take_run(self, run: FrameRun) -> Answer:
        return self.take(read_run(run)[0])

    def take(self, message: Message) -> Answer:
        self.seen.append(message.payload)
        self.holds.append(Hold(kept=True))
        return self.holds[-1]

    def release(self) -> None:
        holds, self.holds = self.holds, []
        for hold in holds:
            hold.release()
        self.world._settle()


def make_world(lane: type[FastLane] = FastLane, **limits: Any) -> tuple[World, Keeper]:
    world = World(lane, Setup(limits=Limits(**limits), outbox_bytes=1_000_000, kept=True))
    return world, Keeper(world)


def restart(world: World) -> tuple[World, Keeper]:
    """The node that the store makes now; what was not committed is gone."""
    again = World(FastLane, world.setup)
    again.store = world.store
    Recovery(again.broker, world.store.load(), again.now).run()
    return again, Keeper(again)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("committed", [False, True])
async def test_a_message_and_its_packet_identifier_are_committed_together(
    lane: type[FastLane], committed: bool
) -> None:
    """Nobody else keeps it: without the tap there would be nothing to commit."""
    world, keeper = make_world(lane)
    link = connect(world, "p")
    world.feed(link, message(V311, 1))
    assert link.sent == b""
    world.broker.journal.dirty = True
    if committed:
        commit(world)
    world, keeper = restart(world)
    assert world.broker.journal.marks == ({"seen": b"1"} if committed else {})
    link = connect(world, "p")
    world.feed(link, message(V311, 1, dup=True))
    commit(world)
    assert keeper.seen == ([] if committed else [b"1"])
    keeper.release()
    assert link.sent == PUBREC + b"\1"


@pytest.mark.parametrize("lane", LANES)
async def test_it_waits_for_its_answer_over_a_reconnect(lane: type[FastLane]) -> None:
    world, keeper = make_world(lane)
    world.feed(connect(world, "p"), message(V311, 1))
    commit(world)
    world.do("cut", "p", None)
    link = connect(world, "p")
    world.feed(link, message(V311, 1, dup=True))
    assert link.sent == b""
    assert keeper.seen == [b"1"]
    keeper.release()
    assert link.sent == PUBREC + b"\1"


async def test_a_tap_beside_it_that_gates_is_shown_the_message_again_alone() -> None:
    world, keeper = make_world()
    gate = Gate()
    world.broker.add_tap(gate)
    world.feed(connect(world, "p"), message(V311, 1, "held"))
    commit(world)
    world, keeper = restart(world)
    gate = Gate()
    world.broker.add_tap(gate)
    link = connect(world, "p")
    world.feed(link, message(V311, 1, "held", dup=True))
    assert keeper.seen == []
    assert gate.seen == [b"1"]
    assert link.sent == b""
    gate.holds[0].release()
    world._settle()
    commit(world)
    assert link.sent == PUBREC + b"\1"


@pytest.mark.parametrize("gated", [False, True])
async def test_an_identifier_is_free_behind_a_removal_of_nothing(gated: bool) -> None:
    """It is noted for its own sake, and for the tap's: one row, or the next message under it is lost after a kill."""
    world, keeper = make_world()
    topic = "held" if gated else "t"
    gate = Gate()
    world.broker.add_tap(gate)
    link = connect(world, "p")
    world.feed(link, publish(V311, topic, b"", flags=5, packet_id=1))
    commit(world)
    assert len(world.store.load().received) == 1
    keeper.release()
    for hold in gate.holds:
        hold.release()
    world._settle()
    commit(world)
    assert link.sent == PUBREC + b"\1"
    world.feed(link, PUBREL + b"\1")
    commit(world)
    assert list(world.store.load().received) == []
    world, keeper = restart(world)
    world.feed(connect(world, "p"), message(V311, 1))
    assert keeper.seen == [b"1"]


async def test_at_qos_1_nothing_but_the_mark_is_noted() -> None:
    world, keeper = make_world()
    link = connect(world, "p")
    world.feed(link, message(V311, 1, qos=1))
    world.broker.journal.dirty = True
    commit(world)
    assert link.sent == b""
    keeper.release()
    assert link.sent == b"\x40\x02\x00\x01"


async def test_while_the_store_fails_it_is_shown_nothing() -> None:
    world, keeper = make_world()
    link = connect(world, "p", V5)
    world.broker.journal.dirty = True
    fail(world)
    world.feed(link, message(V5, 1))
    assert keeper.seen == []
    assert link.sent[2:5] == bytes((0, 1, ReasonCode.QUOTA_EXCEEDED))


def test_other_routes_keep_nothing() -> None:
    assert not keeps(Gate())
    assert keeps(make_world()[1])
