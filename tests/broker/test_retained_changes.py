"""Retained messages of publishers that are told that their messages are not kept."""

from __future__ import annotations

import random
from typing import Any, TypeAlias

import attrs
import pytest
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.local import LocalPublisher
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.broker.retained_changes import RetainedChanges
from mqtt_trio.broker.store import Batch
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import Publish
from tests.lane_worlds import V4, V5
from tests.store_play import Play

Clock: TypeAlias = trio.testing.MockClock


class Retaining:
    """A broker with a few publishers of retained messages."""

    def __init__(self, **limits: Any) -> None:
        self.play = Play(**limits)
        self.broker = self.play.world.broker
        self.store = self.play.world.store
        self.packet_id = 0
        for name in ("p", "q", "r"):
            self.play.connect(name, V5, kept=False)

    def retain(self, who: str, payload: bytes, qos: int = 1, topic: str = "t") -> bytes:
        self.packet_id += 1
        packet = Publish(topic, payload, QoS(qos), retain=True, packet_id=self.packet_id if qos else None)
        return self.play.send(who, packet)

    def now(self, topic: str = "t") -> bytes | None:
        message = self.broker.retained.get(topic)
        return None if message is None else message.payload

    def stored(self, topic: str = "t") -> bytes | None:
        """What a broker has that the store makes now."""
        message = self.play.restart().broker.retained.get(topic)
        return None if message is None else message.payload

    def fail(self, batch: Batch | None = None) -> None:
        self.broker.keeper.failed(batch or self.broker.keeper.take(), "no space", 0.0)
        self.play.world._settle()


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("after", [b"new", b""])
async def test_a_refused_change_does_not_hold(
    autojump_clock: Clock, qos: int, before: bytes | None, after: bytes
) -> None:
    retaining = Retaining()
    if before is not None:
        retaining.retain("q", before)
        retaining.play.world.commit()
    retaining.retain("p", after, qos)
    assert retaining.now() == (after or None)
    retaining.play.connect("s", V5, kept=False)
    answer = retaining.play.fail("p")
    if before is None and not after:
        assert answer[:1] not in (b"\x40", b"\x50") or answer[4] == 0, "there was nothing to remove, nothing to refuse"
    else:
        assert (answer[0] >> 4, answer[4]) == ({1: 4, 2: 5}[qos], 0x97)
    assert retaining.now() == before
    assert retaining.broker.metrics.retained_messages == (before is not None)
    retaining.play.world.commit()
    assert retaining.stored() == before


async def test_a_store_that_had_written_although_it_failed_gets_the_former_one_again(autojump_clock: Clock) -> None:
    retaining = Retaining()
    retaining.retain("p", b"old")
    retaining.play.world.commit()
    retaining.retain("p", b"new")
    batch = retaining.broker.keeper.take()
    retaining.store.commit(batch)
    retaining.fail(batch)
    assert retaining.stored() == b"new"
    retaining.play.world.commit()
    assert retaining.stored() == retaining.now() == b"old"


async def test_what_was_accepted_stays(autojump_clock: Clock) -> None:
    retaining = Retaining()
    retaining.retain("p", b"first")
    batch = retaining.broker.keeper.take()
    retaining.retain("q", b"second")
    retaining.store.commit(batch)
    retaining.broker.keeper.committed(0.0)
    retaining.fail()
    assert retaining.now() == b"first"
    retaining.play.world.commit()
    assert retaining.stored() == b"first"


async def test_both_batches_of_a_failure_are_taken_back(autojump_clock: Clock) -> None:
    retaining = Retaining()
    retaining.retain("p", b"kept")
    retaining.play.world.commit()
    retaining.retain("p", b"first")
    batch = retaining.broker.keeper.take()
    retaining.retain("q", b"second")
    retaining.retain("p", b"third")
    retaining.fail(batch)
    assert retaining.now() == b"kept"
    retaining.play.world.commit()
    assert retaining.stored() == b"kept"


async def test_what_waits_for_nothing_stays_whatever_is_refused(autojump_clock: Clock) -> None:
    retaining = Retaining()
    local = LocalPublisher(retaining.broker, "bridge", lambda: 0.0)
    retaining.retain("p", b"refused")
    retaining.retain("q", b"at QoS 0", 0)
    retaining.retain("p", b"refused", 1, "u")
    local.set_retained(Message("u", b"from elsewhere", 1, True))
    retaining.retain("p", b"at QoS 0", 0, "v")
    retaining.retain("q", b"refused", 1, "v")
    retaining.fail()
    for topic, payload in {"t": b"at QoS 0", "u": b"from elsewhere", "v": b"at QoS 0"}.items():
        assert retaining.now(topic) == payload
    retaining.play.world.commit()
    assert [retaining.stored(topic) for topic in "tuv"] == [b"at QoS 0", b"from elsewhere", b"at QoS 0"]


async def test_a_3x_publisher_is_ended_and_its_message_gone(autojump_clock: Clock) -> None:
    retaining = Retaining()
    link = retaining.play.connect("old", V4, kept=False)
    retaining.retain("old", b"refused")
    retaining.fail()
    assert link.ended
    assert retaining.now() is None


