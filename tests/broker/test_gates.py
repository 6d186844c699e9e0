"""QoS 2 where a publish may still be refused: by a store that others need, and by taps that have not let it go."""

from __future__ import annotations

from typing import Any

import pytest

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, Refused, TapRoute, read_run
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from tests.lane_worlds import NoLane, RecordingLink, Setup, World
from tests.wire import V5, V311, publish, subscribe

PUBREC = b"\x50\x02\x00"
PUBREL = b"\x62\x02\x00"
PUBACK = b"\x40\x02\x00"
NO = b"\x50\x03\x00"
LANES = [FastLane, NoLane]


class Gate:
    """A tap that holds what comes to topics below `held`."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.holds: list[Hold] = []
        self.refusing: ReasonCode | None = None

    def route(self, topic_name: str) -> TapRoute | None:
        return self if topic_name.startswith("held") else None

    def take_run(self, run: FrameRun) -> Answer:
        return self.take(read_run(run)[0])

    def take(self, message: Message) -> Answer:
        if self.refusing is not None:
            return Refused(self.refusing)
        self.seen.append(message.payload)
        self.holds.append(Hold())
        return self.holds[-1]


def make_world(lane: type[FastLane] = FastLane, **limits: Any) -> tuple[World, Gate]:
    """Return a world where the absent client `kept` has subscribed to everything, which the store has."""
    world = World(lane, Setup(limits=Limits(**limits), outbox_bytes=1_000_000, kept=True))
    gate = Gate()
    world.broker.add_tap(gate)
    world.feed(connect(world, "kept"), subscribe(V311, 1, ("#", 2)))
    world.do("cut", "kept", None)
    commit(world)
    return world, gate


def connect(
    world: World, client_id: str, version: ProtocolVersion = V311, *, kept: bool = True, **fields: int
) -> RecordingLink:
    if version == V5 and kept:
        fields["session_expiry_interval"] = 3600
    link = world.connect(client_id, version, clean_start=not kept, **fields)
    link.sent = b""
    return link


def commit(world: World) -> None:
    world.do("commit", "", None)


def fail(world: World) -> None:
    world.do("fail", "", None)


def release(world: World, gate: Gate, refused: ReasonCode | None = None) -> None:
    holds, gate.holds = gate.holds, []
    for hold in holds:
        hold.release(refused)
    world._settle()


def message(version: ProtocolVersion, number: int, topic: str = "t", *, dup: bool = False, qos: int = 2) -> bytes:
    return publish(version, topic, b"%d" % number, flags=qos << 1 | 8 * dup, packet_id=number)


def queued(world: World) -> list[bytes]:
    return [delivery.message.payload for delivery in world.broker.connections.sessions["kept"].queue]


def watcher(world: World, version: ProtocolVersion = V311, topic_filter: str = "t", **fields: int) -> RecordingLink:
    """Connect a subscriber whose session ends with its connection."""
    link = connect(world, "watcher", version, kept=False, **fields)
    world.feed(link, subscribe(version, 1, (topic_filter, 2)))
    link.sent = b""
    return link


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("version", [V311, V5])
async def test_nobody_has_a_message_at_qos_2_that_its_publisher_is_told_is_not_kept(
    version: ProtocolVersion, lane: type[FastLane]
) -> None:
    world, _ = make_world(lane)
    other = watcher(world, version)
    world.feed(connect(world, "p", V5), message(V5, 1))
    assert other.sent == b""
    fail(world)
    assert world.clients["p"].sent == NO + b"\1\x97"
    assert other.sent == b""
    assert not world.broker.connections.sessions["watcher"].inflight
    assert other.outbox.held_size == 0
    commit(world)
    world.feed(world.clients["p"], message(V5, 2))
    commit(world)
    assert other.sent == publish(version, "t", b"2", flags=4, packet_id=2)
    assert queued(world) == [b"2"]
    assert not world.broker.journal.gated


@pytest.mark.parametrize("lane", LANES)
async def test_a_3x_publisher_begins_anew_and_nobody_has_the_message_twice(lane: type[FastLane]) -> None:
    world, _ = make_world(lane)
    other = watcher(world)
    world.feed(connect(world, "p"), message(V311, 1))
    fail(world)
    commit(world)
    world.feed(connect(world, "p"), message(V311, 1, dup=True))
    commit(world)
    assert other.sent == publish(V311, "t", b"1", flags=4, packet_id=2)


async def test_what_waits_behind_a_full_window_is_taken_back_too() -> None:
    world, _ = make_world()
    other = watcher(world, V5, receive_maximum=1)
    world.feed(connect(world, "p", V5), message(V5, 1) + message(V5, 2) + message(V5, 3))
    assert len(world.broker.connections.sessions["watcher"].queue) == 2
    fail(world)
    session = world.broker.connections.sessions["watcher"]
    assert not session.queue
    assert not session.inflight
    assert world.broker.metrics.messages_queued == 0
    commit(world)
    assert other.sent == b""


async def test_a_withdrawn_message_leaves_its_slot_to_what_waits() -> None:
    world, _ = make_world()
    other = watcher(world, V5, receive_maximum=1)
    link = connect(world, "p", V5)
    world.feed(link, message(V5, 1))
    batch = world.broker.keeper.take()
    # A message that nobody waits for an answer to stays where it is, also when a commit fails.
    world.broker.publish(Message("t", b"will", 2), world.now, tapped=False)
    world.broker.keeper.failed(batch, "no space", world.now)
    world._settle()
    assert link.sent == NO + b"\1\x97"
    commit(world)
    assert other.sent == publish(V5, "t", b"will", flags=4, packet_id=2)


@pytest.mark.parametrize("lane", LANES)
async def test_copies_at_other_levels_go_at_once(lane: type[FastLane]) -> None:
    world, _ = make_world(lane)
    other = connect(world, "watcher", kept=False)
    world.feed(other, subscribe(V311, 1, ("t", 1)))
    other.sent = b""
    world.feed(connect(world, "p", V5), message(V5, 1))
    assert other.sent == publish(V311, "t", b"1", flags=2, packet_id=1)


async def test_a_retained_message_waits_for_the_store_as_well() -> None:
    world = World(FastLane, Setup(limits=Limits(), outbox_bytes=1_000_000, kept=True))
    other = watcher(world)
    world.feed(connect(world, "p", V5), publish(V5, "t", b"x", flags=5, packet_id=1))
    assert other.sent == b""
    fail(world)
    commit(world)
    assert other.sent == b""
    world.feed(world.clients["p"], publish(V5, "t", b"x", flags=5, packet_id=2))
    commit(world)
    assert other.sent == publish(V311, "t", b"x", flags=4, packet_id=2)


@pytest.mark.parametrize("member_kept", [False, True])
@pytest.mark.parametrize("lane", LANES)
async def test_a_share_group_whose_member_is_not_kept(lane: type[FastLane], member_kept: bool) -> None:
    world, _ = make_world(lane)
    if member_kept:  # so the group is, though its member that is here is not
        world.feed(connect(world, "away"), subscribe(V311, 1, ("$share/g/t", 2)))
        world.do("cut", "away", None)
        commit(world)
    other = watcher(world, topic_filter="$share/g/t")
    world.feed(connect(world, "p", V5), message(V5, 1))
    assert other.sent == b""
    fail(world)
    commit(world)
    assert other.sent == b""
    world.feed(world.clients["p"], message(V5, 2))
    commit(world)
    assert other.sent == publish(V311, "t", b"2", flags=4, packet_id=2)
    assert [row[1] for row in world.store.load().deliveries] == [1], "the member's copy is in no store"


async def test_what_waits_for_a_group_that_is_not_kept_is_taken_back() -> None:
    world, _ = make_world()
    other = watcher(world, V5, topic_filter="$share/g/t", receive_maximum=1)
    world.feed(connect(world, "p", V5), message(V5, 1) + message(V5, 2))
    (group,) = world.broker.shares.groups.values()
    assert len(group.queue) == 1
    fail(world)
    assert not group.queue
    commit(world)
    assert other.sent == b""


async def test_a_group_that_comes_to_be_kept_takes_its_queue_along() -> None:
    world, _ = make_world()
    watcher(world, V5, topic_filter="$share/g/t", receive_maximum=1)
    world.feed(connect(world, "p", V5), message(V5, 1) + message(V5, 2))
    joining = connect(world, "joining")
    (group,) = world.broker.shares.groups.values()
    batch = world.broker.keeper.take()
    world.feed(joining, subscribe(V311, 1, ("$share/g/t", 2)))
    world.broker.keeper.failed(batch, "no space", world.now)
    world._settle()
    assert not group.queue
    assert not world.broker.connections.sessions["joining"].inflight
    commit(world)
    assert world.store.load().deliveries == []


# Taps


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("version", [V311, V5])
@pytest.mark.parametrize("qos", [1, 2])
async def test_an_answer_let_go_behind_its_commit_does_not_depend_on_the_next_one(
    qos: int, version: ProtocolVersion, lane: type[FastLane]
) -> None:
    world, gate = make_world(lane)
    link = connect(world, "p", version)
    world.feed(link, message(version, 1, "held", qos=qos))
    commit(world)
    assert link.sent == b""
    world.feed(connect(world, "q", V5), message(V5, 9))  # something for the next batch
    release(world, gate)
    assert link.sent == (PUBACK if qos == 1 else PUBREC) + b"\1"
    fail(world)
    assert not link.ended
    commit(world)
    assert queued(world) == [b"1"]


@pytest.mark.parametrize("lane", LANES)
async def test_an_answer_let_go_before_its_commit_waits_for_it(lane: type[FastLane]) -> None:
    world, gate = make_world(lane)
    link = connect(world, "p", V5)
    world.feed(link, message(V5, 1, "held"))
    release(world, gate)
    assert link.sent == b""
    fail(world)
    assert link.sent == NO + b"\1\x97"
    assert queued(world) == []


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("version", [V311, V5])
async def test_a_message_that_is_held_is_held_on_the_next_connection_too(
    version: ProtocolVersion, lane: type[FastLane]
) -> None:
    world, gate = make_world(lane)
    world.feed(connect(world, "p", version), message(version, 1, "held"))
    commit(world)
    world.do("cut", "p", None)
    link = connect(world, "p", version)
    world.feed(link, message(version, 1, "held", dup=True) + message(version, 2, "t"))
    commit(world)
    assert link.sent == b""
    release(world, gate)
    commit(world)
    assert link.sent == PUBREC + b"\1" + PUBREC + b"\2"
    assert gate.seen == [b"1"]
    assert queued(world) == [b"1", b"2"]
    assert not world.broker.connections.sessions["p"].gates


@pytest.mark.parametrize("version", [V311, V5])
async def test_a_message_let_go_while_its_publisher_is_away_is_confirmed_at_once(version: ProtocolVersion) -> None:
    world, gate = make_world()
    world.feed(connect(world, "p", version), message(version, 1, "held"))
    commit(world)
    world.do("cut", "p", None)
    release(world, gate)
    link = connect(world, "p", version)
    world.feed(link, message(version, 1, "held", dup=True))
    commit(world)
    assert link.sent == PUBREC + b"\1"
    assert gate.seen == [b"1"]
    assert queued(world) == [b"1"]


@pytest.mark.parametrize("version", [V311, V5])
async def test_a_message_refused_while_its_publisher_is_away_is_shown_to_the_tap_alone(
    version: ProtocolVersion,
) -> None:
    world, gate = make_world()
    world.feed(connect(world, "p", version), message(version, 1, "held"))
    commit(world)
    world.do("cut", "p", None)
    release(world, gate, ReasonCode.QUOTA_EXCEEDED)
    link = connect(world, "p", version)
    world.feed(link, message(version, 1, "held", dup=True))
    commit(world)
    assert link.sent == b""
    release(world, gate)
    commit(world)
    assert link.sent == PUBREC + b"\1"
    assert gate.seen == [b"1", b"1"]
    assert queued(world) == [b"1"]


async def test_a_refused_3x_publisher_comes_again_and_its_subscribers_have_the_message_once() -> None:
    world, gate = make_world()
    other = watcher(world, topic_filter="held")
    link = connect(world, "p")
    world.feed(link, message(V311, 1, "held"))
    commit(world)
    release(world, gate, ReasonCode.QUOTA_EXCEEDED)
    assert link.ended
    for _ in range(2):
        link = connect(world, "p")
        world.feed(link, message(V311, 1, "held", dup=True))
        release(world, gate, ReasonCode.QUOTA_EXCEEDED)
        assert link.ended
    gate.refusing = ReasonCode.QUOTA_EXCEEDED
    link = connect(world, "p")
    world.feed(link, message(V311, 1, "held", dup=True))
    assert link.ended
    gate.refusing = None
    link = connect(world, "p")
    world.feed(link, message(V311, 1, "held", dup=True))
    release(world, gate)
    commit(world)
    assert link.sent == PUBREC + b"\1"
    assert other.sent == publish(V311, "held", b"1", flags=4, packet_id=1)
    assert queued(world) == [b"1"]


async def test_a_refused_5_0_publisher_has_its_identifier_free() -> None:
    world, gate = make_world()
    link = connect(world, "p", V5)
    world.feed(link, message(V5, 1, "held"))
    commit(world)
    release(world, gate, ReasonCode.QUOTA_EXCEEDED)
    session = world.broker.connections.sessions["p"]
    assert (session.received, session.received_kept, session.gates) == (set(), {}, {})
    fail(world)
    assert link.sent == b"", "after a kill it would be in use again, and the next message under it a repetition"
    commit(world)
    assert link.sent[2:5] == b"\0\1\x97"
    assert world.store.load().received == []


@pytest.mark.parametrize("released", [False, True])
async def test_after_a_kill_the_taps_see_again_what_they_had_not_let_go(released: bool) -> None:
    world, gate = make_world()
    world.feed(connect(world, "p"), message(V311, 1, "held"))
    commit(world)
    if released:
        release(world, gate)  # and the PUBREC is lost: whether it was let go is not known after a kill
    after = World(FastLane, world.setup)
    after.store = world.store
    again = Gate()
    after.broker.add_tap(again)
    Recovery(after.broker, after.store.load(), after.now).run()
    link = connect(after, "p")
    after.feed(link, message(V311, 1, "held", dup=True))
    commit(after)
    assert link.sent == b""
    assert again.seen == [b"1"]
    release(after, again)
    commit(after)
    assert link.sent == PUBREC + b"\1"
    assert queued(after) == [b"1"]
    after.feed(link, PUBREL + b"\1")
    commit(after)
    assert after.store.load().received == []


async def test_a_publisher_that_ends_its_session_takes_its_gates_along() -> None:
    world, gate = make_world()
    world.feed(connect(world, "p"), message(V311, 1, "held"))
    commit(world)
    world.do("cut", "p", None)
    link = world.connect("p", V311, clean_start=True)
    link.sent = b""
    release(world, gate)
    assert link.sent == b""
    world.feed(link, message(V311, 1, "t"))
    commit(world)
    assert link.sent == PUBREC + b"\1"
