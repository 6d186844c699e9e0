"""Random streams for the differential test of the fast lane.

They are made while the full path plays them, so that acknowledgements can fit what the broker has sent; what happened
is written down and can be played again the other way.
"""

from __future__ import annotations

import random
from typing import Any, Final

from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.session import RELEASED, Session, qos_of
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import Disconnect, MessageProperties, Subscribe, Subscription, Unsubscribe
from mqtt_trio.protocol.properties import with_length, write_message_properties
from mqtt_trio.protocol.wire import PACKET_IDS, write_string, write_variable_byte_integer
from tests.lane_worlds import V4, V5, V31, NoLane, Setup, World

FLAVOURS: Final = ("mixed", "QoS 0", "QoS 1", "QoS 2", "properties")
"""What the publishers of a stream prefer, by seed."""
CLIENTS: Final = ("c0", "c1", "c2", "c3")
TOPICS: Final = [write_string(t) for t in ("a", "a", "a/b", "a/b/c", "x", "$odd/t", "s/é", "l/" + "t" * 150)]
ODD_TOPICS: Final = (b"\0\0", b"\0\1+", b"\0\2\xc3\x28", b"\0\3a\0b", b"\0\1z")
FILTERS: Final = (
    "a",
    "a",
    "a/#",
    "+",
    "a/+",
    "#",
    "#",
    "x",
    "$odd/#",
    "s/+",
    "l/#",
    "$share/g/a",
    "$share/g/a",
    "$share/h/#",
)
SIZES: Final = (0, 0, 1, 3, 12, 12, 64, 64, 64, 120, 300, 1200)


def _block(*user_properties: tuple[str, str], **fields: Any) -> bytes:
    properties = MessageProperties(user_properties=user_properties, **fields)
    return with_length(write_message_properties(properties, properties.message_expiry_interval))


FORWARDABLE: Final = (
    _block(("k", "v")),
    _block(("k", "v"), ("k", "v"), ("", "")),
    _block(content_type="text/plain"),
    _block(payload_format_indicator=1, content_type="é", response_topic="a/b", correlation_data=b"\0\xff"),
    _block(("n", "x" * 130)),
    _block(("n", "x" * 600), response_topic="r"),
)
OTHERS: Final = (
    _block(message_expiry_interval=3),
    _block(("k", "v"), message_expiry_interval=3),
    _block(message_expiry_interval=0),
    b"\x0a\x26\0\1k\0\1v\3\0\0",  # not in the order in which we write
    b"\3\x23\0\1",  # Topic Alias
    b"\3\x23\0\2",
    b"\3\x23\0\0",
    b"\2\x0b\5",  # Subscription Identifier
    b"\4\1\0\1\0",  # twice
    b"\6\3\0\0\3\0\0",
    b"\2\1\2",  # Payload Format Indicator 2
    b"\6\x26\0\1k\0\1",  # cut off
    b"\7\x26\0\1\0\0\1v",  # U+0000
    b"\5\3\0\2\xc3\x28",  # ill-formed UTF-8
    b"\4\x08\0\1#",  # a Response Topic with a wildcard
    b"\3\x08\0\0",
    b"\1\x77",
    b"\x80\0",
    b"\x87\x00\x26\0\1k\0\1v",  # a Property Length with more bytes than it needs
    b"\xff\x7f",
    b"\xff\xff\xff\x7f",
)


