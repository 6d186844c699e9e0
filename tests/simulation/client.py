"""An honest MQTT client on a bad network: it keeps its session, resends, acknowledges in order, and complains."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

import attrs

from tests.simulation.codec import (
    DUP,
    PUBACK,
    PUBREC,
    PUBREL,
    RECEIVE_MAXIMUM,
    ack,
    read_code,
    read_properties,
    split,
    two_bytes,
    write_connect,
)
from tests.simulation.history import History, Message
from tests.simulation.network import Connection, World
from tests.simulation.plan import CALM_AT, ClientPlan
from tests.simulation.receiver import Receiver
from tests.simulation.subscriber import Subscriber
from tests.wire import DISCONNECT, PINGREQ, V5, V311, publish

REFUSED: Final = 0x97
SHUTTING_DOWN: Final = 0x8B
TAKEN_OVER: Final = 0x8E
KEEP_ALIVE_TIMEOUT: Final = 0x8D


@attrs.define
class Outgoing:
    """A message on its way out, until its last acknowledgement."""

    message: Message
    released: bool = False
    """PUBREC came: PUBREL is owed."""
    sent_at: float = 0.0
    """When it was sent last."""


@attrs.define
class Talk:
    """What a client knows of one connection."""

    connection: Connection
    receive_maximum: int | None
    """What we announced."""
    clean: bool = False
    """Clean Start."""
    accepted: bool = False
    """CONNACK came."""
    unread: bytes = b""
    writing: list[bytes] = attrs.Factory(list)
    """Packets that leave together."""
    server_maximum: int = 65_535
    """Receive Maximum of the server."""
    unconfirmed: dict[int, deque[int]] = attrs.Factory(lambda: {PUBACK: deque(), PUBREC: deque()})
    """Packet Identifiers of PUBLISHes in the order in which their PUBACK or PUBREC has to come."""


class Client:
    """One client over all its connections."""

    def __init__(self, world: World, plan: ClientPlan, history: History, rng: random.Random) -> None:
        self.world, self.plan, self.history, self.rng = world, plan, history, rng
        self.name, self.number, self.habits = plan.name, plan.number, plan.habits
        self.version = V5 if plan.habits.v5 else V311
        self.talk: Talk | None = None
        self.talks = 0
        self.has_session = False
        """A CONNACK came once, so the server has our session."""
        self.is_sure = False
        """Something was confirmed, and the store had it: the session is there from then on, whatever is killed."""
        self.kills = 0
        """How often the broker had been killed when the last CONNACK came."""
        self.starts_clean = False
        """The session is to end with the next CONNACK."""
        self.was_left_early = False
        """A connection was left before its CONNACK: its CONNECT may come late, and take over from a later one."""
        self.to_send: deque[Message] = deque()
        self.outgoing: dict[int, Outgoing] = {}
        """By Packet Identifier, in the order of sending; outlives connections."""
        self.next_id = plan.habits.first_id
        self.receiver = Receiver(self)
        self.subscriber = Subscriber(self)
        self._handlers: dict[int, Callable[[Talk, int, bytes], None]] = {
            2: self._connack,
            3: self.receiver.publish,
            4: self._puback,
            5: self._pubrec,
            6: self.receiver.pubrel,
            7: self._pubcomp,
            9: self.subscriber.answered,
            11: self.subscriber.answered,
            13: lambda talk, first, body: None,
            14: self._disconnected,
        }

    def start(self) -> None:
        """Put everything that the plan says on the clock."""
        after, number = self.world.after, self.number
        after(self.plan.starts_at, number, self.connect)
        for at, messages in self.plan.bursts:
            after(at, number, partial(self._burst, messages))
        for at, wanted, topic_filter in self.plan.changes:
            after(at, number, partial(self._change, wanted, topic_filter))

    def complain(self, text: str) -> None:
        """Tell what no broker may do."""
        self.history.complaints.append((self.name, text))
        self.note(f"complains: {text}")

    def note(self, what: str, payload: bytes | None = None) -> None:
        self.history.note(self.world.now, self.name, what, payload)

    def later(self, delay: float, action: Callable[[Talk], None], talk: Talk, *, idle: bool = False) -> None:
        """Do something later if the connection still is the one."""

        def act() -> None:
            if self.talk is talk:
                action(talk)

        self.world.after(delay, self.number, act, idle=idle)

    # Connections

    def connect(self) -> None:
        """Open a connection and begin; an older one is not used any more."""
        habits = self.habits
        connection = self.world.open(self)
        receive_maximum = self.rng.choice(habits.receive_maxima) if habits.v5 else None
        if habits.starts_clean and not self.starts_clean:
            self.starts_clean = self.rng.random() < habits.starts_clean
        self.talk = talk = Talk(connection, receive_maximum, self.starts_clean)
        self.talks += 1
        self.history.connections[self.name] += 1
        if talk.clean:
            self.subscriber.ends()
        self.note("CONNECT" if receive_maximum is None else f"CONNECT, Receive Maximum {receive_maximum}")
        connection.send(self.connect_packet(talk))
        if habits.mean_life != float("inf") and self.world.now < CALM_AT:
            self.later(self.rng.expovariate(1 / habits.mean_life), self._end, talk)

    def connect_packet(self, talk: Talk) -> bytes:
        """Make the CONNECT of a new connection."""
        habits = self.habits
        return write_connect(
            habits.v5,
            self.name,
            habits.keep_alive,
            talk.receive_maximum,
            habits.topic_alias_maximum,
            clean=talk.clean,
            lasts=habits.lasts,
        )

    def _end(self, talk: Talk) -> None:
        """The end of a connection, in one of many ways."""
        if self.world.now >= CALM_AT:
            return
        connection = talk.connection
        kind = self.rng.choice(("cut", "cut", "close", "cut_at_broker", "go_silent", "take_over", "disconnect"))
        if self.habits.starts_clean and not talk.accepted:
            kind = "cut"  # its CONNECT must not come behind a later one and end that one's session
        self.note(kind)
        self.history.counts[kind] += 1
        if kind == "take_over":
            connection.leave_open()
            self._forget()
            self.connect()
        elif kind == "disconnect":
            connection.send(DISCONNECT)
            connection.close()
        else:
            getattr(connection, kind)()

    def closed(self, connection: Connection) -> None:
        """The connection is gone: come back after a while."""
        if self.talk is not None and self.talk.connection is connection:
            self._forget()
            self.world.after(self.rng.random() * self.habits.longest_pause, self.number, self._come_back)

    def _forget(self) -> None:
        assert self.talk is not None
        self.was_left_early |= not self.talk.accepted
        self.talk = None
        self.receiver.disconnected()
        self.subscriber.disconnected()

    def _come_back(self) -> None:
        if self.talk is None:
            self.connect()

    def missed(self, connection: Connection, data: bytes) -> None:
        """Learn what the broker wrote that never came, and how it ended the connection."""
        packets, _ = split(data)
        self.receiver.missed(connection, packets)
        reason = next((body[0] if body else 0 for first, body in packets if first == 0xE0), None)
        if connection.excused:
            self.note("the broker closed the connection, and may")
        elif connection.reset:
            self.note("the broker closed the connection")
            if not self.was_left_early or reason not in (TAKEN_OVER, None):
                self.complain(f"the broker closed the connection, Reason Code {reason}")
        elif reason not in (TAKEN_OVER, KEEP_ALIVE_TIMEOUT, SHUTTING_DOWN, None):
            self.complain(f"DISCONNECT with Reason Code {reason:#x}")

    def received(self, connection: Connection, data: bytes) -> None:
        """Read what came, answer it, send what may go now."""
        talk = self.talk
        if talk is None or talk.connection is not connection:
            return
        before = len(talk.unread) + len(data)
        packets, talk.unread = split(talk.unread + data)
        connection.consumed += before - len(talk.unread)
        for first, body in packets:
            if not talk.accepted and first != 0x20:
                self.complain(f"packet {first:#x} in front of CONNACK")
            self._handlers[first >> 4](talk, first, body)
        self.receiver.acknowledge(talk)
        self._send(talk)

    def write(self, talk: Talk) -> None:
        """Have what was gathered leave in one piece."""
        if talk.writing:
            data = b"".join(talk.writing)
            talk.writing.clear()
            talk.connection.send(data)

    def _connack(self, talk: Talk, first: int, body: bytes) -> None:
        present, code = body[0], body[1]
        if code or talk.accepted:
            self.complain(f"CONNACK {code:#x}")
            return
        if talk.clean:
            if present:
                self.complain("a session is present behind Clean Start")
            self.subscriber.ended()
            self.receiver.session_ended()
            self.starts_clean = False
        elif present != 1 and self.has_session:
            if self.kills == talk.connection.kills or self.is_sure:
                self.complain("the session is gone [MQTT5-3.1.2-5]")
            self._begin_anew()
        if present and self.talks == 1:
            self.complain("a session is present before the first connection")
        talk.accepted = self.has_session = True
        self.kills = talk.connection.kills
        if self.habits.v5:
            properties, _, _ = read_properties(body, 2)
            talk.server_maximum = properties.get(RECEIVE_MAXIMUM, 65_535)
        self.note("CONNACK")
        self.subscriber.connected(talk)
        self._resend(talk)
        if self.habits.keep_alive:
            self.later(self.habits.keep_alive * 0.8, self._ping, talk, idle=True)

    def _begin_anew(self) -> None:
        """The session, of which nothing was confirmed, went with a broker that was killed [MQTT5-3.2.2-5]: what was
        not acknowledged is published as new."""
        self.history.counts["sessions gone"] += 1
        self.to_send.extendleft(out.message for out in reversed(self.outgoing.values()) if not out.released)
        self.outgoing.clear()
        self.receiver.session_ended()

    def restarted(self, *, killed: bool) -> None:
        """The broker began anew; after a kill it may have forgotten what it had told."""
        if killed:
            self.subscriber.killed()

    def _ping(self, talk: Talk) -> None:
        talk.connection.send(PINGREQ)
        self.later(self.habits.keep_alive * 0.8, self._ping, talk, idle=True)

    def _disconnected(self, talk: Talk, first: int, body: bytes) -> None:
        self.complain(f"DISCONNECT {body.hex()} and no end")

    # Publishing

    def _burst(self, messages: list[Message]) -> None:
        self.to_send += messages
        if (talk := self.talk) is not None:
            self._send(talk)
            if self.rng.random() < self.habits.breaks_off:
                self.later(self.rng.random() * 2 * self.habits.latency, self._end, talk)

    def _change(self, wanted: bool, topic_filter: str) -> None:
        self.subscriber.change(wanted, topic_filter)
        if self.talk is not None:
            self.subscriber.ask(self.talk)
            self.write(self.talk)

    def _send(self, talk: Talk) -> None:
        """Send what waits, up to Receive Maximum [MQTT5-3.3.4-7]."""
        if talk.accepted:
            self.subscriber.ask(talk)
            window = min(self.habits.window, talk.server_maximum)
            to_send, outgoing = self.to_send, self.outgoing
            while to_send and (not to_send[0].qos or len(outgoing) < window):
                message = to_send.popleft()
                packet_id = 0
                if message.qos:
                    packet_id = self._take_id()
                    outgoing[packet_id] = Outgoing(message)
                self._publish(talk, message, packet_id, dup=False)
        self.write(talk)

    def _take_id(self) -> int:
        if self.habits.reuses_ids:
            self.next_id = 1
        while self.next_id in self.outgoing:
            self.next_id = self.next_id % 65_535 + 1
        packet_id = self.next_id
        self.next_id = packet_id % 65_535 + 1
        return packet_id

    def _publish(self, talk: Talk, message: Message, packet_id: int, *, dup: bool) -> None:
        message.sent_at = min(message.sent_at, self.world.now)
        message.attempts += 1
        flags = message.qos << 1 | (DUP if dup else 0) | message.retain
        if message.qos:
            self.outgoing[packet_id].sent_at = self.world.now
            talk.unconfirmed[PUBACK if message.qos == 1 else PUBREC].append(packet_id)
        self.note(f"PUBLISH {packet_id}{' DUP' if dup else ''} sent:", message.payload)
        self.history.counts["publisher's DUP"] += dup
        self.history.counts["QoS 2 again"] += dup and message.qos == 2
        frame = publish(
            self.version,
            message.topic_name,
            b"" if message.removes else message.payload,
            flags=flags,
            packet_id=packet_id,
            properties=message.user_properties,
        )
        talk.writing.append(frame)

    def _resend(self, talk: Talk) -> None:
        """Send again what is not acknowledged, in its order [MQTT5-4.4.0-1], [MQTT5-4.6.0-1]."""
        for packet_id, out in self.outgoing.items():
            if out.released:
                self.note(f"PUBREL {packet_id} sent:", out.message.payload)
                talk.writing.append(ack(PUBREL, packet_id))
            else:
                self._publish(talk, out.message, packet_id, dup=True)

    def _confirmed(self, talk: Talk, kind: int, packet_id: int, code: int) -> Outgoing | None:
        """Look at a PUBACK or PUBREC: they come in the order of the PUBLISHes. None: it did not say yes."""
        expected = talk.unconfirmed[kind]
        out = self.outgoing.get(packet_id)
        name = "PUBACK" if kind == PUBACK else "PUBREC"
        if out is None or packet_id not in expected:
            self.complain(f"{name} {packet_id} for nothing")
            return None
        if expected[0] != packet_id:
            self.complain(f"{name} {packet_id} in front of {expected[0]}, which was published before it")
        expected.remove(packet_id)
        self.note(f"{name} {packet_id}:", out.message.payload)
        if code < 0x80:
            out.message.taken_at = min(out.message.taken_at, self.world.now)
            return out
        if code != REFUSED or self.world.failed_at < out.sent_at or out.released or not self.habits.v5:
            self.complain(f"{name} {packet_id} with Reason Code {code:#x}")
        self.history.counts["refused"] += 1
        out.message.refused_at = self.world.now
        del self.outgoing[packet_id]
        return None

    def _puback(self, talk: Talk, first: int, body: bytes) -> None:
        packet_id = two_bytes(body)
        if self._confirmed(talk, PUBACK, packet_id, read_code(body)) is not None:
            del self.outgoing[packet_id]

    def _pubrec(self, talk: Talk, first: int, body: bytes) -> None:
        packet_id = two_bytes(body)
        out = self._confirmed(talk, PUBREC, packet_id, read_code(body))
        if out is not None:
            out.released = True
            talk.writing.append(ack(PUBREL, packet_id))

    def _pubcomp(self, talk: Talk, first: int, body: bytes) -> None:
        packet_id = two_bytes(body)
        out = self.outgoing.get(packet_id)
        if out is None or not out.released:
            self.complain(f"PUBCOMP {packet_id} for nothing")
            return
        self.note(f"PUBCOMP {packet_id}:", out.message.payload)
        del self.outgoing[packet_id]

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.to_send or self.outgoing or self.receiver.unreleased or self.subscriber.requests)
