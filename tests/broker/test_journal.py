"""What waits for the store, step by step: nothing that promises durability leaves before its batch is committed."""

from __future__ import annotations

from typing import TypeAlias

import pytest
import trio.testing

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.journal import Journal, merge
from mqtt_trio.broker.local import LocalPublisher
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.session import Delivery
from mqtt_trio.broker.store import Batch
from mqtt_trio.broker.tap import FrameRun
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import (
    MessageProperties,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
)
from tests.lane_worlds import V4, V5, NoLane
from tests.store_play import Play, publish

Clock: TypeAlias = trio.testing.MockClock
LANES = pytest.mark.parametrize("lane", [FastLane, NoLane], ids=["lane", "full"])
VERSIONS = pytest.mark.parametrize("version", [V4, V5])


@LANES
@VERSIONS
@pytest.mark.parametrize("online", [True, False])
async def test_a_puback_waits_for_the_message(
    autojump_clock: Clock, lane: type[FastLane], version: ProtocolVersion, online: bool
) -> None:
    play = Play(lane)
    link = play.subscriber("s", version, "t")
    play.connect("p", version, kept=False)
    if not online:
        link.end(None, "cut")
    for number in (1, 2, 3):  # the first one on the full path, the others in the lane
        assert play.send("p", publish(number, 1)) == b""
        assert not online or link.sent.count(b"t") >= number  # QoS 1 itself need not wait
        before = play.restart().broker.connections.sessions["s"]
        assert len(before.inflight) + len(before.queue) == number - 1
        assert play.commit("p") == b"\x40\x02\0" + bytes([number])
        again = play.restart().broker.connections.sessions["s"]
        assert len(again.inflight) + len(again.queue) == number


@LANES
async def test_without_a_kept_session_nothing_waits(autojump_clock: Clock, lane: type[FastLane]) -> None:
    play = Play(lane)
    play.connect("s", V5, kept=False)
    play.send("s", Subscribe(1, (Subscription("t", QoS(2)),)))
    play.connect("p", V5)
    play.world.commit()
    for number in (1, 2):
        assert play.send("p", publish(number, 1)) == b"\x40\x02\0" + bytes([number])
        assert play.send("p", publish(number + 10, 2)) == b"\x50\x02\0" + bytes([number + 10])
        assert play.send("p", PubRel(number + 10)) == b"\x70\x02\0" + bytes([number + 10])
    assert not play.world.broker.journal.dirty


@LANES
@VERSIONS
async def test_every_step_of_qos_2_waits(autojump_clock: Clock, lane: type[FastLane], version: ProtocolVersion) -> None:
    play = Play(lane)
    link = play.subscriber("s", version, "t", "warm")
    play.connect("p", version)
    play.send("p", publish(9, 0, "t"))  # the lane knows the topic
    play.world.do("commit", "", None)
    link.sent = b""
    assert play.send("p", publish(1, 2)) == b""
    assert link.sent == b""  # neither PUBREC nor PUBLISH before the commit
    assert play.commit("p") == b"\x50\x02\0\x01"
    assert link.sent.startswith(b"\x34")
    packet_id = link.session.next_id - 1  # type: ignore[union-attr]
    assert play.send("s", PubRec(packet_id)) == b""
    assert play.commit("s") == b"\x62\x02" + packet_id.to_bytes(2)
    assert play.send("p", PubRel(1)) == b""
    assert play.commit("p") == b"\x70\x02\0\x01"
    assert play.send("s", PubComp(packet_id)) == b""
    play.world.do("commit", "", None)
    again = play.restart()
    assert again.broker.connections.sessions["s"].inflight == {}
    assert again.broker.connections.sessions["p"].received == set()
    assert not play.world.store.state.deliveries
    assert not play.world.store.state.received