async def test_a_former_message_that_does_not_fit_any_more_is_gone(autojump_clock: Clock) -> None:
    retaining = Retaining(retained_bytes=1000)
    retaining.retain("p", b"x" * 600)
    retaining.play.world.commit()
    retaining.retain("p", b"x")
    retaining.retain("q", b"y" * 600, 0, "u")
    retaining.fail()
    assert retaining.now() is None
    assert retaining.broker.metrics.retained_messages == 1
    retaining.play.world.commit()
    assert retaining.stored() is None


def lowered_to_one(retaining: Retaining, topics: int) -> Play:
    """Retain messages under `topics` topics, then restart with room for one of them."""
    for number in range(topics):
        retaining.retain("p", b"old", 1, f"r/{number}")
    retaining.play.world.commit()
    lowered = Play(retained_messages=1)
    lowered.world.store = retaining.store
    Recovery(lowered.world.broker, retaining.store.load(), 0.0).run()
    lowered.connect("p", V5, kept=False)
    return lowered


async def test_a_message_left_out_at_the_start_does_not_come_back(autojump_clock: Clock) -> None:
    retaining = Retaining()
    lowered = lowered_to_one(retaining, 3)
    kept = {message.topic_name for message in lowered.world.broker.retained}
    (left_out, other) = sorted({"r/0", "r/1", "r/2"} - kept)
    lowered.send("p", Publish(left_out, b"new", QoS(1), retain=True, packet_id=1))
    assert lowered.world.broker.metrics.retained_refused == 3
    lowered.world.commit()
    raised = Broker(Limits(), random_id=lambda: "x")
    Recovery(raised, retaining.store.load(), 0.0).run()
    assert {message.topic_name for message in raised.retained} == {*kept, other}


async def test_a_refused_message_leaves_alone_what_was_left_out_at_the_start(autojump_clock: Clock) -> None:
    retaining = Retaining()
    lowered = lowered_to_one(retaining, 2)
    (kept,) = (message.topic_name for message in lowered.world.broker.retained)
    (left_out,) = {"r/0", "r/1"} - {kept}
    lowered.send("p", Publish(kept, b"", QoS(0), retain=True))  # now there is room
    lowered.world.commit()
    lowered.send("p", Publish(left_out, b"new", QoS(1), retain=True, packet_id=1))
    lowered.fail("p")
    lowered.world.commit()
    assert [(row[0], row[1][-3:]) for row in retaining.store.load().retained] == [(left_out, b"old")]
    lowered.send("p", Publish(left_out, b"newer", QoS(1), retain=True, packet_id=2))
    lowered.world.commit()
    assert [row[1][-5:] for row in retaining.store.load().retained] == [b"newer"]
    assert not lowered.world.broker.keeper.left_out


async def test_a_removal_of_nothing_at_qos_2_undoes_nothing_behind_a_kill(autojump_clock: Clock) -> None:
    retaining = Retaining()
    play = retaining.play
    play.connect("p3", V4)
    removal = Publish("q", b"", QoS(2), retain=True, packet_id=7)
    assert play.send("p3", removal) == b"\x50\x02\x00\x07"
    retaining.retain("p", b"new", 1, "q")
    play.world.commit()
    world = play.restart()
    link = world.connect("p3", V4, clean_start=False)
    world.feed(link, encode(attrs.evolve(removal, dup=True), V4))
    kept = world.broker.retained.get("q")
    assert kept is not None
    assert kept.payload == b"new"


@pytest.mark.parametrize("seed", range(20))
def test_the_newest_change_that_was_not_taken_back_holds(seed: int) -> None:
    rng = random.Random(seed)
    changes, live, number = RetainedChanges(), dict[str, Message | None](), 0
    history: list[tuple[int, str, Message | None]] = []
    """Number (0: of what nobody takes back), topic, what it has since."""
    open_numbers: list[int] = []
    for _ in range(200):
        topic = rng.choice("ab")
        number += 1
        after = rng.choice([None, Message(topic, b"%d" % number)])
        what = rng.random()
        if what < 0.6:
            changes.note(number, topic, live.get(topic), after)
            history.append((number, topic, after))
            open_numbers.append(number)
            live[topic] = after
        elif what < 0.7:
            changes.settle(topic)
            history.append((0, topic, after))
            live[topic] = after
        elif what < 0.8 and open_numbers:
            last = rng.choice(open_numbers)
            changes.committed(last)
            open_numbers = [each for each in open_numbers if each > last]
        elif open_numbers:
            gone = open_numbers.pop(rng.randrange(len(open_numbers)))
            history = [change for change in history if change[0] != gone]
            if (found := changes.withdraw(gone)) is not None:
                live[found[0]] = found[1]
        for each in "ab":
            expected = [after for _, name, after in history if name == each]
            assert live.get(each) is (expected[-1] if expected else None)
    changes.committed(number)
    assert not changes._topics
    assert not changes._numbers
