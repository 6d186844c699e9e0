"""Publishers inside the process: when they have room, and when the store has what they brought."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import pytest
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.local import LocalPublisher
from mqtt_trio.broker.message import Message
from mqtt_trio.gateway import wait_for_room, wait_until_kept
from mqtt_trio.protocol.packets import PubAck
from tests.lane_worlds import V5
from tests.store_play import Play

Clock: TypeAlias = trio.testing.MockClock
LIMIT = 10_000
"""Bytes that may wait for the store."""


class Bringing:
    """A gateway that brings a message whenever there is room."""

    def __init__(self) -> None:
        self.play = Play()
        self.play.subscriber("s", V5, "t")
        self.play.world.clients["s"].end(None, "cut")
        self.play.world.commit()
        self.journal = self.play.world.broker.journal
        self.journal.limit = LIMIT
        self.local = LocalPublisher(self.play.world.broker, "bridge", lambda: self.play.world.now)
        self.told: list[str] = []
        self.brought = 0

    def bring(self, most: int) -> int:
        """Bring messages of 100 bytes while there is room, `most` of them; return how many that were."""
        before = self.brought
        while self.local.has_room() and self.brought < before + most:
            self.brought += 1
            self.local.publish([Message("t", b"%0100d" % self.brought, 1)])
        return self.brought - before

    def note(self, what: str) -> Callable[[], None]:
        return partial(self.told.append, what)


async def test_a_store_that_is_slow_is_waited_for(autojump_clock: Clock) -> None:
    gateway = Bringing()
    first = gateway.bring(1000)
    assert 20 < first < 60
    batch = gateway.play.world.broker.keeper.take()  # a commit has begun
    second = gateway.bring(1000)
    assert second == first
    gateway.local.when_room(gateway.note("room"))
    assert gateway.told == []
    assert gateway.play.world.broker.metrics.publishers_paused == 1
    gateway.play.world.store.commit(batch)
    gateway.play.world.broker.keeper.committed(0.0)
    assert gateway.told == []  # the batch that is being filled is as full as before
    gateway.play.world.commit()
    assert gateway.told == ["room"]
    assert len(gateway.play.restart().broker.connections.sessions["s"].queue) == first + second


async def test_a_store_that_fails_gets_no_more_with_each_try(autojump_clock: Clock) -> None:
    gateway = Bringing()
    first = gateway.bring(1000)
    for _ in range(5):
        gateway.play.fail("s")
        assert gateway.bring(1000) == 0
        batch = gateway.play.world.broker.keeper.take()
        assert gateway.bring(1000) == 0  # the batch being filled is empty, and what was brought has been refused
        gateway.local.when_room(gateway.note("room"))
        gateway.play.world.broker.keeper.failed(batch, "no space", 0.0)
    assert gateway.told == []
    assert gateway.journal.size < LIMIT + 1000
    gateway.play.world.commit()
    assert gateway.told == ["room"] * 5
    assert gateway.bring(1000) == first
    gateway.play.world.commit()
    queue = gateway.play.restart().broker.connections.sessions["s"].queue
    assert [int(delivery.message.payload) for delivery in queue] == list(range(1, 2 * first + 1))


async def test_retained_messages_are_kept_although_there_was_no_room_for_all_of_them(autojump_clock: Clock) -> None:
    """A list of records is looked at once: what is behind the bound in it must not be lost for this node."""
    gateway = Bringing()
    gateway.local.set_retained(Message("old", b"1", 1, True))
    gateway.play.fail("s")
    for number in range(100):
        gateway.local.set_retained(Message(f"r/{number}", b"x" * 100, 1, True))
    gateway.local.set_retained(Message("old", b"", 1, True))
    assert gateway.journal.overfull
    assert not gateway.local.has_room()
    gateway.play.world.commit()
    assert len(list(gateway.play.restart().broker.retained)) == 100
    assert gateway.play.world.broker.metrics.retained_refused == 0


async def test_what_was_brought_is_told_to_be_kept_once_it_is(autojump_clock: Clock) -> None:
    gateway = Bringing()
    gateway.local.when_kept(gateway.note("nothing came"))
    gateway.bring(1)
    gateway.local.when_kept(gateway.note("first"))
    keeper, store = gateway.play.world.broker.keeper, gateway.play.world.store
    batch = keeper.take()
    gateway.local.when_kept(gateway.note("still the first"))
    gateway.local.set_retained(Message("r", b"1", 1, True))
    gateway.local.when_kept(gateway.note("second"))
    assert gateway.told == ["nothing came"]
    keeper.failed(batch, "no space", 0.0)
    assert gateway.told == ["nothing came"]
    gateway.play.world.commit()
    assert gateway.told == ["nothing came", "first", "still the first", "second"]
    gateway.local.when_kept(gateway.note("at once"))
    assert gateway.told[-1] == "at once"

    gateway.bring(1)
    batch = keeper.take()
    gateway.local.when_kept(gateway.note("third"))
    gateway.bring(1)
    gateway.local.when_kept(gateway.note("fourth"))
    store.commit(batch)
    keeper.committed(0.0)
    assert gateway.told[-1] == "third"
    assert [int(d.message.payload) for d in gateway.play.restart().broker.connections.sessions["s"].queue] == [1, 2]


async def test_whoever_fills_the_room_again_lets_the_next_one_wait(autojump_clock: Clock) -> None:
    gateway = Bringing()
    gateway.bring(1000)

    def fill() -> None:
        gateway.told.append("one")
        gateway.bring(1000)
        gateway.local.when_room(gateway.note("three"))

    gateway.local.when_room(fill)
    gateway.local.when_room(gateway.note("two"))
    gateway.play.world.commit()
    assert gateway.told == ["one"]
    gateway.play.world.commit()
    assert gateway.told == ["one", "two", "three"]


async def test_taps_stop_only_what_they_are_shown(autojump_clock: Clock) -> None:
    gateway = Bringing()
    broker = gateway.play.world.broker
    broker.stop_publishers(gateway)
    assert gateway.local.has_room()
    assert not gateway.local.has_room(tapped=True)
    gateway.local.when_room(gateway.note("tapped"), tapped=True)
    gateway.local.when_room(gateway.note("not tapped"))
    assert gateway.told == ["not tapped"]
    broker.resume_publishers(gateway)
    assert gateway.told == ["not tapped", "tapped"]


def test_without_a_store_there_is_room_and_nothing_to_wait_for() -> None:
    broker = Broker(Limits(), random_id=lambda: "x")
    local, told = LocalPublisher(broker, "bridge", lambda: 0.0), list[str]()
    local.set_retained(Message("r", b"1" * 100_000, 1, True))
    local.when_kept(partial(told.append, "kept"))
    local.when_room(partial(told.append, "room"))
    assert told == ["kept", "room"]


async def test_a_message_that_was_acknowledged_before_its_commit_is_no_longer_waited_for(
    autojump_clock: Clock,
) -> None:
    play = Play()
    play.subscriber("s", V5, "t")
    local, told = LocalPublisher(play.world.broker, "bridge", lambda: play.world.now), list[str]()
    local.publish([Message("t", b"1", 1)])
    local.when_kept(partial(told.append, "kept"))
    play.send("s", PubAck(1))
    assert told == []
    play.world.commit()
    assert told == ["kept"]
    assert not play.world.store.state.deliveries


@pytest.mark.parametrize("tapped", [False, True])
async def test_waiting_in_a_task(autojump_clock: Clock, tapped: bool) -> None:
    gateway = Bringing()
    gateway.bring(1000)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            await wait_for_room(gateway.local, tapped=tapped)
            gateway.told.append("room")
            await wait_until_kept(gateway.local)
            gateway.told.append("kept")

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        batch = gateway.play.world.broker.keeper.take()
        await trio.testing.wait_all_tasks_blocked()
        assert gateway.told == ["room"]
        gateway.play.world.store.commit(batch)
        gateway.play.world.broker.keeper.committed(0.0)
        await trio.testing.wait_all_tasks_blocked()
        assert gateway.told == ["room", "kept"]
        assert autojump_clock.current_time() == 0