@VERSIONS
async def test_a_flow_goes_on_where_the_process_ended(autojump_clock: Clock, version: ProtocolVersion) -> None:
    play = Play()
    play.subscriber("s", version, "t")
    play.connect("p", version)
    play.send("p", publish(1, 2), publish(2, 2), publish(3, 1))
    play.world.do("commit", "", None)
    play.send("s", PubRec(1))
    play.world.do("commit", "", None)
    world = play.restart()
    session = world.broker.connections.sessions["s"]
    assert world.broker.connections.sessions["p"].received == {1, 2}
    fields = {"session_expiry_interval": 100} if version == V5 else {}
    link = world.connect("s", version, clean_start=False, **fields)
    world.do("commit", "", None)
    found = link.sent[link.sent.index(b"\x3a") if b"\x3a" in link.sent else 0 :]
    assert b"\x62\x02\0\x01" in found  # PUBREL of the first, PUBLISH with DUP of the others, under their identifiers
    assert list(session.inflight) == [1, 2, 3]
    assert found.count(b"\x3c") == 1
    assert found.count(b"\x3a") == 1


@LANES
@VERSIONS
async def test_answers_keep_their_order(autojump_clock: Clock, lane: type[FastLane], version: ProtocolVersion) -> None:
    """What needs no store does not overtake what does."""
    play = Play(lane)
    play.subscriber("s", version, "kept")
    play.connect("p", version, kept=False)
    play.send("p", publish(1, 0, "kept"), publish(1, 0, "free"))
    sent = play.send("p", publish(2, 1, "kept"), publish(3, 1, "free"), publish(4, 2, "free"), publish(5, 1, "kept"))
    assert sent == b""
    assert play.commit("p") == b"\x40\x02\0\x02\x40\x02\0\x03\x50\x02\0\x04\x40\x02\0\x05"
    assert play.send("p", publish(6, 1, "free")) == b"\x40\x02\0\x06"


@VERSIONS
async def test_subscriptions_are_confirmed_once_they_are_kept(autojump_clock: Clock, version: ProtocolVersion) -> None:
    play = Play()
    link = play.connect("s", version)
    link.sent = b""
    assert play.send("s", Subscribe(1, (Subscription("a", QoS(1)), Subscription("$share/g/b", QoS(2))))) == b""
    assert play.commit("s")[0] == 0x90
    restored = play.restart().broker
    assert set(restored.connections.sessions["s"].subscriptions) == {"a", "$share/g/b"}
    assert [group.name for group in restored.shares.groups.values()] == ["$share/g/b"]
    assert play.send("s", Unsubscribe(2, ("a",))) == b""
    assert play.commit("s")[0] == 0xB0
    assert set(play.restart().broker.connections.sessions["s"].subscriptions) == {"$share/g/b"}


@LANES
async def test_a_retained_message_is_kept_before_it_is_acknowledged(
    autojump_clock: Clock, lane: type[FastLane]
) -> None:
    play = Play(lane)
    play.connect("p", V5, kept=False)
    properties = MessageProperties(content_type="c", user_properties=(("k", "1"), ("k", "2")))
    assert play.send("p", publish(1, 1, "r", retain=True, properties=properties)) == b""
    assert play.commit("p") == b"\x40\x02\0\x01"
    (message,) = play.restart().broker.retained
    assert (message.topic_name, message.payload, message.qos, message.properties) == ("r", b"1", 1, properties)
    assert message.client_id == "p"
    play.send("p", Publish("r", b"", QoS(0), True))
    play.world.do("commit", "", None)
    assert not list(play.restart().broker.retained)


async def test_a_retained_message_that_expired_is_removed(autojump_clock: Clock) -> None:
    play = Play()
    play.connect("p", V5, kept=False)
    short = MessageProperties(message_expiry_interval=5)
    play.send("p", publish(1, 1, "r", retain=True, properties=short))
    play.world.do("commit", "", None)
    play.world.now += 6
    again = play.restart()
    assert not list(again.broker.retained)
    again.do("commit", "", None)
    assert not play.world.store.state.retained


