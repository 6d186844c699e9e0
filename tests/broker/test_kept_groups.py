"""Share groups in the store: whose members were not kept at first."""

from __future__ import annotations

from typing import TypeAlias

import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.session import Delivery
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import PubAck, Subscribe, Subscription, Unsubscribe
from tests.lane_worlds import V5
from tests.store_play import Play, publish

Clock: TypeAlias = trio.testing.MockClock
GROUP = "$share/g/t"


def member(play: Play, name: str, *, kept: bool, **fields: int) -> None:
    play.connect(name, V5, kept=kept, **fields)
    play.send(name, Subscribe(1, (Subscription(GROUP, QoS(1)),)))


async def test_what_a_member_takes_along_outlives_a_kill(autojump_clock: Clock) -> None:
    play = Play()
    member(play, "k", kept=True)
    member(play, "other", kept=True)
    play.connect("p", V5, kept=False)
    play.send("p", publish(1, 1))
    play.send("p", publish(2, 1))
    play.world.commit()
    first, second = (name for name in ("k", "other") if play.world.broker.connections.sessions[name].inflight)
    for name in (first, second):
        play.send(name, Unsubscribe(2, (GROUP,)))
    play.world.commit()
    assert sorted(sent(play.restart().broker, first) + sent(play.restart().broker, second)) == [1, 2]


def waiting(broker: Broker) -> list[int]:
    return [int(delivery.message.payload) for delivery in broker.shares.groups[GROUP].queue]


def sent(broker: Broker, name: str) -> list[int]:
    entries = broker.connections.sessions[name].inflight.values()
    return [int(entry.message.payload) for entry in entries if isinstance(entry, Delivery)]


async def test_what_members_had_before_the_group_was_kept_stays_in_front(autojump_clock: Clock) -> None:
    play = Play()
    member(play, "a", kept=False, receive_maximum=2)
    member(play, "b", kept=False, receive_maximum=1)
    play.connect("p", V5, kept=False)
    for number in range(1, 8):
        play.world.now += 1
        play.send("p", publish(number, 1))
    member(play, "k", kept=True, receive_maximum=1)
    broker = play.world.broker
    assert [sent(broker, name) for name in "abk"] == [[1, 3], [2], [4]]
    assert waiting(broker) == [5, 6, 7]
    play.world.commit()
    again = play.restart().broker
    assert waiting(again) == [1, 2, 3, 4, 5, 6, 7]

    play.world.clients["k"].end(None, "cut")
    play.world.clients["a"].end(None, "cut")
    play.world.clients["b"].end(None, "cut")
    assert sorted(waiting(broker)) == [1, 2, 3, 4, 5, 6, 7]
    play.world.commit()
    again = play.restart().broker
    assert waiting(again) == [1, 2, 3, 4, 5, 6, 7]


async def test_what_a_member_acknowledges_then_is_gone(autojump_clock: Clock) -> None:
    play = Play()
    member(play, "a", kept=False)
    play.connect("p", V5, kept=False)
    for number in (1, 2, 3):
        play.send("p", publish(number, 1))
    member(play, "k", kept=True)
    play.send("a", PubAck(1), PubAck(3))
    play.world.commit()
    assert waiting(play.restart().broker) == [2]
    play.send("a", PubAck(2))
    play.world.commit()
    assert waiting(play.restart().broker) == []
    assert not play.world.store.state.deliveries
