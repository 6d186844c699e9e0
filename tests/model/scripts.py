"""Random scripts: what a few clients do, in which order. Data only; every step can be played after any other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs

from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import (
    NO_PROPERTIES,
    Connect,
    Disconnect,
    MessageProperties,
    Packet,
    PingReq,
    Publish,
    PubRel,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
)

NAMES = ("a", "b", "c")
TOPICS = ("t", "t/u", "t/u/v", "x", "$odd/t")
FILTERS = ("t", "t/u", "t/#", "t/+", "+", "+/u", "#", "x", "x/#", "$odd/#", "$odd/t", "+/t", "w/+", "t/+/v")
PACKETS = 40
"""Packets of one script, at most."""
V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


@attrs.define
class Connecting:
    """Open a connection; one of the same client that is still there is taken over."""

    client: str
    connect: Connect


@attrs.define
class Sending:
    """Send packets in one write of which `split` bytes arrive first (5.0 forms; a 3.1.1 client sends its own)."""

    client: str
    packets: list[Packet]
    split: int


@attrs.define
class Acknowledging:
    """Answer the message of number `which` (modulo) among those that the client holds. `how`: as the protocol says,
    `reject` (a PUBREC that refuses), or the name of the packet that is sent without need."""

    client: str
    which: int
    how: str


@attrs.define
class Cutting:
    """The connection breaks; `torn` bytes of one more PUBLISH arrive before."""

    client: str
    torn: int


@attrs.define
class Waiting:
    seconds: int


@attrs.define
class Wrapping:
    """The client's Packet Identifiers begin again at one that is in use."""

    client: str


Step = Connecting | Sending | Acknowledging | Cutting | Waiting | Wrapping


@attrs.define
class Script:
    limits: Limits
    steps: list[Step]


class _Writer:
    """Writes one script."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.left = PACKETS
        self.payloads = 0
        self.steps: list[Step] = []
        self.topics = self.rng.sample(TOPICS, self.rng.choice((1, 2, 2, 5)))
        self.filters = self.rng.sample(FILTERS, self.rng.choice((2, 4, 8)))
        self.wants_expiry = self.rng.random() < 0.3

    def add(self, step: Step, packets: int = 1) -> None:
        self.steps.append(step)
        self.left -= packets

    def payload(self) -> bytes:
        self.payloads += 1
        return b"%d" % self.payloads

    def qos(self) -> QoS:
        return QoS(self.rng.choice((0, 1, 1, 2, 2)))

    def properties(self) -> MessageProperties:
        if self.wants_expiry and self.rng.random() < 0.5:
            return MessageProperties(message_expiry_interval=self.rng.choice((1, 3, 10, 1000)))
        if self.rng.random() < 0.1:
            return MessageProperties(content_type="c", user_properties=(("k", "v"), ("k", "w")))
        return NO_PROPERTIES

    def connect(self, client: str) -> None:
        rng, will = self.rng, None
        version = rng.choice((V311, V5, V5))
        if rng.random() < 0.3:
            will = Will(
                topic_name=f"w/{client}",
                payload=self.payload() if rng.random() < 0.9 else b"",
                qos=self.qos(),
                retain=rng.random() < 0.3,
                will_delay_interval=rng.choice((0, 2, 5, 100)) if version is V5 else 0,
                properties=self.properties() if version is V5 else NO_PROPERTIES,
            )
        packet = Connect(client_id=client, protocol_version=version, clean_start=rng.random() < 0.3, will=will)
        if version is V5:
            packet.session_expiry_interval = rng.choice((None, 0, 3, 50, 0xFFFF_FFFF, 0xFFFF_FFFF))
            packet.receive_maximum = rng.choice((None, None, 1, 2))
        self.add(Connecting(client, packet))

    def subscribe(self, client: str) -> None:
        rng = self.rng
        subscriptions = tuple(
            Subscription(
                rng.choice(self.filters),
                QoS(rng.choice((0, 1, 2, 2))),
                no_local=rng.random() < 0.2,
                retain_as_published=rng.random() < 0.3,
                retain_handling=rng.choice((0, 0, 1, 2)),
            )
            for _ in range(rng.choice((1, 1, 2)))
        )
        identifier = rng.choice((None, None, 1, 2, 300))
        self.send(client, [Subscribe(rng.randrange(30, 33), subscriptions, identifier)])

    def publish(self, client: str) -> None:
        """One message, or a burst on one topic."""
        rng = self.rng
        topic, qos = rng.choice(self.topics), self.qos()
        count = min(self.left, rng.choice((1, 1, 2, 4))) if qos < 2 else 1
        properties = self.properties()
        packets: list[Packet] = []
        for number in range(count):
            retain = rng.random() < 0.2
            payload = b"" if rng.random() < 0.1 else self.payload()
            packet_id = None if not qos else 10 + number if qos == 1 else rng.randrange(1, 5)
            dup = bool(qos) and rng.random() < 0.1
            packets.append(Publish(topic, payload, qos, retain, dup, packet_id, properties))
        self.send(client, packets)

    def send(self, client: str, packets: list[Packet]) -> None:
        self.add(Sending(client, packets, self.rng.choice((0, 0, 1, 3, 20))), len(packets))

    def acknowledge(self, client: str) -> None:
        how = self.rng.choice(("right",) * 12 + ("reject", "PUBACK", "PUBREC", "PUBCOMP"))
        for _ in range(min(self.left, self.rng.choice((1, 2, 4)))):
            self.add(Acknowledging(client, self.rng.choice((0, 0, 0, 1, 5)), how))

    def leave(self, client: str) -> None:
        code = self.rng.choice((ReasonCode.NORMAL_DISCONNECTION,) * 3 + (ReasonCode.DISCONNECT_WITH_WILL_MESSAGE,))
        self.send(client, [Disconnect(code, self.rng.choice((None, None, 0, 5, 60)))])

    def rare(self, client: str) -> None:
        self.send(client, [self.rng.choice((PingReq(), PingReq(), Connect(client_id=client)))])

    def write(self) -> Script:
        rng = self.rng
        limits = Limits(
            receive_maximum=rng.choice((2, 1024, 1024)),
            inflight_messages=rng.choice((3, 1024, 1024)),
            session_expiry_interval=rng.choice((60, 0xFFFF_FFFF)),
        )
        deeds: tuple[tuple[Callable[[str], Any], float], ...] = (
            (self.publish, 8),
            (self.acknowledge, 5),
            (self.subscribe, 2.5),
            (self.connect, 2.5),
            (lambda client: self.send(client, [PubRel(rng.randrange(1, 5))]), 2),
            (lambda client: self.add(Cutting(client, rng.choice((0, 0, 1, 5)))), 1.2),
            (lambda client: self.add(Waiting(rng.choice((1, 1, 2, 5, 30, 100)))), 1.5),
            (lambda client: self.send(client, [Unsubscribe(40, (rng.choice(self.filters),))]), 0.5),
            (self.leave, 0.6),
            (self.rare, 0.2),
            (lambda client: self.add(Wrapping(client), 0), 0.5),
        )
        kinds, weights = zip(*deeds, strict=True)
        names = NAMES[: rng.choice((1, 2, 2, 3))]
        for client in names:
            self.connect(client)
            self.subscribe(client)
        end = rng.choice((5, 0, 0))
        while self.left > end:
            rng.choices(kinds, weights)[0](rng.choice(names))
        return Script(limits, self.steps)


def write_script(seed: int) -> Script:
    """Return the script of a seed: the same one always."""
    return _Writer(seed).write()
