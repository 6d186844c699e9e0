"""The queue of a session: made when something waits, so that idle ones cost little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.queues import NOTHING_WAITS, MessageQueue
from mqtt_trio.broker.session import Delivery, Session
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import Subscribe, Subscription
from tests.lane_worlds import V5
from tests.store_play import Play, publish


@pytest.mark.parametrize("add", [lambda queue, one: queue.put_last(one), lambda queue, one: queue.put_back([one])])
def test_nobody_adds_to_the_queue_that_all_share(add: Callable[[MessageQueue, Delivery], Any]) -> None:
    with pytest.raises(TypeError, match="a queue of its own"):
        add(NOTHING_WAITS, Delivery(Message("t"), 1))
    assert not NOTHING_WAITS
    assert (NOTHING_WAITS.size, NOTHING_WAITS.added, NOTHING_WAITS.drop_all()) == (0, 0, 0)


def test_a_queue_stays_its_owners() -> None:
    one, two = Session("1"), Session("2")
    assert one.queue is two.queue is NOTHING_WAITS
    one.own_queue().put_last(Delivery(Message("t"), 1))
    assert one.own_queue() is one.queue
    assert (len(one.queue), len(two.queue)) == (1, 0)
    assert two.own_queue() is not one.queue


@pytest.mark.parametrize("kept", [False, True])
async def test_what_waits_for_one_waits_for_it_alone(kept: bool) -> None:
    play = Play()
    for name in ("a", "b"):
        play.connect(name, V5, kept=kept, receive_maximum=1)
        play.send(name, Subscribe(1, (Subscription(f"{name}/t", QoS(1)),)))
    play.connect("p", V5, kept=False)
    for number in range(1, 4):
        play.send("p", publish(number, 1, "a/t"))
    play.world.commit()
    sessions = play.world.broker.connections.sessions
    assert [len(sessions[name].queue) for name in ("a", "b", "p")] == [2, 0, 0]
    assert play.world.broker.metrics.messages_queued == 2
    if kept:
        again = play.restart().broker.connections.sessions
        assert [len(again[name].queue) for name in ("a", "b")] == [2, 0]
    assert len(NOTHING_WAITS) == 0
