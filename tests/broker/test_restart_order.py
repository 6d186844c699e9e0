"""What a restart takes for the order of sending."""

from __future__ import annotations

from typing import TypeAlias

import pytest
import trio.testing

from mqtt_trio.broker.session import Delivery
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import PubAck, PubComp, PubRec, Subscribe, Subscription
from tests.lane_worlds import V4, V5
from tests.store_play import Play, publish

Clock: TypeAlias = trio.testing.MockClock


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_retained_value_stays_in_front_of_a_newer_one(autojump_clock: Clock, qos: int) -> None:
    """The newer one was queued, and numbered, before the retained one was sent."""
    play = Play()
    play.connect("p", V4, kept=False)
    for number, topic in ((1, "r/a"), (2, "r/b"), (3, "r/t")):
        play.send("p", publish(number, qos, topic, retain=True))
    play.world.do("commit", "", None)
    play.connect("s", V5, receive_maximum=2)
    play.send("s", Subscribe(1, (Subscription("r/+", QoS(qos)),)))
    play.world.do("commit", "", None)
    play.send("p", publish(9, qos, "r/t"))
    play.world.do("commit", "", None)
    live = play.world.broker.connections.sessions["s"]
    for packet_id in (1, 2):
        play.send("s", PubAck(packet_id) if qos == 1 else PubRec(packet_id))
        play.world.do("commit", "", None)
        if qos == 2:
            play.send("s", PubComp(packet_id))
            play.world.do("commit", "", None)
    restored = play.restart().broker.connections.sessions["s"]
    for session in (live, restored):
        deliveries = [entry for entry in session.inflight.values() if isinstance(entry, Delivery)]
        owed = [d.message.payload for d in (*deliveries, *session.queue)]
        assert owed == [b"3", b"9"]
    assert list(live.inflight) == list(restored.inflight)


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_retained_value_stays_in_front_of_a_newer_one_over_two_restarts(
    autojump_clock: Clock, qos: int
) -> None:
    play = Play()
    play.connect("p", V4, kept=False)
    for number, topic in ((1, "r/a"), (3, "r/t")):
        play.send("p", publish(number, qos, topic, retain=True))
    play.world.do("commit", "", None)
    play.connect("s", V5, receive_maximum=1)
    play.send("s", Subscribe(1, (Subscription("r/+", QoS(qos)),)))
    play.commit("s")
    play.send("p", publish(9, qos, "r/t"))
    play.commit("s")
    play.send("s", PubAck(1) if qos == 1 else PubRec(1))
    play.commit("s")
    if qos == 2:
        play.send("s", PubComp(1))
        play.commit("s")
    play.world = play.restart()
    play.connect("s", V5, receive_maximum=2)  # so the newer one leaves the queue
    play.commit("s")
    session = play.restart().broker.connections.sessions["s"]
    deliveries = [entry for entry in session.inflight.values() if isinstance(entry, Delivery)]
    assert [delivery.message.payload for delivery in deliveries] == [b"3", b"9"]
    assert not session.queue
