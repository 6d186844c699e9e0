"""The fast lane may never be observable: the same bytes through it and around it give the same bytes and state.

A failing stream says its seed. To play it alone:
`MQTT_TRIO_LANE_SEED=SEED scripts/test unit tests/broker/test_fast_lane.py -k one_seed`
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import trio

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.lane_properties import BLOCKS as BLOCKS_KEPT
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import Disconnect, MessageProperties, Publish, Subscribe, Subscription
from tests.lane_streams import CLIENTS, FLAVOURS, Recorder
from tests.lane_worlds import V4, V5, Setup, World

BLOCKS, PER_BLOCK = 20, 1000
"""20,000 streams."""
SHARE = 0.45
"""Of the accepted messages of each flavour that the lane takes at least; else the test shows little."""


def compare(seed: int) -> tuple[str, int, int]:
    """Play the stream of a seed both ways; return its flavour, the messages received, and those of the lane."""
    recorder = Recorder(seed)
    recorder.record()
    world = World(FastLane, recorder.setup)
    for what, who, argument in recorder.events:
        world.do(what, who, argument)
    same(recorder.world.state(), world.state(), seed)
    if recorder.setup.kept:
        restarted = world.restarted()
        same(recorder.world.restarted(), restarted, seed)
        mirrors(world.state(), restarted, seed)
    metrics = world.broker.metrics
    received = metrics.messages_received_qos0 + metrics.messages_received_qos1 + metrics.messages_received_qos2
    return recorder.flavour, received, metrics.fast_lane_messages


def same(expected: dict[str, Any], found: dict[str, Any], seed: int) -> None:
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        assert found[part] == value, f"{part} differs with MQTT_TRIO_LANE_SEED={seed}"


def _ungrouped(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    return entry if entry[0] == "released" else (*entry[:3], *entry[4:])


def mirrors(live: dict[str, Any], restarted: dict[str, Any], seed: int) -> None:
    """Whether the store holds what the broker has: each session that lasts, with all that belongs to it."""
    seen = f"with MQTT_TRIO_LANE_SEED={seed}"
    for client in CLIENTS:
        if client not in live or not live[client]["kept"] or not live[client]["expiry interval"]:
            assert client not in restarted, seen
            continue
        for part in ("queue", "subscriptions", "received, kept", "expiry interval"):
            assert restarted[client][part] == live[client][part], f"{part} of {client} {seen}"
        # What a share group handed out at QoS 1 stays the group's; at QoS 2 it is the member's alone.
        sent = dict(live[client]["inflight"])
        expected = {i: _ungrouped(entry) for i, entry in sent.items() if not (entry[0] == 1 and entry[3])}
        found = {i: _ungrouped(entry) for i, entry in restarted[client]["inflight"]}
        assert found == expected, f"in flight to {client} {seen}"
    assert restarted["retained"] == live["retained"], seen
    kept = {
        name: group
        for name, group in live["groups"].items()
        if any(client in restarted for client, _ in group["members"])
    }
    assert restarted["groups"].keys() == kept.keys(), seen
    for name, group in kept.items():
        assert len(restarted["groups"][name]["queue"]) >= len(group["queue"]), seen


@pytest.mark.parametrize("block", range(BLOCKS))
async def test_the_lane_is_never_observable(block: int, autojump_clock: trio.testing.MockClock) -> None:
    received: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        flavour, count, by_lane = compare(seed)
        received[flavour] += count
        taken[flavour] += by_lane
    shares = {flavour: taken[flavour] / received[flavour] for flavour in FLAVOURS}
    assert min(shares.values()) > SHARE, shares


async def test_one_seed(autojump_clock: trio.testing.MockClock) -> None:
    compare(int(os.environ.get("MQTT_TRIO_LANE_SEED", "0")))


def open_world() -> World:
    return World(FastLane, Setup(limits=Limits(), outbox_bytes=1_000_000))


async def test_the_lane_takes_what_it_is_for() -> None:
    world = open_world()
    sender, receiver = world.connect("s", V4), world.connect("r", V4)
    world.feed(receiver, encode(Subscribe(1, (Subscription("t", QoS(2)),)), V4))
    frame = encode(Publish("t", b"x" * 64), V4)
    world.feed(sender, frame)
    world.feed(sender, frame * 99)
    for packet_id in range(1, 51):
        world.feed(sender, encode(Publish("t", b"y", QoS(1), packet_id=packet_id), V4))
    assert world.broker.metrics.fast_lane_messages == 149
    assert receiver.sent.count(b"x" * 64) == 100
    assert sender.sent.count(b"\x40\x02") == 50
    for packet_id in range(1, 51):
        world.feed(sender, encode(Publish("t", b"z", QoS(2), packet_id=packet_id), V4))
    assert world.broker.metrics.fast_lane_messages == 199
    assert sender.sent.count(b"\x50\x02") == 50
    assert receiver.session is not None
    assert len(receiver.session.inflight) == 100


async def test_every_subscriber_may_be_of_another_kind() -> None:
    """The lane serves both versions, each QoS and sessions whose client is away."""
    world = open_world()
    sender = world.connect("s", V5)
    receivers = [(version, qos) for version in (V4, V5) for qos in range(3)]
    for version, qos in receivers:
        fields = {"session_expiry_interval": 100} if version == V5 else {}
        for name in ("here", "away"):
            link = world.connect(f"{name}-{version}-{qos}", version, clean_start=False, **fields)
            world.feed(link, encode(Subscribe(1, (Subscription("t", QoS(qos)),)), version))
            if name == "away":
                link.end(None, "cut")
    properties = MessageProperties(content_type="text/plain", user_properties=(("k", "v"),))
    for number in range(30):
        packet_id = number + 1 if number % 3 else None
        publish = Publish("t", b"%d" % number, QoS(number % 3), packet_id=packet_id, properties=properties)
        world.feed(sender, encode(publish, V5))
    assert world.broker.metrics.fast_lane_messages == 29
    assert world.broker.metrics.messages_queued == 2 * (10 + 10 + 10 + 10)
    for version, qos in receivers:
        link = world.clients[f"here-{version}-{qos}"]
        assert link.sent.count(b"text/plain") == (30 if version == V5 else 0)
        assert link.session is not None
        assert len(link.session.inflight) == (20 if qos else 0)


async def test_new_properties_all_the_time_are_taken_and_not_kept() -> None:
    world = open_world()
    sender = world.connect("s", V5)
    for number in range(3000):
        properties = MessageProperties(correlation_data=b"%d" % number)
        world.feed(sender, encode(Publish("t", b"", properties=properties), V5))
    assert world.broker.metrics.fast_lane_messages == 2999
    assert len(world.broker.property_blocks) <= BLOCKS_KEPT


async def test_properties_that_are_never_forwardable_are_seldom_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bytes] = []
    monkeypatch.setattr("mqtt_trio.broker.fast_lane.is_forwardable", looked.append)
    world = open_world()
    sender = world.connect("s", V5)
    properties = MessageProperties(message_expiry_interval=60)
    for _ in range(1000):
        world.feed(sender, encode(Publish("t", b"", properties=properties), V5))
    assert world.broker.metrics.fast_lane_messages == 0
    assert len(looked) < 30


async def test_a_new_subscriber_is_seen_by_the_next_message() -> None:
    world = open_world()
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
