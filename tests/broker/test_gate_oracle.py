"""A random play of everything that may say no to a publish: a store that fails, also after it has written, taps that
hold and refuse, kills in between, with subscribers that are kept, that are not, and that share. What clients may rely
on is looked at from outside: nothing acknowledged is lost, nothing at QoS 2 comes twice, order holds, and nothing is
shipped elsewhere that another tap refuses."""

from __future__ import annotations

import random
from typing import Any, Final

import attrs
import pytest

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.lane_frames import first_frame
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, Rank, Refused, TapRoute, read_run
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from tests.lane_worlds import NoLane, RecordingLink, Setup, World
from tests.wire import V5, V311, ack, publish, subscribe

BLOCKS, PER_BLOCK = 8, 100
STEPS: Final = 120
TAP_SAYS_NO: Final = ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
"""Differs from what is said for the store."""


class Gate:
    """A tap that holds what comes to topics below `held`; what it let go is on record beyond all kills."""

    def __init__(self, record: set[int], refused: set[int], rng: random.Random) -> None:
        self.record = record
        self.rng = rng
        self.holds: list[tuple[Hold, int]] = []
        self.refused = refused
        self.taken: int | None = None
        """The number that came last, unless it was refused."""

    def route(self, topic_name: str) -> TapRoute | None:
        return self if topic_name.startswith("held") else None

    def take_run(self, run: FrameRun) -> Answer:
        return self.take(read_run(run)[0])

    def take(self, message: Message) -> Answer:
        if not message.qos:
            return None
        self.taken = None
        if self.rng.random() < 0.03:
            self.refused.add(int(message.payload))
            return Refused(TAP_SAYS_NO)
        self.taken = int(message.payload)
        hold = Hold()
        self.holds.append((hold, int(message.payload)))
        return hold

    def release(self, refused: bool) -> None:
        if not self.holds:
            return
        hold, number = self.holds.pop(self.rng.randrange(len(self.holds)))
        (self.refused if refused else self.record).add(number)
        hold.release(TAP_SAYS_NO if refused else None)


class Shipper:
    """A tap that is there before the gate, asked behind it, and may refuse as well. What it took is gone elsewhere."""

    rank = Rank.SHIPS

    def __init__(self, gate: Gate, shipped: set[int]) -> None:
        self.gate = gate
        self.shipped = shipped

    def route(self, topic_name: str) -> TapRoute | None:
        return self

    def take_run(self, run: FrameRun) -> Answer:
        return self.take(read_run(run)[0])

    def take(self, message: Message) -> Answer:
        number = int(message.payload)
        if message.topic_name.startswith("held"):
            assert self.gate.taken == number, f"{number} is shipped although the gate refused it, or was not asked"
        if self.gate.rng.random() < 0.02:
            self.gate.refused.add(number)
            return Refused(TAP_SAYS_NO)
        self.shipped.add(number)
        return None


@attrs.define(eq=False)
class Device:
    """A client that follows the rules and forgets nothing: what it has sent, what it was sent."""

    name: str
    version: ProtocolVersion
    kept: bool
    filters: tuple[str, ...] = ()
    window: int = 3
    link: RecordingLink | None = None
    read: int = 0
    subscribed: bool = False
    life: int = 0
    """How many sessions it had."""
    next_id: int = 1
    open: dict[int, tuple[int, str, int, bool]] = attrs.Factory(dict)
    """By Packet Identifier: number, topic, QoS, whether its PUBREC came."""
    ids: set[int] = attrs.Factory(set)
    """QoS 2 identifiers that the broker has not released."""
    got: list[tuple[int, int, str, int]] = attrs.Factory(list)
    """Life, number, topic, QoS of whatever was new to it."""


