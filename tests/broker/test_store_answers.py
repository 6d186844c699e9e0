"""What publishers are told while the store takes nothing, and what becomes of their QoS 2 messages then."""

from __future__ import annotations

import pytest

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ProtocolVersion
from tests.lane_worlds import NoLane, RecordingLink, Setup, World
from tests.wire import V5, V311, publish, subscribe

PUBREC = b"\x50\x02\x00"
PUBREL = b"\x62\x02\x00"
PUBCOMP = b"\x70\x02\x00"
LANES = [FastLane, NoLane]


def make_world(lane: type[FastLane] = FastLane) -> World:
    """Return a world where the absent client `queue` has a subscription to `t`, which the store has."""
    world = World(lane, Setup(limits=Limits(), outbox_bytes=1_000_000, kept=True))
    link = connect(world, "queue")
    world.feed(link, subscribe(V311, 1, ("t", 2)))
    world.do("cut", "queue", None)
    commit(world)
    return world


def connect(world: World, client_id: str, version: ProtocolVersion = V311) -> RecordingLink:
    """Connect with a session that is kept, and forget the CONNACK."""
    extra = {"session_expiry_interval": 3600} if version == V5 else {}
    link = world.connect(client_id, version, clean_start=False, **extra)
    link.sent = b""
    return link


def commit(world: World) -> None:
    world.do("commit", "", None)


def fail(world: World) -> None:
    world.do("fail", "", None)


def queued(world: World) -> list[bytes]:
    return [delivery.message.payload for delivery in world.broker.connections.sessions["queue"].queue]


def message(version: ProtocolVersion, number: int, *, dup: bool = False, qos: int = 2) -> bytes:
    return publish(version, "t", b"%d" % number, flags=qos << 1 | 8 * dup, packet_id=number)


@pytest.mark.spec("MQTT3-4.3.3-1")
@pytest.mark.parametrize("lane", LANES)
async def test_all_that_a_3x_client_had_under_way_is_new_when_it_comes_again(lane: type[FastLane]) -> None:
    world = make_world(lane)
    link = connect(world, "p")
    world.feed(link, message(V311, 1) + message(V311, 2) + message(V311, 3))
    fail(world)
    assert link.ended
    assert queued(world) == []
    commit(world)
    link = connect(world, "p")
    world.feed(link, b"".join(message(V311, number, dup=True) for number in (1, 2, 3)))
    commit(world)
    assert link.sent == b"".join(PUBREC + bytes([number]) for number in (1, 2, 3))
    assert queued(world) == [b"1", b"2", b"3"]


@pytest.mark.spec("MQTT5-4.3.3-8")
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("version", [V311, V5])
async def test_a_message_whose_connection_ended_before_the_store_failed_is_new(
    version: ProtocolVersion, lane: type[FastLane]
) -> None:
    world = make_world(lane)
    world.feed(connect(world, "p", version), message(version, 1))
    world.do("cut", "p", None)
    fail(world)
    assert queued(world) == []
    commit(world)
    link = connect(world, "p", version)
    world.feed(link, message(version, 1, dup=True))
    commit(world)
    assert link.sent == PUBREC + b"\1"
    assert queued(world) == [b"1"]
    assert world.restarted()["queue"]["queue"] == world.state()["queue"]["queue"]


@pytest.mark.spec("MQTT5-4.3.3-10")
@pytest.mark.parametrize("version", [V311, V5])
async def test_a_message_that_the_store_has_is_confirmed_again_while_it_takes_nothing(version: ProtocolVersion) -> None:
    world = make_world()
    world.feed(connect(world, "p", version), message(version, 1))
    commit(world)
    world.do("cut", "p", None)
    link = connect(world, "p", version)
    world.feed(link, message(version, 1, dup=True))
    fail(world)
    assert link.sent == PUBREC + b"\1"
    assert not link.ended
    commit(world)
    assert queued(world) == [b"1"]


@pytest.mark.parametrize("lane", LANES)
async def test_what_needs_no_store_is_confirmed_in_its_turn(lane: type[FastLane]) -> None:
    world = make_world(lane)
    link = connect(world, "p", V5)
    world.feed(link, message(V5, 1, qos=1) + publish(V5, "elsewhere", b"x", flags=2, packet_id=2))
    assert link.sent == b""
    fail(world)
    assert link.sent == b"\x40\x03\x00\x01\x97" + b"\x40\x02\x00\x02"


@pytest.mark.spec("MQTT5-4.3.3-11")
async def test_a_second_pubrel_is_answered_when_the_store_has_freed_its_identifier() -> None:
    world = make_world()
    link = connect(world, "p")
    world.feed(link, message(V311, 1))
    commit(world)
    world.feed(link, PUBREL + b"\1")
    world.do("cut", "p", None)
    link = connect(world, "p")
    world.feed(link, PUBREL + b"\1")
    assert link.sent == b""
    commit(world)
    assert link.sent == PUBCOMP + b"\1"


@pytest.mark.parametrize("size", [1, 500])
async def test_what_was_taken_back_is_not_in_a_store_that_kept_the_failed_batch(size: int) -> None:
    world = make_world()
    world.feed(connect(world, "other"), subscribe(V311, 1, ("t", 1)))
    commit(world)
    world.feed(connect(world, "p", V5), publish(V5, "t", b"x" * size, flags=2, packet_id=1))
    world.feed(world.clients["other"], b"\x40\x02\x00\x01")
    batch = world.broker.keeper.take()
    world.store.commit(batch)
    world.broker.keeper.failed(batch, "an error behind the last write", world.now)
    commit(world)
    state = world.store.load()
    assert (state.deliveries, state.contents) == ([], {})


def make_group(world: World, *levels: int) -> list[RecordingLink]:
    """Connect members of one group, each with a QoS; the client `queue` of the world is none of them."""
    links = []
    for number, qos in enumerate(levels):
        links.append(connect(world, f"m{number}"))
        world.feed(links[-1], subscribe(V311, 1, ("$share/g/s", qos)))
    commit(world)
    for link in links:
        link.sent = b""
    return links


@pytest.mark.spec("MQTT5-4.8.2-5")
@pytest.mark.parametrize("lane", LANES)
async def test_a_refused_message_of_a_group_is_not_given_to_another_member(lane: type[FastLane]) -> None:
    world = make_world(lane)
    low, high = make_group(world, 1, 2)
    world.feed(connect(world, "p", V5), publish(V5, "s", b"x", flags=4, packet_id=1))
    assert low.sent == publish(V311, "s", b"x", flags=2, packet_id=1)
    fail(world)
    low.end(None, "cut")
    commit(world)
    assert high.sent == b""
    (left,) = world.state()["m0"]["inflight"]  # what has left at QoS 1 may come to an end
    assert world.restarted()["m0"]["inflight"] == [left]


@pytest.mark.spec("MQTT5-4.8.2-5")
async def test_a_refused_message_that_a_group_had_handed_on_is_taken_back() -> None:
    world = make_world()
    low, high = make_group(world, 1, 2)
    world.feed(connect(world, "p", V5), publish(V5, "s", b"x", flags=4, packet_id=1))
    low.end(None, "cut")
    assert world.broker.connections.sessions["m1"].inflight
    fail(world)
    commit(world)
    assert high.sent == b""
    assert not world.broker.connections.sessions["m1"].inflight
    assert world.store.load().deliveries == []