async def test_expiry_and_wills_go_by_the_clock_on_the_wall(autojump_clock: Clock) -> None:
    play = Play()
    will = Will(topic_name="gone", payload=b"w", qos=QoS(1), will_delay_interval=50)
    play.subscriber("s", V5, "gone")
    play.world.clients["s"].end(None, "cut")
    link = play.connect("c", V5, will=will)
    play.world.do("commit", "", None)
    crashed = play.restart()  # the client was connected: its Will is due from now on
    session = crashed.broker.connections.sessions["c"]
    assert (session.will_at, session.deadline) == (50.0, 100.0)
    crashed.now = 50.0
    crashed.broker.run_deadlines(crashed.now)
    assert [d.message.payload for d in crashed.broker.connections.sessions["s"].queue] == [b"w"]
    link.end(None, "cut")
    play.world.do("commit", "", None)
    play.world.now = 60.0
    late = play.restart()  # its delay ran out while the broker was down
    assert [d.message.payload for d in late.broker.connections.sessions["s"].queue] == [b"w"]
    assert late.broker.connections.sessions["c"].will is None
    play.world.now = 101.0
    assert set(play.restart().broker.connections.sessions) == set()


async def test_a_clock_that_was_set_back_prolongs_nothing(autojump_clock: Clock) -> None:
    """Nobody waits for a Will longer than its delay, and a message gets no more time than its publisher gave it."""
    play = Play()
    play.subscriber("s", V5, "t")
    play.world.clients["s"].end(None, "cut")
    play.connect("c", V5, will=Will(topic_name="t", payload=b"w", qos=QoS(1), will_delay_interval=50))
    play.world.clients["c"].end(None, "cut")
    play.connect("p", V5, kept=False)
    short = MessageProperties(message_expiry_interval=30)
    play.send("p", publish(1, 1, retain=True, properties=short))
    play.world.commit()
    play.world.now = -10_000.0  # the store has dates, and the next start has an earlier one
    again = play.restart()
    sessions = again.broker.connections.sessions
    assert (sessions["c"].will_at, sessions["c"].deadline) == (-9950.0, -9900.0)
    (waiting,) = sessions["s"].queue
    (retained,) = again.broker.retained
    utc = -10_000.0 + again.broker.wall_offset
    assert waiting.message.expires_at == retained.expires_at == utc + 30


async def test_a_will_that_was_published_does_not_come_again(autojump_clock: Clock) -> None:
    play = Play()
    play.subscriber("s", V5, "gone")
    link = play.connect("c", V5, will=Will(topic_name="gone", payload=b"w", qos=QoS(1)))
    link.end(None, "cut")
    play.world.do("commit", "", None)
    again = play.restart()
    assert len(again.broker.connections.sessions["s"].inflight) == 1
    assert again.broker.metrics.wills_published == 0


async def test_a_clean_start_removes_everything(autojump_clock: Clock) -> None:
    play = Play()
    play.subscriber("s", V5, "t", "$share/g/u")
    play.connect("p", V5, kept=False)
    play.world.clients["s"].end(None, "cut")
    play.send("p", publish(1, 1), publish(2, 2), publish(3, 1, "u"))
    play.world.do("commit", "", None)
    state = play.world.store.state
    assert len(state.deliveries) == 3
    play.connect("s", V5, kept=False)
    play.world.do("commit", "", None)
    assert not any((state.sessions, state.groups, state.subscriptions, state.deliveries, state.received))


async def test_a_frame_is_stored_once_for_many(autojump_clock: Clock) -> None:
    play = Play()
    for number in range(5):
        play.subscriber(f"s{number}", V5, "t")
        if number % 2:
            play.world.clients[f"s{number}"].end(None, "cut")
    play.connect("p", V5, kept=False)
    state = play.world.store.state
    for number in (1, 2):  # full path, fast lane
        play.send("p", Publish("t", b"x" * 1000, QoS(1), packet_id=number))
        play.world.do("commit", "", None)
        assert len(state.deliveries) == 5 * number
        assert (
            sum(len(row[8] or b"") for row in state.deliveries.values()) + sum(map(len, state.contents.values()))
            < number * 2200
        )
    again = play.restart()
    assert {d.message.payload for d in again.broker.connections.sessions["s1"].queue} == {b"x" * 1000}
    for number in range(0, 5, 2):
        play.send(f"s{number}", PubAck(1), PubAck(2))
    for number in range(1, 5, 2):
        play.connect(f"s{number}", V5)
        play.send(f"s{number}", PubAck(1), PubAck(2))
    play.world.do("commit", "", None)
    assert not state.deliveries
    assert not state.contents


