"""Clients that take small packets only [MQTT5-3.1.2-24]: none is larger, whatever it says, and no error is ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import pytest
import trio.testing

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import QoS, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import (
    Auth,
    Connect,
    Packet,
    PingReq,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Subscription,
    Unsubscribe,
)
from mqtt_trio.protocol.wire import read_header
from tests.lane_worlds import V5, RecordingLink, Setup, World
from tests.store_play import Play, publish

Clock: TypeAlias = trio.testing.MockClock
FITS = 16
"""From this Maximum Packet Size on, a CONNACK fits."""
spec_size = pytest.mark.spec("MQTT5-3.1.2-24")


def sizes(sent: bytes) -> Iterator[int]:
    start = 0
    while start < len(sent):
        header = read_header(sent, start)
        assert header is not None
        yield header[1] - start
        start = header[1]


class Talk:
    """A client with a Maximum Packet Size in a world with a store, rules and narrow limits."""

    def __init__(self, size: int, *, kept: bool) -> None:
        limits = Limits(topic_levels=3, subscriptions_per_client=5)
        self.world = World(FastLane, Setup(limits=limits, outbox_bytes=1_000_000, kept=True, ruled=True))
        self.other = self.world.connect("k", V5, clean_start=False, session_expiry_interval=9)
        self.world.feed(self.other, encode(WANTED, V5))
        self.world.commit()
        expiry = 100 if kept else None
        self.link = self.world.connect(
            "c", V5, clean_start=not kept, session_expiry_interval=expiry, maximum_packet_size=size
        )

    def say(self, *packets: Packet) -> None:
        if not self.link.ended:
            self.world.feed(self.link, b"".join(encode(packet, V5) for packet in packets))


WANTED = Subscribe(1, (Subscription("t", QoS(2)), Subscription("a/#", QoS(2))))
"""By another client, whose session is kept, so that answers wait for the store."""
DEEP = "a/b/c/d/e"
SAID: list[tuple[Packet, ...]] = [
    (publish(1, 1), publish(2, 2), publish(2, 2), PubRel(2)),
    (PubRel(9), PubRec(9), PubComp(9), PubAck(9), PingReq()),
    (publish(1, 1, "x"), publish(2, 2, "x"), PubRel(2)),
    (publish(1, 1, DEEP), publish(2, 2, DEEP)),
    (Subscribe(1, (Subscription("a/b", QoS(2)),)),),
    (Subscribe(1, tuple(Subscription(f"s/{number}", QoS(1)) for number in range(12))),),
    (Unsubscribe(1, tuple(f"s/{number}" for number in range(12))),),
    (Unsubscribe(1, ("a/b",)),),
    (Auth(ReasonCode.RE_AUTHENTICATE, "method"),),
    (Publish(DEEP, b"at QoS 0"),),
    (Publish("a", b"", topic_alias=7),),
]


@spec_size
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("size", range(1, 41))
async def test_no_answer_is_larger_than_the_client_takes(autojump_clock: Clock, size: int, kept: bool) -> None:
    for said in SAID:
        for what in ("commit", "fail"):
            talk = Talk(size, kept=kept)
            talk.say(*said)
            talk.world.do(what, "", None)
            talk.say(publish(77, 1), publish(78, 2))
            talk.world.do("commit", "", None)
            talk.say(PubRel(500), Auth(ReasonCode.RE_AUTHENTICATE, "none"))  # a Protocol Error: DISCONNECT
            assert talk.link.ended
            assert max(sizes(talk.link.sent), default=0) <= size
            assert talk.world.broker.metrics.client_failures == 0
            assert not talk.other.ended


@spec_size
@pytest.mark.parametrize("size", range(1, 41))
async def test_whoever_gets_a_connack_gets_every_short_answer(autojump_clock: Clock, size: int) -> None:
    """No answer without a list is larger than a CONNACK: so what waits for the store fits, too."""
    talk = Talk(size, kept=True)
    assert talk.link.ended == (size < FITS)
    if talk.link.ended:
        assert talk.link.sent == b""
        assert talk.link.end_reason is ReasonCode.PACKET_TOO_LARGE
        return
    for said in SAID[:4]:
        for what in ("commit", "fail", "commit"):
            talk.say(*said)
            talk.world.do(what, "", None)
    assert not talk.link.ended


@spec_size
async def test_a_session_whose_connack_does_not_fit_is_no_member_that_is_here(autojump_clock: Clock) -> None:
    play = Play()
    for name in ("a", "b"):
        play.connect(name, V5)
        play.send(name, Subscribe(1, (Subscription("$share/g/t", QoS(1)),)))
    play.connect("p", V5, kept=False)
    play.world.clients["a"].end(None, "cut")
    link = play.connect("a", V5, maximum_packet_size=9)
    assert link.ended
    assert link.sent == b""
    session = play.world.broker.connections.sessions["a"]
    (group,) = play.world.broker.shares.groups.values()
    assert session.link is None
    assert not session.resending
    assert [member.client_id for member in group.turns] == ["b"]
    for number in range(1, 5):
        play.send("p", publish(number, 1))
    assert len(play.world.broker.connections.sessions["b"].inflight) == 4
    play.world.clients["b"].end(None, "cut")
    assert not group.turns
    play.send("p", publish(5, 1))
    play.connect("a", V5)
    assert len(session.inflight) == 5


@spec_size
@pytest.mark.parametrize("size", [1, 2, 4, 5, 40])
async def test_a_refusal_that_does_not_fit_is_left_out(autojump_clock: Clock, size: int) -> None:
    play = Play()
    link = RecordingLink(play.world.broker, "x")
    play.world.links.append(link)
    wrong = Connect(client_id="c", protocol_version=V5, maximum_packet_size=size, authentication_method="unknown")
    play.world.feed(link, encode(wrong, V5))
    assert link.ended
    assert max(sizes(link.sent), default=0) <= size
    assert play.world.broker.metrics.client_failures == 0