class Recorder:
    """Makes one stream: what the world was made of and the events in it, in order."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.flavour = FLAVOURS[seed % len(FLAVOURS)]
        self.events: list[tuple[str, str, Any]] = []
        self.setup = Setup(
            limits=Limits(
                receive_maximum=rng.choice((2, 4, 1024, 1024)),
                inflight_messages=rng.choice((2, 10, 1024, 1024)),
                queue_messages=rng.choice((0, 5, 1000)),
                queue_overflow=rng.choice(("drop-new", "drop-oldest")),
                maximum_packet_size=rng.choice((1024, 60_000)),
            ),
            outbox_bytes=rng.choice((700, 4000, 1_000_000, 1_000_000)),
            tapped=rng.random() < 0.25,
            refuses=rng.random() < 0.3,
            ruled=rng.random() < 0.1,
            kept=seed % 3 == 0,
        )
        self.identifiers = rng.random() < 0.2
        self.small = rng.random() < 0.15
        self.odd = rng.random() < 0.3
        """Whether clients send what they should not."""
        self.topics = rng.sample(TOPICS, 3)
        self.new = 0
        self.versions = [rng.choice((V4, V4, V5)) for _ in CLIENTS]
        if self.flavour == "properties" or rng.random() < 0.3:
            self.versions = [rng.choice((V5, V5, V5, V4)) for _ in CLIENTS]
        self.world = World(NoLane, self.setup)

    def record(self) -> None:
        rng = self.rng
        for number, client in enumerate(CLIENTS):
            self.connect(client, self.versions[number])
            for _ in range(rng.choice((0, 1, 1, 2))):
                self.do("feed", client, self.subscribe(client))
        for _ in range(rng.randrange(10, 30)):
            self.step()

    def do(self, what: str, who: str = "", argument: Any = None) -> None:
        self.events.append((what, who, argument))
        self.world.do(what, who, argument)
        if self.setup.kept and what != "commit" and self.rng.random() < 0.3:
            self.do("commit")

    def connect(self, client: str, version: ProtocolVersion) -> None:
        rng = self.rng
        fields: dict[str, Any] = {"version": version, "clean_start": rng.random() < 0.4}
        if version == V5:
            fields["session_expiry_interval"] = rng.choice((0, 100, 100))
            fields["topic_alias_maximum"] = rng.choice((None, None, None, 2))
            fields["receive_maximum"] = rng.choice((None, None, 1, 3))
            if self.small and client != "c0":
                fields["maximum_packet_size"] = rng.choice((60, 200, 1100))
        elif rng.random() < 0.2:
            fields["version"] = V31
        self.do("connect", client, fields)

    def subscribe(self, client: str) -> bytes:
        rng = self.rng
        v5 = self.version(client) == V5
        qos = QoS(rng.choice((0, 1, 2, 2)))
        topic_filter = rng.choice(FILTERS)
        no_local = v5 and rng.random() < 0.2 and not topic_filter.startswith("$share")
        item = Subscription(topic_filter, qos, no_local, v5 and rng.random() < 0.2)
        identifier = rng.randrange(1, 200) if v5 and self.identifiers else None
        return encode(Subscribe(7, (item,), identifier), self.version(client))

    def version(self, client: str) -> ProtocolVersion:
        return self.world.clients[client].connection.protocol_version

    def step(self) -> None:
        """One client sends something, or something else happens."""
        rng = self.rng
        kind = rng.random()
        client = rng.choice(("c0", "c0", *CLIENTS))
        if self.world.clients[client].ended:
            if kind < 0.6:
                self.connect(client, rng.choice((V4, V5)) if kind < 0.2 else self.version(client))
            return
        if kind < 0.75:
            parts = self.publishes(client) if kind < 0.45 else self.acks(client)
            if kind < 0.2 or kind > 0.7:
                parts += self.acks(client) if kind < 0.2 else self.publishes(client)
            if self.odd and rng.random() < 0.3:
                parts.insert(rng.randrange(len(parts) + 1), self.oddity(client))
            elif kind < 0.1:
                rng.shuffle(parts)
            self.send(client, b"".join(parts))
        elif kind < 0.85:
            self.send(client, self.subscribe(client))
        else:
            self.happen(client)

    def happen(self, client: str) -> None:
        rng = self.rng
        what = rng.choice(("cut", "freeze", "thaw", "thaw", "release", "stop", "go", "rights", "wait", "connect"))
        if self.setup.kept and rng.random() < 0.3:
            what = "fail" if rng.random() < 0.2 else "commit"
        if what == "connect":  # takes over
            self.connect(client, self.version(client))
        elif what == "release":
            self.do(what, "", ReasonCode.UNSPECIFIED_ERROR if rng.random() < 0.2 else None)
        elif what == "wait":
            self.do(what, "", rng.choice((0.5, 2.0)))
        else:
            if what == "stop" and rng.random() < 0.7:
                what = "go"
            self.do(what, client)

    def send(self, client: str, stream: bytes) -> None:
        """Send bytes, whole or cut at random."""
        rng = self.rng
        while stream:
            cut = rng.choice((10**6, 10**6, 10**6, rng.randrange(1, 12), rng.randrange(1, 300)))
            self.do("feed", client, stream[:cut])
            stream = stream[cut:]

    # Packets

    def publishes(self, client: str) -> list[bytes]:
        rng = self.rng
        session = self.session(client)
        if self.flavour.startswith("QoS"):
            qos = int(self.flavour[-1]) if rng.random() < 0.85 else rng.randrange(3)
        else:
            qos = rng.randrange(3)
        topic, size, block = rng.choice(self.topics), rng.choice(SIZES), self.block(client)
        packet_id = rng.randrange(1, 8) if self.odd else max(session.received, default=rng.randrange(1, 60_000)) + 1
        packets = []
        for _ in range(rng.choice((1, 2, 4, 8))):
            if rng.random() < 0.2:
                topic, size, block = rng.choice(self.topics), rng.choice(SIZES), self.block(client)
            packets.append(self.publish(topic, qos, packet_id, block, size))
            packet_id = packet_id % 65_535 + 1
        return packets

    def publish(self, topic: bytes, qos: int, packet_id: int, block: bytes, size: int) -> bytes:
        self.new += 1
        first = 0x30 | qos << 1
        if self.odd and self.rng.random() < 0.1:
            first |= self.rng.choice((1, 8))
        payload = (b"%d " % self.new).ljust(size, b".")[:size]
        body = b"".join((topic, PACKET_IDS[packet_id] if qos else b"", block, payload))
        return bytes((first,)) + write_variable_byte_integer(len(body)) + body

    def block(self, client: str) -> bytes:
        """A property block for a PUBLISH of a client."""
        rng = self.rng
        if self.version(client) != V5:
            return b""
        kind = rng.random()
        if kind < (0.2 if self.flavour == "properties" else 0.7):
            return b"\0"
        if kind < 0.9:
            return rng.choice(FORWARDABLE)
        if kind < 0.95:
            self.new += 1
            return _block(("n", str(self.new)), correlation_data=rng.randbytes(rng.randrange(20)))
        if kind < 0.96 or not self.odd:
            return rng.choice(OTHERS[:3])
        return rng.choice(OTHERS)

    def session(self, client: str) -> Session:
        session = self.world.clients[client].session
        return session if session is not None else Session("")

    def acks(self, client: str) -> list[bytes]:
        """Acknowledge some of what the client has been sent, release some of what it sent."""
        rng = self.rng
        session = self.session(client)
        some = rng.choice((1, 3, 100))
        packets = []
        for packet_id, entry in list(session.inflight.items())[:some]:
            first = 0x70 if entry is RELEASED else 0x40 if qos_of(entry) == 1 else 0x50
            packets.append(bytes((first, 2)) + PACKET_IDS[packet_id])
            if first == 0x50 and rng.random() < 0.3:
                packets.append(b"\x70\2" + PACKET_IDS[packet_id])
        for packet_id in sorted(session.received)[:some]:
            packets.insert(rng.randrange(len(packets) + 1), b"\x62\2" + PACKET_IDS[packet_id])
        if self.odd or not packets:
            number = rng.randrange(1, 12)
            packets.insert(
                rng.randrange(len(packets) + 1), rng.choice((b"@", b"P", b"b", b"p")) + b"\2" + bytes((0, number))
            )
        if self.odd and rng.random() < 0.3:
            rng.shuffle(packets)
        return packets

    def oddity(self, client: str) -> bytes:
        """Something rare or wrong."""
        rng = self.rng
        kind = rng.randrange(10)
        v5 = self.version(client) == V5
        if kind == 0:
            return b"\xc0\0"
        if kind == 1:
            return encode(Unsubscribe(8, (rng.choice(FILTERS),)), self.version(client))
        if kind == 2:
            return encode(Disconnect(), self.version(client)) if rng.random() < 0.3 else b"\xc0\0"
        if kind == 3:
            return rng.randbytes(rng.randrange(1, 12))
        if kind == 4:  # an acknowledgement with a reason code, right in 5.0 only
            return (
                rng.choice((b"@", b"P", b"b", b"p"))
                + b"\3\0"
                + bytes((rng.randrange(1, 9), rng.choice((0, 0x92, 0x10))))
            )
        if kind == 5:
            return rng.choice((b"@", b"P", b"`", b"b", b"p", b"x")) + b"\2\0" + bytes((rng.randrange(3),))
        if kind == 6:
            block = b"\0" if v5 else b""
            return self.publish(rng.choice(ODD_TOPICS), rng.randrange(3), rng.randrange(3), block, 5)
        whole = bytearray(self.publish(rng.choice(TOPICS), rng.randrange(3), 5, self.block(client), 20))
        if kind == 7:  # a Remaining Length with a byte too many
            whole[1:2] = bytes((whole[1] | 128, 0)) if whole[1] < 128 else whole[1:2]
        elif kind == 8:
            del whole[rng.randrange(2, len(whole)) :]
            whole[1] = min(len(whole) - 2, 127)
        else:
            whole[rng.randrange(min(len(whole), 14))] = rng.randrange(256)
        return bytes(whole)
