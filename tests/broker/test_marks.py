"""Marks of gateways: committed in the batch of what was noted before them."""

from __future__ import annotations

from trio.testing import MockClock

from mqtt_trio.broker.local import LocalPublisher
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Batch
from tests.lane_worlds import V5
from tests.store_play import Play


async def test_marks_are_committed_with_what_was_noted_before(autojump_clock: MockClock) -> None:
    """A mark says how far a gateway had come when everything else of its batch was so."""
    play = Play()
    play.subscriber("s", V5, "t")
    broker = play.world.broker
    local = LocalPublisher(broker, "gateway", lambda: play.world.now)
    position = 0
    broker.journal.sources.append(lambda: {"gateway/position": b"%d" % position})
    for _ in range(3):
        local.publish([Message("t", b"%d" % position, 1)])
        position += 1
    taken = broker.keeper.take()
    local.publish([Message("t", b"late", 1)])
    position += 1
    assert taken.marks == {"gateway/position": b"3"}
    assert len(taken.deliveries) == 3
    broker.keeper.failed(taken, "planned", play.world.now)
    again = broker.keeper.take()
    assert again.marks == {"gateway/position": b"4"}
    assert len(again.deliveries) == 4
    play.world.store.commit(again)
    world = play.restart()
    assert world.broker.journal.marks == {"gateway/position": b"4"}
    assert len(world.broker.connections.sessions["s"].queue) + len(world.broker.connections.sessions["s"].inflight) == 4


def test_a_large_mark_needs_space_and_a_small_one_does_not() -> None:
    assert not Batch(marks={"a": b"small", "b": None}).brings_messages
    assert Batch(marks={"a": bytes(2000)}).brings_messages
    assert not Batch(marks={"a": None}).empty
