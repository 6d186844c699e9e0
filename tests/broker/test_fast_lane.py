"""The fast lane may never be observable: the same bytes through it and around it give the same bytes and state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, TapRoute, read_run
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import (
    Connect,
    Disconnect,
    MessageProperties,
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
from mqtt_trio.server.link import Link

TOPICS = ("a", "a/b", "a/b/c", "x", "$odd/t", "sensors/é", "long/" + "t" * 150)
FILTERS = ("a", "a/#", "+", "a/+", "#", "x", "$odd/#", "sensors/+", "long/#")
V4, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


class NoLane(FastLane):
    """Takes nothing: everything goes the full path."""

    __slots__ = ()

    def handle(self, data: bytes, pos: int, now: float) -> int:
        return pos


class RecordingLink(Link):
    """A Link whose frames are collected; `room` makes it a reader that stops."""

    __slots__ = ("again", "frozen", "sent")

    def __init__(self, broker: Broker, name: str) -> None:
        super().__init__(broker, peer=name, listener="test", connect_timeout=10)
        self.sent = b""
        self.frozen = self.again = False

    def flush(self) -> None:
        if self.frozen:
            return
        frames, self.outbox.frames = self.outbox.frames, []
        self.sent += b"".join(frames)
        self.outbox.room = self.outbox.limit
        if self.outbox.starved and not self.ended:
            self.broker.has_room(self.outbox, 0.0)

    def send_raw(self, data: bytes) -> None:
        raise AssertionError("no WebSocket here")

    def reading_changed(self) -> None:
        pass

    def resume_soon(self) -> None:
        self.again = True


class ListTap:
    """A tap that keeps what it sees and holds every third acknowledged message."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, int, str]] = []
        self.holds: list[Hold] = []

    def route(self, topic_name: str) -> TapRoute | None:
        return self if topic_name.startswith("a") else None

    def take_run(self, run: FrameRun) -> Answer:
        messages = read_run(run)
        assert len(messages) == run.count
        answer: Answer = None
        for message in messages:
            answer = self.take(message)
        return answer

    def take(self, message: Message) -> Answer:
        self.seen.append((message.topic_name, message.payload, message.qos, message.client_id))
        if message.qos and len(self.seen) % 3 == 0:
            self.holds.append(Hold())
            return self.holds[-1]
        return None


class World:
    """A broker with four clients; `feed` gives one of them bytes."""

    def __init__(self, lane: type[FastLane], limits: Limits, *, tapped: bool) -> None:
        numbers = iter(range(1000))
        self.broker = Broker(limits, random_id=lambda: f"auto-{next(numbers)}", wall_offset=1000.0)
        self.broker.connections.make_lane = lane
        self.tap = ListTap()
        if tapped:
            self.broker.add_tap(self.tap)
        self.links: list[RecordingLink] = []

    def connect(self, client_id: str, version: ProtocolVersion, **fields: Any) -> RecordingLink:
        link = RecordingLink(self.broker, client_id)
        self.links.append(link)
        self.feed(link, encode(Connect(client_id=client_id, protocol_version=version, **fields), version))
        return link

    def feed(self, link: RecordingLink, data: bytes) -> None:
        link.receive(data, 5.0)
        while link.again:
            link.again = False
            link.resume(link)
        self.broker.flush()

    def state(self) -> dict[str, Any]:
        metrics = self.broker.metrics.snapshot()
        metrics.pop("fast_lane_messages")
        return {
            "sent": {link.peer: link.sent for link in self.links},
            "ended": {link.peer: (link.ended, link.end_reason, link.end_text) for link in self.links},
            "metrics": metrics,
            "seen": self.tap.seen,
            "inflight": {c: list(s.inflight) for c, s in self.broker.connections.sessions.items()},
            "queue": {c: len(s.queue) for c, s in self.broker.connections.sessions.items()},
            "next_id": {c: s.next_id for c, s in self.broker.connections.sessions.items()},
            "received": {c: s.received for c, s in self.broker.connections.sessions.items()},
            "acks": {c: len(s.acks) for c, s in self.broker.connections.sessions.items()},
            "room": {link.peer: link.outbox.room for link in self.links},
            "retained": sorted((m.topic_name, m.payload) for m in self.broker.retained),
        }


def random_frames(rng: random.Random, version: ProtocolVersion) -> Iterator[bytes]:
    """What one publisher sends: mostly what the lane takes, now and then everything else."""
    for _ in range(rng.randrange(1, 40)):
        kind = rng.random()
        topic = rng.choice(TOPICS)
        payload = rng.randbytes(rng.choice((0, 1, 12, 64, 64, 300, 5000)))
        if kind < 0.45:
            for _ in range(rng.choice((1, 1, 5, 30))):
                yield encode(Publish(topic, payload), version)
        elif kind < 0.7:
            qos = rng.choice((1, 1, 1, 2))
            packet_id = rng.choice((rng.randrange(1, 20), rng.randrange(1, 65536)))
            frame = encode(Publish(topic, payload, QoS(qos), packet_id=packet_id), version)
            yield bytes((frame[0] | rng.choice((0, 0, 0, 8)),)) + frame[1:]
        elif kind < 0.78:
            yield encode(Publish(topic, payload, retain=True), version)
        elif kind < 0.84 and version == V5:
            properties = MessageProperties(content_type="t", user_properties=(("k", "v"),))
            yield encode(Publish(topic, payload, properties=properties), version)
        elif kind < 0.9:
            packet_id = rng.randrange(1, 30)
            packet = rng.choice(
                (PubAck(packet_id), PubRel(packet_id), PubRec(packet_id), PubComp(packet_id), PingReq())
            )
            yield encode(packet, version)
        elif kind < 0.94:
            yield encode(Subscribe(7, (Subscription(rng.choice(FILTERS), QoS(rng.randrange(3))),)), version)
        elif kind < 0.96:
            yield encode(Unsubscribe(8, (rng.choice(FILTERS),)), version)
        elif kind < 0.975:
            broken = bytearray(encode(Publish(topic, payload, QoS(rng.randrange(2)), packet_id=5), version))
            broken[rng.randrange(min(len(broken), 12))] = rng.randrange(256)
            yield bytes(broken)
        elif kind < 0.98:
            yield rng.randbytes(rng.randrange(1, 12))
        elif kind < 0.985:
            yield encode(Disconnect(), version)


