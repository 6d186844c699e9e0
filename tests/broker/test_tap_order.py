"""In which order taps are asked, and who is not asked any more once one has refused [K10, K22]."""

from __future__ import annotations

import pytest

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.local import LocalPublisher
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, Rank, Refused, Tap, TapRoute, read_run
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import Will
from tests.broker.test_gates import LANES, NO, PUBREC, PUBREL, commit, connect, message, queued
from tests.lane_worlds import Setup, World
from tests.wire import V5, V311, publish, subscribe

CODE = ReasonCode.QUOTA_EXCEEDED


class Seer:
    """A tap that writes down what it was asked; refuses what is at QoS 1 or 2 while `refuses`."""

    def __init__(self, asked: list[str], name: str, rank: Rank | None) -> None:
        self.asked, self.name, self.refuses = asked, name, False
        if rank is not None:
            self.rank = rank

    def route(self, topic_name: str) -> TapRoute | None:
        return self

    def take_run(self, run: FrameRun) -> Answer:
        return self.take(read_run(run)[0])

    def take(self, message: Message) -> Answer:
        self.asked.append(self.name)
        return Refused(CODE) if self.refuses and message.qos else None


class Taps:
    """One of each rank, the last one first; and a session that is away and owed everything."""

    def __init__(self, lane: type[FastLane] = FastLane) -> None:
        self.world = World(lane, Setup(limits=Limits(), outbox_bytes=1_000_000, kept=True))
        self.asked: list[str] = []
        ranks = {"ships": Rank.SHIPS, "plain": None, "strict": Rank.REFUSES, "strict too": Rank.REFUSES}
        self.taps = {name: Seer(self.asked, name, rank) for name, rank in ranks.items()}
        for tap in self.taps.values():
            self.world.broker.add_tap(tap)
        self.world.feed(connect(self.world, "kept"), subscribe(V311, 1, ("#", 2)))
        self.world.do("cut", "kept", None)
        commit(self.world)

    def take_asked(self) -> list[str]:
        asked, self.asked[:] = list(self.asked), []
        return asked


@pytest.mark.parametrize("version", [V311, V5])
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_whoever_ships_is_asked_last_and_not_after_a_refusal(
    lane: type[FastLane], version: ProtocolVersion, qos: int
) -> None:
    """On the full path, which sees the first message of a topic, and on the fast lane."""
    taps = Taps(lane)
    link = connect(taps.world, "publisher", version)
    everybody = ["strict", "strict too", "plain", "ships"]

    def send(number: int) -> list[str]:
        taps.world.feed(link, publish(version, "t", b"%d" % number, flags=qos << 1, packet_id=number))
        return taps.take_asked()

    assert [send(1), send(2)] == [everybody, everybody]
    taps.taps["strict too"].refuses = True
    for number in (3, 4):
        assert send(number) == (["strict", "strict too"] if qos else everybody)
        if version == V311 and qos:
            assert link.ended
            link = connect(taps.world, "publisher", version)
    taps.taps["strict too"].refuses = False
    taps.taps["ships"].refuses = True
    assert send(5) == everybody, "what takes messages before another one refuses keeps them"
    assert queued(taps.world) == ([b"1", b"2"] if qos else [])


async def test_a_qos_2_message_that_comes_again_is_shown_in_the_same_order() -> None:
    taps = Taps()
    holds: list[Hold] = []

    def hold(message: Message) -> Answer:
        holds.append(Hold())
        return holds[-1]

    taps.taps["plain"].take = hold  # type: ignore[method-assign]
    link = connect(taps.world, "publisher", V311)
    taps.world.feed(link, message(V311, 7))
    holds[0].release(CODE)  # too late: the subscribers have it; its 3.x client sends it again
    taps.world._settle()
    taps.take_asked()
    for refuses, asked in ((True, ["strict"]), (False, ["strict", "strict too", "ships"])):
        taps.taps["strict"].refuses = refuses
        link = connect(taps.world, "publisher", V311)
        taps.world.feed(link, message(V311, 7, dup=True))
        assert taps.take_asked() == asked
    holds[-1].release()
    taps.world._settle()
    commit(taps.world)
    assert link.sent.startswith(PUBREC)
    assert queued(taps.world) == [b"7"]


async def test_an_identifier_that_was_refused_is_free() -> None:
    taps = Taps()
    taps.taps["strict"].refuses = True
    link = connect(taps.world, "publisher", V5)
    taps.world.feed(link, message(V5, 1))
    assert link.sent.startswith(NO[:1])
    taps.taps["strict"].refuses = False
    link.sent = b""
    taps.world.feed(link, message(V5, 1))
    commit(taps.world)
    assert link.sent[:1] == PUBREC[:1]
    taps.world.feed(link, PUBREL + b"\0\1")


async def test_what_comes_from_inside_is_shown_to_all_and_refused_by_nobody() -> None:
    taps = Taps()
    taps.taps["strict"].refuses = True
    everybody = ["strict", "strict too", "plain", "ships"]
    LocalPublisher(taps.world.broker, "inside", lambda: 0.0).publish([Message("t", b"inside", 1)], tapped=True)
    assert taps.take_asked() == everybody
    will = Will(topic_name="t", payload=b"will", qos=QoS(1))
    link = taps.world.connect("dies", V311, clean_start=True, will=will)
    link.end(None, "cut")
    taps.world._settle()
    assert taps.take_asked() == everybody
    assert queued(taps.world) == [b"inside", b"will"]


async def test_taps_without_a_rank_stay_in_their_order() -> None:
    world = World(FastLane, Setup(limits=Limits(), outbox_bytes=1_000_000))
    asked: list[str] = []
    taps: list[Tap] = [Seer(asked, str(number), None) for number in range(5)]
    for tap in taps:
        world.broker.add_tap(tap)
    assert world.broker.taps == taps
