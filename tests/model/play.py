"""Plays a script to the broker and to the model, compares them after every step, and makes a failing script short."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator
from typing import Final, TypeAlias

import attrs
import trio
import trio.testing

from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.session import Session
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import (
    NO_PROPERTIES,
    Connect,
    Disconnect,
    Packet,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Subscription,
)
from tests.model.scripts import Acknowledging, Connecting, Cutting, Script, Sending, Step, Waiting, Wrapping
from tests.model.specification import Connection, Disagreement, Model, demand
from tests.model.world import Wire, World

Answer: TypeAlias = type[PubAck] | type[PubRec] | type[PubComp]
V5: Final = ProtocolVersion.MQTT_5_0
LAST_WORDS: Final = 200
"""Rounds of acknowledgements after which every message must have come."""


@attrs.define(eq=False)
class Client:
    """What a client knows: its connection, and the messages that it holds."""

    wire: Wire
    seen: Connection
    connection: ClientConnection
    held: dict[int, Answer]
    """Packet Identifier -> the packet that answers it; outlives the connection."""

    @property
    def version(self) -> ProtocolVersion:
        return self.connection.protocol_version


class Game:
    """One script, played."""

    def __init__(self, clock: trio.testing.MockClock, script: Script, lane: type[FastLane] = FastLane) -> None:
        self.script = script
        limits = script.limits
        self.world = World(clock, limits, lane)
        self.model = Model(limits.receive_maximum, limits.session_expiry_interval, limits.inflight_messages)
        self.clients: dict[str, Client] = {}
        self.old: list[Client] = []
        """Clients whose connection was taken over in this step."""
        self.seen: Counter[str] = Counter()
        """How often the broker sent something special."""

    def play(self) -> None:
        """Play to the end.

        Raises:
          Disagreement: broker and model do not agree.
        """
        for step in self.script.steps:
            self.step(step)
        self.compare_state()
        self.collect()

    def step(self, step: Step) -> None:
        match step:
            case Waiting():
                self.wait(self.world.now + step.seconds)
            case Connecting():
                self.connect(step.client, step.connect)
            case Sending():
                self.send(step)
            case Acknowledging():
                self.acknowledge(step)
            case Cutting():
                self.cut(step)
            case Wrapping():
                self.wrap(step.client)
        self.look()

    def wait(self, end: int) -> None:
        while self.world.now < end:
            now = int(min(end, self.world.next_deadline(), self.model.next_deadline()))
            self.world.pass_to(now)
            self.model.pass_to(now)
            self.look()

    def connect(self, name: str, packet: Connect) -> None:
        before = self.clients.get(name)
        if before is not None:
            self.old.append(before)
        version = packet.protocol_version
        wire, seen = self.world.open(), Connection()
        held = before.held if before is not None else {}
        self.clients[name] = Client(wire, seen, ClientConnection(protocol_version=version), held)
        self.world.feed(wire, encode(packet, version))
        self.model.handle(seen, packet)

    def send(self, step: Sending) -> None:
        client = self.clients.get(step.client)
        if client is None or not client.seen.open:
            return
        packets = [for_version(packet, client.version) for packet in step.packets]
        data = b"".join(encode(packet, client.version) for packet in packets)
        if step.split:
            self.world.feed(client.wire, data[: step.split])
        self.world.feed(client.wire, data[step.split :])
        for packet in packets:
            self.model.handle(client.seen, packet)

    def acknowledge(self, step: Acknowledging) -> None:
        client = self.clients.get(step.client)
        if client is None or not client.seen.open or not client.held:
            return
        packet_id = list(client.held)[step.which % len(client.held)]
        right = client.held[packet_id]
        packet: Packet = right(packet_id)
        if step.how == "reject" and right is PubRec and client.version is V5:
            packet = PubRec(packet_id, ReasonCode.QUOTA_EXCEEDED)
        elif step.how in WITHOUT_NEED:
            packet = WITHOUT_NEED[step.how](packet_id)
        refused = isinstance(packet, PubRec) and packet.reason_code >= 0x80
        if refused or (type(packet) is right and right is not PubRec):
            del client.held[packet_id]
        self.world.feed(client.wire, encode(packet, client.version))
        self.model.handle(client.seen, packet)

    def cut(self, step: Cutting) -> None:
        client = self.clients.get(step.client)
        if client is None or not client.seen.open:
            return
        if step.torn:
            packet = Publish("t", b"never arrives whole", QoS(1), packet_id=20)
            self.world.feed(client.wire, encode(packet, client.version)[: step.torn])
        self.world.lose(client.wire)
        self.model.lost(client.seen)

    def wrap(self, name: str) -> None:
        """As if 65,535 messages had gone to the client: the next Packet Identifier is one that is in use."""
        session = self.world.broker.connections.sessions.get(name)
        if session is not None and session.inflight:
            session.next_id = next(iter(session.inflight))

    # Comparing

    def look(self) -> None:
        """Let the model see what everybody got."""
        for client in (*self.old, *self.clients.values()):
            data = client.wire.take()
            if data:
                client.connection.receive_data(data)
                while (packet := client.connection.next_packet()) is not None:
                    try:
                        self.model.sent(client.seen, packet)
                    except Disagreement as exc:
                        raise Disagreement(f"the broker sent {packet}; the model wants {exc}") from None
                    hold(client, packet)
                    self.count(packet)
            self.model.settled(client.seen)
            demand(client.wire.ended != client.seen.open, f"connection open in the model: {client.seen.open}")
        self.old.clear()

    def count(self, packet: Packet) -> None:
        if isinstance(packet, Publish):
            self.seen.update(name for name in ("dup", "retain") if getattr(packet, name))
        elif isinstance(packet, PubRel):
            self.seen["PUBREL"] += 1
        elif isinstance(packet, Disconnect):
            self.seen[packet.reason_code.name] += 1

    def compare_state(self) -> None:
        """Compare what both remember."""
        broker, model = self.world.broker, self.model
        sessions = broker.connections.sessions
        same("sessions", set(sessions), set(model.sessions))
        for name, session in sessions.items():
            mine = model.sessions[name]
            subscriptions = {
                f: (
                    Subscription(f, o.qos, o.no_local, o.retain_as_published, o.retain_handling),
                    o.subscription_identifier,
                )
                for f, o in session.subscriptions.items()
            }
            same(f"subscriptions of {name}", subscriptions, mine.subscriptions)
            same(f"QoS 2 of {name} on its way in", session.received, mine.unreleased)
            same(f"in flight to {name}", list(session.inflight), [o.packet_id for o in mine.owed if o.packet_id])
            now = self.world.now
            queue = [
                (message.topic_name, message.payload, qos, retain)
                for message, qos, retain in _owed(session)
                if (at := message.expires_at) is None or at > broker.wall_offset + trio.current_time()
            ]
            waiting = [
                (o.message.topic_name, o.message.payload, o.qos, o.retain)
                for o in mine.owed
                if not o.packet_id and o.message.expires_at > now
            ]
            same(f"queue of {name}", sorted(queue), sorted(waiting))
        retained = {m.topic_name: m.payload for m in broker.retained}
        for message in model.retained.values():
            if message.expires_at > self.world.now:
                same("retained messages", retained.get(message.topic_name), message.payload)
        same("retained messages that should not be there", set(retained) - set(model.retained), set())
        self.compare_gauges()

    def compare_gauges(self) -> None:
        metrics, model = self.world.broker.metrics, self.model
        same("gauge sessions", metrics.sessions, len(model.sessions))
        online = sum(session.connection is not None for session in model.sessions.values())
        same("gauge clients_connected", metrics.clients_connected, online)
        same("gauge subscriptions", metrics.subscriptions, sum(len(s.subscriptions) for s in model.sessions.values()))
        same("the router's count", self.world.broker.router.count, metrics.subscriptions)
        queued = sum(len(session.queue) for session in self.world.broker.connections.sessions.values())
        same("gauge messages_queued", metrics.messages_queued, queued)
        same("client_failures", metrics.client_failures, 0)

    def collect(self) -> None:
        """Everybody whose session is there comes back and takes what is owed: nothing may be left."""
        for name in list(self.model.sessions):
            packet = Connect(client_id=name, clean_start=False, session_expiry_interval=1000)
            self.step(Connecting(name, packet))
            for _ in range(LAST_WORDS):
                if not self.clients[name].held:
                    break
                self.step(Acknowledging(name, 0, "right"))
            now = self.world.now
            left = [o for o in self.model.sessions[name].owed if o.packet_id or o.message.expires_at > now]
            demand(not left, f"{name} does not get what it is owed: {left}")


WITHOUT_NEED: Final[dict[str, Answer]] = {"PUBACK": PubAck, "PUBREC": PubRec, "PUBCOMP": PubComp}


def hold(client: Client, packet: Packet) -> None:
    """Remember how a packet is to be answered."""
    if isinstance(packet, Publish) and packet.packet_id is not None:
        client.held.pop(packet.packet_id, None)
        client.held[packet.packet_id] = PubAck if packet.qos == 1 else PubRec
    elif isinstance(packet, PubRel):
        client.held[packet.packet_id] = PubComp


def for_version(packet: Packet, version: ProtocolVersion) -> Packet:
    """Leave out what the version does not know."""
    if version is V5:
        return packet
    match packet:
        case Publish():
            return attrs.evolve(packet, properties=NO_PROPERTIES)
        case Subscribe():
            plain = tuple(Subscription(s.topic_filter, s.qos) for s in packet.subscriptions)
            return Subscribe(packet.packet_id, plain)
        case Disconnect():
            return Disconnect()
        case Connect():
            return Connect(client_id=packet.client_id, protocol_version=version)
    return packet


def same(what: str, actual: object, expected: object) -> None:
    demand(actual == expected, f"{what}: the broker has {actual}, the model {expected}")


def failure(clock: trio.testing.MockClock, script: Script) -> str | None:
    """Play a script; return what went wrong, or None."""
    try:
        Game(clock, script).play()
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return None


def shortened(clock: trio.testing.MockClock, script: Script) -> Script:
    """Return a script that still fails, without the steps that it does not need for that."""
    position = 0
    while position < len(script.steps):
        shorter = attrs.evolve(script, steps=script.steps[:position] + script.steps[position + 1 :])
        if failure(clock, shorter) is not None:
            script = shorter
        else:
            position += 1
    return script


def brief(value: object) -> str:
    """Write a value without what is as always."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(brief, value))}]"
    kind = type(value)
    if not attrs.has(kind):
        return str(value) if isinstance(value, enum.Enum) else repr(value)
    fields = [(f.name, getattr(value, f.name)) for f in attrs.fields(kind) if getattr(value, f.name) != f.default]
    return f"{kind.__name__}({', '.join(f'{name}={brief(field)}' for name, field in fields)})"


def explain(clock: trio.testing.MockClock, seed: int, script: Script) -> str:
    """Say how a seed fails, with the shortest script that fails too, and how to see it again."""
    short = shortened(clock, script)
    lines = [
        f"seed {seed}: {failure(clock, script)}",
        f"shortened to {len(short.steps)} steps: {failure(clock, short)}",
    ]
    lines += [f"  {brief(part)}" for part in (short.limits, *short.steps)]
    lines.append(f"again: SEED={seed} python -m pytest tests/model")
    return "\n".join(lines)


def _owed(session: Session) -> Iterator[tuple[Message, int, bool]]:
    """What waits for a session, with its QoS and RETAIN: its queue, and retained messages for new subscriptions."""
    for delivery in session.queue:
        yield delivery.message, delivery.qos, delivery.retain
    for burst in session.bursts:
        for message in burst.acknowledged:
            yield message, min(message.qos, burst.options.qos), True
