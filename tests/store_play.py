"""A broker with a store, spoken to in packets: what waits, what leaves with a commit, what a restart has."""

from __future__ import annotations

from typing import Any

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import Packet, Publish, Subscribe, Subscription
from tests.lane_worlds import V5, RecordingLink, Setup, World


class Play:
    """A world with a store, spoken to in packets."""

    def __init__(self, lane: type[FastLane] = FastLane, **limits: Any) -> None:
        self.world = World(lane, Setup(limits=Limits(**limits), outbox_bytes=1_000_000, kept=True))
        self.version: dict[str, ProtocolVersion] = {}

    def connect(self, client: str, version: ProtocolVersion, *, kept: bool = True, **fields: Any) -> RecordingLink:
        if version == V5 and kept:
            fields["session_expiry_interval"] = 100
        link = self.world.connect(client, version, clean_start=not kept, **fields)
        self.version[client] = version
        return link

    def subscriber(self, client: str, version: ProtocolVersion, *filters: str, qos: int = 2) -> RecordingLink:
        link = self.connect(client, version)
        self.send(client, Subscribe(1, tuple(Subscription(f, QoS(qos)) for f in filters)))
        self.world.commit()
        self.world._settle()
        link.sent = b""
        return link

    def send(self, client: str, *packets: Packet) -> bytes:
        """Send packets; return what the client has been sent since the last time."""
        link = self.world.clients[client]
        link.sent = b""
        self.world.feed(link, b"".join(encode(packet, self.version[client]) for packet in packets))
        return link.sent

    def commit(self, client: str) -> bytes:
        """Have the store take everything; return what that sends a client."""
        link = self.world.clients[client]
        link.sent = b""
        self.world.do("commit", "", None)
        return link.sent

    def fail(self, client: str) -> bytes:
        link = self.world.clients[client]
        link.sent = b""
        self.world.do("fail", "", None)
        return link.sent

    def restart(self) -> World:
        """The broker that the store makes now; what was not committed is gone."""
        world = World(FastLane, self.world.setup)
        world.now = self.world.now
        world.store = self.world.store
        Recovery(world.broker, world.store.load(), world.now).run()
        return world


def publish(number: int, qos: int, topic: str = "t", **fields: Any) -> Publish:
    return Publish(topic, b"%d" % number, QoS(qos), packet_id=number if qos else None, **fields)