def script(seed: int) -> tuple[dict[str, Any], list[tuple[int, bytes]]]:
    """A world and what happens in it: (client, bytes) in order; client -1: release a hold, -2: freeze, -3: thaw."""
    rng = random.Random(seed)
    setup: dict[str, Any] = {
        "versions": [rng.choice((V4, V5)) for _ in range(4)],
        "filters": [[(rng.choice(FILTERS), rng.randrange(3)) for _ in range(rng.randrange(4))] for _ in range(4)],
        "identifier": rng.random() < 0.2,
        "small": rng.random() < 0.2,
        "limits": Limits(
            outbox_bytes=65_536,
            receive_maximum=rng.choice((3, 1024)),
            inflight_messages=rng.choice((2, 10, 1024)),
            queue_messages=rng.choice((0, 5, 1000)),
            maximum_packet_size=rng.choice((1024, 60_000)),
        ),
        "tapped": rng.random() < 0.4,
    }
    events: list[tuple[int, bytes]] = []
    for _ in range(rng.randrange(1, 5)):
        client = rng.randrange(4)
        stream = b"".join(random_frames(rng, setup["versions"][client]))
        while stream:
            cut = rng.choice((1, 7, 100, 5000, 10**6))
            events.append((client, stream[:cut]))
            stream = stream[cut:]
            if rng.random() < 0.1:
                other = rng.randrange(4)
                events.append((other, b"".join(list(random_frames(rng, setup["versions"][other]))[:2])))
            if rng.random() < 0.1:
                events.append((rng.choice((-1, -2, -3)), bytes((rng.randrange(4),))))
    return setup, events


def play(lane: type[FastLane], setup: dict[str, Any], events: list[tuple[int, bytes]]) -> dict[str, Any]:
    world = World(lane, setup["limits"], tapped=setup["tapped"])
    for number, version in enumerate(setup["versions"]):
        fields = {"maximum_packet_size": 200} if setup["small"] and version == V5 and number == 0 else {}
        world.connect(f"c{number}", version, clean_start=number != 1, **fields)
    for number, filters in enumerate(setup["filters"]):
        version = setup["versions"][number]
        for topic_filter, qos in filters:
            identifier = 9 if setup["identifier"] and version == V5 else None
            packet = Subscribe(1, (Subscription(topic_filter, QoS(qos)),), identifier)
            world.feed(world.links[number], encode(packet, version))
    for client, data in events:
        if client >= 0:
            world.feed(world.links[client], data)
        elif client == -1:
            while world.tap.holds:
                world.tap.holds.pop(0).release()
            world.broker.flush()
        else:
            link = world.links[data[0]]
            link.frozen = client == -2
            link.flush()
            world.broker.flush()
    return world.state()


@pytest.mark.parametrize("block", range(20))
async def test_the_lane_is_never_observable(block: int, autojump_clock: trio.testing.MockClock) -> None:
    for seed in range(block * 50, block * 50 + 50):
        setup, events = script(seed)
        with_lane, without = play(FastLane, setup, events), play(NoLane, setup, events)
        for part, value in without.items():
            assert with_lane[part] == value, f"seed {seed}: {part} differs"


async def test_the_lane_takes_what_it_is_for() -> None:
    world = World(FastLane, Limits(), tapped=False)
    sender, receiver = world.connect("s", V4), world.connect("r", V4)
    world.feed(receiver, encode(Subscribe(1, (Subscription("t", QoS(1)),)), V4))
    frame = encode(Publish("t", b"x" * 64), V4)
    world.feed(sender, frame)
    world.feed(sender, frame * 99)
    for packet_id in range(1, 51):
        world.feed(sender, encode(Publish("t", b"y", QoS(1), packet_id=packet_id), V4))
    assert world.broker.metrics.fast_lane_messages == 149
    assert receiver.sent.count(b"x" * 64) == 100
    assert sender.sent.count(b"\x40\x02") == 50


async def test_a_new_subscriber_is_seen_by_the_next_message() -> None:
    world = World(FastLane, Limits(), tapped=False)
    sender, receiver = world.connect("s", V5), world.connect("r", V5)
    frame = encode(Publish("t", b"payload"), V5)
    world.feed(sender, frame * 3)
    assert b"payload" not in receiver.sent
    world.feed(receiver, encode(Subscribe(1, (Subscription("t"),)), V5))
    world.feed(sender, frame * 3)
    assert receiver.sent.count(b"payload") == 3
    world.feed(receiver, encode(Disconnect(), V5))
    world.feed(sender, frame * 3)
    assert receiver.sent.count(b"payload") == 3
    assert not sender.ended