class Play:
    """One seed."""

    def __init__(self, seed: int, lane: type[FastLane]) -> None:
        self.rng = random.Random(seed)
        self.lane = lane
        self.record: set[int] = set()
        self.refused_by_tap: set[int] = set()
        self.shipped: set[int] = set()
        self.acked: dict[int, tuple[str, str, int]] = {}
        self.refused_by_store: set[int] = set()
        self.sent: dict[int, tuple[str, str, int]] = {}
        self.outage: set[int] = set()
        """Messages of 5.0 publishers that may have been refused. One that did not hear of it sends the message again,
        behind others."""
        self.number = 0
        self.out: Batch | None = None
        self.store = MemoryStore()
        self.written_though_failed = False
        self.publishers = [Device("p0", V311, True), Device("p1", V5, True), Device("p2", V5, True)]
        self.subscribers = [
            Device("kept", V311, True, ("#",)),
            Device("kept5", V5, True, ("held/#", "t"), window=1),
            Device("loose", V5, False, ("#",), window=2),
            Device("loose3", V311, False, ("#",)),
            Device("share", V5, True, ("$share/g/#",), window=2),
            Device("share-loose", V311, False, ("$share/g/#",)),
        ]
        self.begin()

    # The broker

    def begin(self) -> None:
        setup = Setup(limits=Limits(queue_messages=10_000), outbox_bytes=1_000_000, kept=True)
        self.world = World(self.lane, setup)
        self.world.store = self.store
        self.gate = Gate(self.record, self.refused_by_tap, self.rng)
        self.world.broker.add_tap(Shipper(self.gate, self.shipped))
        self.world.broker.add_tap(self.gate)
        Recovery(self.world.broker, self.store.load(), 0.0).run()
        self.out = None
        for device in (*self.publishers, *self.subscribers):
            device.link = None

    def kill(self) -> None:
        if self.out is not None and self.rng.random() < 0.5:
            self.store.commit(self.out)  # it was written, nobody was told
        self.begin()

    def take(self) -> None:
        if self.out is None and self.world.broker.journal.dirty:
            self.out = self.world.broker.keeper.take()

    def settle(self, works: bool) -> None:
        """The commit that is out ends, well or not."""
        self.take()
        if self.out is None:
            return
        batch, self.out = self.out, None
        if works:
            self.store.commit(batch)
            self.world.broker.keeper.committed(0.0)
            self.written_though_failed = False
        else:
            if self.rng.random() < 0.2:
                self.store.commit(batch)
                self.written_though_failed = True
            for device in self.publishers[1:]:
                self.outage.update(number for number, _, _, _ in device.open.values())
            self.world.broker.keeper.failed(batch, "no space", 0.0)

    # Clients

    def connect(self, device: Device) -> None:
        fields: dict[str, Any] = {}
        if device.version == V5:
            fields["receive_maximum"] = device.window
            if device.kept:
                fields["session_expiry_interval"] = 1000
        device.link = self.world.connect(device.name, device.version, clean_start=not device.kept, **fields)
        device.read = 0
        if device.link.ended:
            device.link = None
            return
        frame = first_frame(device.link.sent, 0)
        present = frame[2] & 1
        device.read = len(frame)
        if not present:
            device.life += 1
            device.ids.clear()
            device.open.clear()
            device.subscribed = False
        if device.filters and not device.subscribed:
            self.feed(device, subscribe(device.version, 65_000, *((f, 2) for f in device.filters)))
        for packet_id, (number, topic, qos, received) in list(device.open.items()):
            if received:
                self.feed(device, ack(0x62, packet_id))
            else:
                self.put(device, packet_id, number, topic, qos, dup=True)

    def feed(self, device: Device, data: bytes) -> None:
        if device.link is not None and not device.link.ended:
            self.world.feed(device.link, data)

    def put(self, device: Device, packet_id: int, number: int, topic: str, qos: int, *, dup: bool = False) -> None:
        if device.version == V5 and self.world.broker.journal.failing is not None:
            self.outage.add(number)
        flags = qos << 1 | 8 * dup
        self.feed(device, publish(device.version, topic, b"%d" % number, flags=flags, packet_id=packet_id))

    def send(self, device: Device) -> None:
        if len(device.open) >= 10:
            return
        self.number += 1
        topic, qos = self.rng.choice(("t", "held/a", "held/b")), self.rng.choice((1, 2, 2))
        while device.next_id in device.open:
            device.next_id = device.next_id % 50 + 1
        packet_id, device.next_id = device.next_id, device.next_id % 50 + 1
        device.open[packet_id] = (self.number, topic, qos, False)
        self.sent[self.number] = (device.name, topic, qos)
        self.put(device, packet_id, self.number, topic, qos)

    def listen(self, device: Device) -> bool:
        """Handle what a device was sent; whether there was anything."""
        link = device.link
        if link is None:
            return False
        replies: list[bytes] = []
        while device.read < len(link.sent):
            frame = first_frame(link.sent, device.read)
            device.read += len(frame)
            replies += self.packet(device, frame)
        self.feed(device, b"".join(replies))
        if link.ended and device.read >= len(link.sent):
            device.link = None
        return bool(replies)

    def packet(self, device: Device, frame: bytes) -> list[bytes]:
        kind, first = frame[0] >> 4, frame[0]
        if kind == 3:
            return self.arrived(device, first >> 1 & 3, frame)
        packet_id = frame[2] << 8 | frame[3]
        code = frame[4] if len(frame) > 4 else 0
        if kind == 9:
            device.subscribed = True
        elif kind in (4, 5):
            number, topic, qos, _ = device.open[packet_id]
            if code >= 0x80:
                del device.open[packet_id]
                if code == ReasonCode.QUOTA_EXCEEDED:
                    self.refused_by_store.add(number)
                return []
            self.acked[number] = (device.name, topic, qos)
            if "held" in topic:
                assert number in self.record, f"{number} was acknowledged before the tap let it go"
            if kind == 4:
                del device.open[packet_id]
                return []
            device.open[packet_id] = (number, topic, qos, True)
            return [ack(0x62, packet_id)]
        elif kind == 7:
            device.open.pop(packet_id, None)
        elif kind == 6:
            device.ids.discard(packet_id)
            return [ack(0x70, packet_id)]
        return []

    def arrived(self, device: Device, qos: int, frame: bytes) -> list[bytes]:
        topic_size = frame[2] << 8 | frame[3]
        topic = frame[4 : 4 + topic_size].decode()
        at = 4 + topic_size
        packet_id = frame[at] << 8 | frame[at + 1]
        body = frame[at + 2 + (device.version == V5) :]
        if qos == 2:
            if packet_id not in device.ids:
                device.ids.add(packet_id)
                device.got.append((device.life, int(body), topic, 2))
            return [ack(0x50, packet_id)]
        device.got.append((device.life, int(body), topic, 1))
        return [ack(0x40, packet_id)]

    # A play

    def step(self) -> None:
        rng = self.rng
        devices = (*self.publishers, *self.subscribers)
        what = rng.random()
        if what < 0.4:
            publisher = rng.choice(self.publishers)
            if publisher.link is not None:
                self.send(publisher)
        elif what < 0.55:
            self.take()
        elif what < 0.7:
            self.settle(works=rng.random() < 0.75)
        elif what < 0.85:
            self.gate.release(refused=rng.random() < 0.2)
        elif what < 0.9:
            device = rng.choice(devices)
            if device.link is not None:
                device.link.end(None, "cut")
                device.link = None
        elif what < 0.915 and not self.written_though_failed:
            self.kill()
        self.world._settle()
        for device in devices:
            if device.link is None and rng.random() < 0.3:
                self.connect(device)
            if rng.random() < 0.6:
                self.listen(device)

    def rest(self) -> None:
        """Let everything come to its end."""
        devices = (*self.publishers, *self.subscribers)
        for _ in range(400):
            busy = False
            for device in devices:
                if device.link is None:
                    self.connect(device)
                    busy = True
                busy = self.listen(device) or busy
            while self.gate.holds:
                self.gate.release(refused=False)
                busy = True
            while self.out is not None or self.world.broker.journal.dirty:
                self.settle(works=True)
                self.world._settle()
                busy = True
            self.world._settle()
            if not busy:
                return
        raise AssertionError("it does not come to rest")

    def judge(self) -> None:
        for subscriber in self.subscribers:
            # A 5.0 publisher whose message a tap refused, and that did not hear of it, may send a new one.
            anew = {number for number in self.refused_by_tap if self.sent[number][0] != "p0"}
            at_2 = [(life, number) for life, number, _, qos in subscriber.got if qos == 2 and number not in anew]
            assert len(at_2) == len(set(at_2)), f"{subscriber.name} has {twice(at_2)} twice"
            self.in_order(subscriber)
        for name, own in (("kept", "#"), ("kept5", "held/#")):
            (subscriber,) = [device for device in self.subscribers if device.name == name]
            has = {number for _, number, _, _ in subscriber.got}
            for number, (_, topic, _) in self.acked.items():
                if own == "#" or topic != "x":
                    assert number in has, f"{name} has not {number}, which was acknowledged"
            assert set(self.acked) <= self.shipped, "every tap has what was acknowledged"
            refused = self.refused_by_store - self.refused_by_tap
            assert not [n for _, n, _, qos in subscriber.got if qos == 2 and n in refused]
        everywhere = [number for d in self.subscribers if "share" in d.name for _, number, _, qos in d.got if qos == 2]
        shared = {number for d in self.subscribers if "share" in d.name for _, number, _, _ in d.got}
        assert set(everywhere) <= shared
        broker = self.world.broker
        assert not broker.journal.gated
        assert not broker.journal.renumbered
        for session in broker.connections.sessions.values():
            assert (session.gates, session.inflight, list(session.queue or ())) == ({}, {}, []), session.client_id
            assert session.outbox is not None
            assert (session.outbox.held_acks, session.outbox.held_size, session.outbox.held) == (0, 0, [])
        state = self.store.load()
        assert (state.deliveries, state.received, state.contents) == ([], [], {})

    def in_order(self, subscriber: Device) -> None:
        if not subscriber.name.startswith("kept"):
            return  # what a session missed may come to it by a repetition, behind what it has seen
        last: dict[tuple[int, str, str, int], int] = {}
        seen: set[tuple[int, int]] = set()
        for life, number, topic, qos in subscriber.got:
            if (life, number) in seen or number in self.outage or number in self.refused_by_tap:
                continue
            seen.add((life, number))
            key = (life, self.sent[number][0], topic, qos)
            assert last.get(key, 0) < number, f"{subscriber.name} has {number} behind {last[key]}"
            last[key] = number


def twice(items: list[tuple[int, int]]) -> set[tuple[int, int]]:
    return {item for item in items if items.count(item) > 1}


def play(seed: int, lane: type[FastLane]) -> Play:
    game = Play(seed, lane)
    for device in game.subscribers:
        game.connect(device)
    for _ in range(3):
        for device in game.subscribers:
            game.listen(device)
        game.settle(works=True)
        game.world._settle()
    for device in game.publishers:
        game.connect(device)
    for _ in range(STEPS):
        game.step()
    game.rest()
    try:
        game.judge()
    except AssertionError as exc:
        raise AssertionError(f"seed {seed}, {lane.__name__}: {exc}") from exc
    return game


@pytest.mark.parametrize("block", range(BLOCKS))
async def test_nothing_is_lost_doubled_or_out_of_order(block: int) -> None:
    acked = refused = 0
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        game = play(seed, NoLane if seed % 4 == 3 else FastLane)
        acked += len(game.acked)
        refused += len(game.refused_by_store)
    assert acked > 10 * PER_BLOCK
    assert refused > PER_BLOCK // 2