@LANES
async def test_a_queue_survives_in_its_order(autojump_clock: Clock, lane: type[FastLane]) -> None:
    play = Play(lane)
    play.subscriber("s", V5, "t")
    play.world.clients["s"].end(None, "cut")
    play.connect("p", V4, kept=False)
    play.send("p", *(publish(number, 1 + number % 2) for number in range(1, 9)))
    play.world.do("commit", "", None)
    queue = play.restart().broker.connections.sessions["s"].queue
    assert [(d.message.payload, d.qos) for d in queue] == [(b"%d" % n, 1 + n % 2) for n in range(1, 9)]
    assert queue.size == sum(d.message.size for d in queue)


# A store that takes nothing


@LANES
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_message_that_cannot_be_kept_is_refused(
    autojump_clock: Clock, lane: type[FastLane], qos: int, online: bool
) -> None:
    play = Play(lane)
    link = play.subscriber("s", V5, "t")
    if not online:
        link.end(None, "cut")
    play.connect("p", V5)
    play.send("p", publish(9, 0))
    play.world.do("commit", "", None)
    link.sent = b""
    assert play.send("p", publish(1, qos)) == b""  # caught in the batch that fails
    kind = 0x40 if qos == 1 else 0x50
    refused = play.fail("p")
    assert refused[:1] == bytes([kind])
    assert refused[2:5] == b"\0\x01\x97"
    refused = play.send("p", publish(2, qos))  # while it fails
    assert refused[:1] == bytes([kind])
    assert refused[2:5] == b"\0\x02\x97"
    assert play.world.broker.metrics.refused_by_store == 2
    assert play.send("p", publish(3, qos, "free"))[:1] == bytes([kind])  # nobody keeps it
    play.world.do("commit", "", None)
    assert play.send("p", publish(1, qos)) == b""  # the identifier is free again
    assert play.commit("p") == bytes([kind, 2, 0, 1])
    session = play.restart().broker.connections.sessions["s"]
    kept = [entry for entry in session.inflight.values() if isinstance(entry, Delivery)] + list(session.queue)
    sent_before = 1 if online and qos == 1 else 0  # it had left already
    assert [d.message.payload for d in kept] == [b"1"] * (1 + sent_before)


async def test_a_3_x_publisher_is_disconnected_and_sends_again(autojump_clock: Clock) -> None:
    play = Play()
    play.subscriber("s", V5, "t")
    link = play.connect("p", V4)
    play.world.do("commit", "", None)
    play.send("p", publish(1, 1))
    play.fail("p")
    assert link.ended
    assert "no space" in link.end_text
    link = play.connect("p", V4)
    play.send("p", publish(1, 1))
    assert link.ended
    play.world.do("commit", "", None)
    link = play.connect("p", V4)
    link.sent = b""
    play.send("p", publish(1, 1))
    assert play.commit("p") == b"\x40\x02\0\x01"


async def test_everything_else_goes_on_while_the_store_fails(autojump_clock: Clock) -> None:
    play = Play()
    subscriber = play.subscriber("s", V5, "t", "q0")
    play.connect("p", V5, kept=False)
    play.send("p", publish(1, 1))
    play.world.do("commit", "", None)
    play.send("s", Subscribe(2, (Subscription("more", QoS(1)),)))
    assert play.fail("s")[:1] == b"\x90"  # what was caught is confirmed: it holds
    assert play.send("s", Subscribe(3, (Subscription("others", QoS(1)),)))[:1] == b"\x90"
    subscriber.sent = b""
    play.send("p", publish(0, 0, "q0"))
    assert b"q0" in subscriber.sent
    play.send("p", Publish("kept", b"x", QoS(0), True))
    play.send("s", PubAck(1))
    play.world.clients["s"].end(None, "cut")
    play.world.do("fail", "", None)
    play.world.do("commit", "", None)
    again = play.restart().broker
    session = again.connections.sessions["s"]
    assert set(session.subscriptions) == {"t", "q0", "more", "others"}
    assert not session.inflight
    assert [message.topic_name for message in again.retained] == ["kept"]
    assert session.ended_at is not None


