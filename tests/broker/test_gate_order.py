"""Order at QoS 2 where some messages wait for the store and others need not."""

from __future__ import annotations

import pytest

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.wire import PACKET_IDS
from tests.lane_worlds import NoLane, RecordingLink, Setup, World
from tests.wire import V5, V311, publish, subscribe, unsubscribe

LANES = [FastLane, NoLane]
NO = b"\x50\x03\x00"


def make_world(lane: type[FastLane], kept_filter: str) -> World:
    """Return a world where the absent client `kept` has subscribed to something, which the store has."""
    world = World(lane, Setup(limits=Limits(), outbox_bytes=1_000_000, kept=True))
    world.feed(world.connect("kept", V311, clean_start=False), subscribe(V311, 1, (kept_filter, 2)))
    world.do("cut", "kept", None)
    world.do("commit", "", None)
    return world


def watcher(world: World, topic_filter: str, receive_maximum: int | None = None) -> RecordingLink:
    """Connect a subscriber whose session ends with its connection."""
    link = world.connect("watcher", V5, clean_start=True, receive_maximum=receive_maximum)
    world.feed(link, subscribe(V5, 1, (topic_filter, 2)))
    link.sent = b""
    return link


def publisher(world: World, version: ProtocolVersion = V5) -> RecordingLink:
    link = world.connect("p", version, clean_start=True)
    link.sent = b""
    return link


def message(number: int, topic: str = "t") -> bytes:
    return publish(V5, topic, b"%d" % number, flags=4, packet_id=number)


def finish(world: World, link: RecordingLink, packet_id: int) -> None:
    """Acknowledge a message to its end."""
    world.feed(link, b"\x50\x02" + PACKET_IDS[packet_id])
    world.feed(link, b"\x70\x02" + PACKET_IDS[packet_id])


@pytest.mark.spec("MQTT5-4.6.0-6")
@pytest.mark.parametrize("lane", LANES)
async def test_what_the_store_has_does_not_overtake_what_left_the_queue_before_it_had(lane: type[FastLane]) -> None:
    world = make_world(lane, "#")
    other = watcher(world, "t", receive_maximum=2)
    world.feed(publisher(world), b"".join(message(number) for number in (1, 2, 3, 4)))
    world.do("commit", "", None)
    assert other.sent == message(1) + message(2)
    world.feed(world.clients["p"], message(5))
    other.sent = b""
    batch = world.broker.keeper.take()
    world.feed(world.clients["p"], message(6))
    finish(world, other, 1)  # 3 may go: the store has it
    world.store.commit(batch)
    world.broker.keeper.committed(world.now)
    world._settle()
    for packet_id in (2, 3, 4, 5, 6):
        world.do("commit", "", None)
        finish(world, other, packet_id)
    world.do("commit", "", None)
    assert [other.sent.find(message(number)) for number in (3, 4, 5, 6)] == sorted(
        other.sent.find(message(number)) for number in (3, 4, 5, 6)
    )
    assert all(message(number) in other.sent for number in (3, 4, 5, 6))


@pytest.mark.spec("MQTT5-4.6.0-6")
@pytest.mark.parametrize("lane", LANES)
async def test_a_commit_between_two_free_slots_changes_no_order(lane: type[FastLane]) -> None:
    world = make_world(lane, "#")
    other = watcher(world, "t", receive_maximum=2)
    link = publisher(world)
    world.feed(link, message(1) + message(2))
    world.do("commit", "", None)
    world.feed(link, message(3) + message(4))
    batch = world.broker.keeper.take()  # with 3 and 4
    other.sent = b""
    finish(world, other, 1)  # 3 leaves the queue
    world.store.commit(batch)
    world.broker.keeper.committed(world.now)
    finish(world, other, 2)  # and so does 4, which the store has now
    world.do("commit", "", None)
    assert 0 <= other.sent.find(message(3)) < other.sent.find(message(4))


@pytest.mark.spec("MQTT5-4.6.0-6")
@pytest.mark.parametrize("lane", LANES)
async def test_what_nobody_must_keep_any_more_stays_behind_what_waits(lane: type[FastLane]) -> None:
    world = make_world(lane, "#")
    other = watcher(world, "t")
    link = publisher(world)
    world.feed(link, message(1))
    world.feed(world.connect("kept", V311, clean_start=False), unsubscribe(V311, 2, "#"))
    world.feed(link, message(2))
    assert other.sent == b""
    world.do("commit", "", None)
    assert other.sent == message(1) + message(2)


@pytest.mark.parametrize("lane", LANES)
async def test_what_only_waited_behind_others_goes_when_these_are_refused(lane: type[FastLane]) -> None:
    world = make_world(lane, "t")
    other = watcher(world, "#")
    link = publisher(world)
    world.feed(link, message(1) + message(2, "plain"))
    world.do("fail", "", None)
    assert NO + b"\1\x97" in link.sent
    assert other.sent == message(2, "plain")
    assert other.outbox.held_size == 0
    world.feed(link, message(3, "plain"))
    assert other.sent == message(2, "plain") + message(3, "plain"), "what nobody must keep goes on"


@pytest.mark.parametrize("lane", LANES)
async def test_a_client_that_acknowledges_what_it_was_not_sent_harms_nobody(lane: type[FastLane]) -> None:
    world = make_world(lane, "t")
    other = watcher(world, "#")
    link = publisher(world)
    world.feed(link, message(1) + message(2, "plain"))
    finish(world, other, 2)
    world.do("fail", "", None)
    assert NO + b"\1\x97" in link.sent
    world.feed(link, message(3, "plain"))
    assert other.sent.endswith(message(3, "plain"))
    assert other.outbox.held_size == 0


@pytest.mark.spec("MQTT5-4.3.3-10", "MQTT5-3.3.1-5", "MQTT5-3.3.1-6")
@pytest.mark.parametrize("lane", LANES)
async def test_a_removal_that_removed_nothing_undoes_nothing_behind_a_kill(lane: type[FastLane]) -> None:
    world = World(lane, Setup(limits=Limits(), outbox_bytes=1_000_000, kept=True))
    link = world.connect("p", V311, clean_start=False)
    world.feed(link, publish(V311, "t", b"", flags=5, packet_id=1))
    world.do("commit", "", None)
    world.feed(link, publish(V311, "t", b"new", flags=5, packet_id=2))
    world.do("commit", "", None)
    after = World(lane, world.setup)
    after.store = world.store
    Recovery(after.broker, after.store.load(), after.now).run()
    link = after.connect("p", V311, clean_start=False)
    link.sent = b""
    after.feed(link, publish(V311, "t", b"", flags=13, packet_id=1) + publish(V311, "t", b"new", flags=13, packet_id=2))
    after.do("commit", "", None)
    assert link.sent == b"\x50\x02\0\1\x50\x02\0\2"
    assert [message.payload for message in after.broker.retained] == [b"new"]