async def test_steps_of_a_flow_wait_until_the_store_takes_them(autojump_clock: Clock) -> None:
    play = Play()
    play.subscriber("s", V5, "t")
    play.connect("p", V5)
    play.send("p", publish(1, 2))
    play.world.do("commit", "", None)
    assert play.send("s", PubRec(1)) == b""
    assert play.send("p", PubRel(1)) == b""
    assert play.fail("s") == b""
    assert play.fail("p") == b""
    link = play.world.clients["s"]
    link.sent = b""
    assert play.commit("p") == b"\x70\x02\0\x01"
    assert link.sent == b"\x62\x02\0\x01"


async def test_publishers_wait_while_the_journal_is_full(autojump_clock: Clock) -> None:
    play = Play()
    play.subscriber("s", V5, "t")
    play.world.clients["s"].end(None, "cut")
    play.world.broker.journal.limit = 10_000
    link = play.connect("p", V5)
    session = play.world.broker.connections.sessions["s"]
    for number in range(1, 40):
        play.send("p", publish(number, 1, properties=MessageProperties(content_type="x" * 200)))
    assert link.paused
    assert 10 < len(session.queue) < 39
    for _ in range(5):
        play.world.do("commit", "", None)
    assert len(session.queue) == 39
    assert not play.world.broker.stopped
    assert link.sent.count(b"\x40\x02") > 0


async def test_merging_keeps_the_last_word(autojump_clock: Clock) -> None:
    message = Message("t", b"x", 1)
    first, later = Journal(), Journal()
    for number in range(3):
        first.add(1, Delivery(message, 1), number)
    later.last_number = first.last_number
    batch = first.take()
    later.move(1, 1, 7, 1)
    later.done(2)
    later.done(99)
    later.move(50, 1, 3, 2)
    later.batch.sessions[4] = None
    batch.subscriptions[4, "a"] = (4, "a", 1, None)
    batch.received[4, 5] = True
    merge(batch, later.batch)
    assert [row[:3] for row in batch.deliveries.values()] == [(1, 1, 7), (3, 1, 2)]
    assert batch.done == [2, 99]  # the failed batch may be there after all
    assert batch.moves == {50: (1, 3, 2)}
    assert not batch.subscriptions
    assert not batch.received
    assert not batch.empty
    assert Batch().empty


async def test_what_a_gateway_brings_is_kept(autojump_clock: Clock) -> None:
    play = Play()
    play.subscriber("s", V5, "t")
    local = LocalPublisher(play.world.broker, "gateway", lambda: play.world.now)
    for number in range(1, 4):
        frame = encode(publish(number, 1), V5)
        local.publish_runs([FrameRun(frame, 1, 1, V5, "elsewhere", 0.0)])
    local.publish([Message("t", b"4", 1)])
    play.world.do("commit", "", None)
    assert [lane.outbox.frames for lane in local._lanes] == [[], []]
    assert [lane.outbox.held_acks for lane in local._lanes] == [0, 0]
    assert len(play.restart().broker.connections.sessions["s"].inflight) == 4


async def test_a_full_journal_of_a_failing_store_stops_nobody(autojump_clock: Clock) -> None:
    play = Play()
    play.subscriber("s", V5, "t")
    play.world.broker.journal.limit = 1000
    link = play.connect("p", V5, kept=False)
    play.send("p", *(publish(number, 1) for number in range(1, 4)))
    play.fail("p")
    play.send("p", *(publish(0, 0, f"r/{number}", retain=True) for number in range(20)))
    play.fail("p")
    assert play.send("p", publish(9, 1))[2:5] == b"\0\x09\x97"
    assert not link.paused


async def test_a_suback_that_the_client_does_not_take_ends_it(autojump_clock: Clock) -> None:
    play = Play()
    link = play.connect("s", V5, maximum_packet_size=20)
    play.send("s", Subscribe(1, tuple(Subscription(f"t/{number}", QoS(1)) for number in range(30))))
    assert link.ended
    assert link.end_reason == ReasonCode.PACKET_TOO_LARGE
    assert play.world.broker.metrics.client_failures == 0
