"""A small model of an MQTT Server: sessions, routing and message flows, written from the specification alone.

It shares the packet classes with mqtt_trio and nothing else. It is told what Clients send (`Model.handle`) and judges
what they get (`Model.sent`, `Model.settled`): what must be in order is in order, what the specification leaves to the
Server (Packet Identifiers, the order of different topics) may be anything. Times are whole seconds. A `Disagreement`
says which rule the Server broke.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import attrs

from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import NO_PROPERTIES, MessageProperties, Packet, Subscription, Will

NEVER = 0xFFFF_FFFF
"""The Session Expiry Interval of a session that does not expire."""


class Disagreement(AssertionError):
    """Server and model do not agree."""


def demand(condition: object, text: str) -> None:
    if not condition:
        raise Disagreement(text)


def matches(topic_filter: str, topic_name: str) -> bool:
    """5.0 section 4.7, one level after the other."""
    if topic_name.startswith("$") and topic_filter[0] in "#+":
        return False  # 4.7.2
    levels, names = topic_filter.split("/"), topic_name.split("/")
    while levels and levels[0] != "#":
        if not names or levels[0] not in ("+", names[0]):
            return False
        del levels[0], names[0]
    return bool(levels) or not names  # `#` matches what is left, also nothing: the parent level


@attrs.define
class Message:
    topic_name: str
    payload: bytes
    qos: int
    retain: bool
    properties: MessageProperties
    publisher: str
    published_at: int

    @property
    def expires_at(self) -> float:
        interval = self.properties.message_expiry_interval
        return float("inf") if interval is None else self.published_at + interval


@attrs.define(eq=False)
class Owed:
    """A message that a session must get: not sent yet, sent (it has a Packet Identifier), or received (PUBREC)."""

    message: Message
    qos: int
    retain: bool
    identifiers: tuple[int, ...]
    packet_id: int | None = None
    released: bool = False
    live: bool = False
    """It was sent, or repeated, on the present Network Connection."""
    for_filter: str = ""
    """A retained message: the Topic Filter of the subscription that it is for."""


@attrs.define(eq=False)
class Session:
    client_id: str
    subscriptions: dict[str, tuple[Subscription, int | None]] = attrs.Factory(dict)
    owed: list[Owed] = attrs.Factory(list)
    """QoS 1 and 2, in the order in which the Server got them."""
    unreleased: set[int] = attrs.Factory(set)
    """QoS 2 messages of the Client that await PUBREL."""
    expiry_interval: int = 0
    expires_at: float = float("inf")
    will: Will | None = None
    will_at: float = float("inf")
    connection: Connection | None = None

    def owed_as(self, packet_id: int) -> Owed | None:
        return next((owed for owed in self.owed if owed.packet_id == packet_id), None)


@attrs.define(eq=False)
class Connection:
    """One Network Connection, as long as the Server may send something."""

    version: ProtocolVersion = ProtocolVersion.MQTT_5_0
    session: Session | None = None
    receive_maximum: int = 65_535
    open: bool = True
    greeted: bool = False
    ends_session: bool = False
    """CONNECT said Session Expiry Interval 0."""
    replies: deque[Packet] = attrs.Factory(deque)
    """Control packets that the Server must send, in this order."""
    at_most_once: list[Owed] = attrs.Factory(list)
    carried: set[int] = attrs.Factory(set)
    """Of the session's `unreleased`, those of earlier connections: the quota begins anew (4.9)."""
    repeat: list[Owed] = attrs.Factory(list)
    """What was under way when the last connection ended: to be repeated in this order, before anything new."""

    @property
    def v5(self) -> bool:
        return self.version == ProtocolVersion.MQTT_5_0

    def publish_of(self, owed: Owed, now: int, *, packet_id: int | None, dup: bool) -> p.Publish:
        """The PUBLISH that this Client must get."""
        message = owed.message
        properties = NO_PROPERTIES
        identifiers: tuple[int, ...] = ()
        if self.v5:
            properties, identifiers = message.properties, owed.identifiers
            if properties.message_expiry_interval is not None:  # 3.3.2.3.3
                left = max(int(message.expires_at - now), 0)
                properties = attrs.evolve(properties, message_expiry_interval=left)
        name, payload, qos = message.topic_name, message.payload, QoS(owed.qos)
        return p.Publish(name, payload, qos, owed.retain, dup, packet_id, properties, None, identifiers)


@attrs.define
class Model:
    """The Server, with its own choices: PUBLISHes at QoS 1 and 2 that it takes at a time from a 5.0 Client, seconds
    that it keeps a session at most, messages that it has in flight to a Client at most."""

    receive_maximum: int
    expiry_limit: int
    inflight_limit: int
    now: int = 0
    sessions: dict[str, Session] = attrs.Factory(dict)
    retained: dict[str, Message] = attrs.Factory(dict)

    # What Clients do

    def handle(self, connection: Connection, packet: Packet) -> None:
        """A Client sent a packet that is allowed at this point, or a second CONNECT."""
        session = connection.session
        if not connection.open:
            return
        if isinstance(packet, p.Connect) and session is None:
            self._connect(connection, packet)
            return
        assert session is not None, "the first packet is CONNECT"
        match packet:
            case p.Connect():
                self._refuse(connection, ReasonCode.PROTOCOL_ERROR)  # 3.1.0-2
            case p.Publish():
                self._publish(connection, session, packet)
            case p.PubRel():
                known = packet.packet_id in session.unreleased
                session.unreleased.discard(packet.packet_id)
                connection.carried.discard(packet.packet_id)
                code = ReasonCode.SUCCESS if known or not connection.v5 else ReasonCode.PACKET_IDENTIFIER_NOT_FOUND
                connection.replies.append(p.PubComp(packet.packet_id, code))
            case p.PubAck() | p.PubRec() | p.PubComp():
                self._acknowledge(connection, session, packet)
            case p.Subscribe():
                self._subscribe(connection, session, packet)
            case p.Unsubscribe():
                self._unsubscribe(connection, session, packet)
            case p.PingReq():
                connection.replies.append(p.PingResp())
            case p.Disconnect():
                self._disconnect(connection, session, packet)

    def lost(self, connection: Connection) -> None:
        """The Network Connection is gone, for whatever reason."""
        connection.open = False
        connection.at_most_once.clear()
        session = connection.session
        if session is None or session.connection is not connection:
            return
        session.connection = None
        if session.expiry_interval != NEVER:
            session.expires_at = self.now + session.expiry_interval
        if session.will is not None:  # 3.1.2-8: after its delay, or with the session, whichever is first
            session.will_at = self.now + min(session.will.will_delay_interval, session.expiry_interval)
        self._do_what_is_due()

    def next_deadline(self) -> float:
        return min((min(s.will_at, s.expires_at) for s in self.sessions.values()), default=float("inf"))

    def pass_to(self, now: int) -> None:
        """Time passes; never beyond the next deadline in one call."""
        self.now = now
        self._do_what_is_due()

    def _do_what_is_due(self) -> None:
        for session in list(self.sessions.values()):
            if session.will_at <= self.now:
                self._publish_will(session)
            if session.expires_at <= self.now:
                self._end(session)

    def _end(self, session: Session) -> None:
        self._publish_will(session)
        del self.sessions[session.client_id]

    def _publish_will(self, session: Session) -> None:
        will, session.will, session.will_at = session.will, None, float("inf")
        if will is not None:
            self._accept(session, will)

    def _refuse(self, connection: Connection, code: ReasonCode) -> None:
        if connection.v5:
            connection.replies.append(p.Disconnect(code))
        self.lost(connection)

    def _connect(self, connection: Connection, packet: p.Connect) -> None:
        connection.version = packet.protocol_version
        connection.receive_maximum = min(packet.receive_maximum or 65_535, self.inflight_limit)
        connection.ends_session = not packet.session_expiry_interval
        old = self.sessions.get(packet.client_id)
        if old is not None and old.connection is not None:
            self._refuse(old.connection, ReasonCode.SESSION_TAKEN_OVER)  # 3.1.4-3
        old = self.sessions.get(packet.client_id)
        if old is not None and packet.clean_start:  # 3.1.2-4
            self._end(old)
            old = None
        session = self.sessions[packet.client_id] = old or Session(packet.client_id)
        wanted = (packet.session_expiry_interval or 0) if connection.v5 else 0 if packet.clean_start else NEVER
        session.expiry_interval = min(wanted, self.expiry_limit)
        session.expires_at = session.will_at = float("inf")
        session.will = packet.will  # a Will that waited is not published: 3.1.3-9
        session.connection, connection.session = connection, session
        connection.carried = set(session.unreleased)
        connection.repeat = [owed for owed in session.owed if owed.packet_id is not None]
        for owed in session.owed:
            owed.live = False
        connack = p.ConnAck(session_present=old is not None)  # 3.2.2-2, 3.2.2-3
        if connection.v5 and session.expiry_interval != wanted:
            connack.session_expiry_interval = session.expiry_interval
        connection.replies.append(connack)

    def _disconnect(self, connection: Connection, session: Session, packet: p.Disconnect) -> None:
        if packet.session_expiry_interval and connection.ends_session:
            self._refuse(connection, ReasonCode.PROTOCOL_ERROR)  # 3.14.2.2.2
            return
        if packet.session_expiry_interval is not None:
            session.expiry_interval = min(packet.session_expiry_interval, self.expiry_limit)
        if packet.reason_code == ReasonCode.NORMAL_DISCONNECTION:
            session.will = None  # 3.14.4-3
        self.lost(connection)

    # Messages that come in

    def _publish(self, connection: Connection, session: Session, packet: p.Publish) -> None:
        if packet.qos:
            assert packet.packet_id is not None
            repeated = packet.qos == 2 and packet.packet_id in session.unreleased
            mine = len(session.unreleased - connection.carried)
            if connection.v5 and not repeated and mine >= self.receive_maximum:
                self._refuse(connection, ReasonCode.RECEIVE_MAXIMUM_EXCEEDED)  # 3.3.4-9
                return
            if packet.qos == 1:
                connection.replies.append(p.PubAck(packet.packet_id))
            else:
                connection.replies.append(p.PubRec(packet.packet_id))
                session.unreleased.add(packet.packet_id)
            if repeated:
                return  # 4.3.3-10: no second delivery
        self._accept(session, packet)

    def _accept(self, publisher: Session, said: p.Publish | Will) -> None:
        name, payload, properties = said.topic_name, said.payload, said.properties
        message = Message(name, payload, said.qos, said.retain, properties, publisher.client_id, self.now)
        if message.retain and message.payload:
            self.retained[message.topic_name] = message  # 3.3.1-5
        elif message.retain:
            self.retained.pop(message.topic_name, None)  # 3.3.1-6
        for session in self.sessions.values():
            found = [
                (subscription, identifier)
                for topic_filter, (subscription, identifier) in session.subscriptions.items()
                if matches(topic_filter, message.topic_name)
                and not (subscription.no_local and message.publisher == session.client_id)  # 3.8.3-3
            ]
            if found:  # overlapping ones: one copy, the highest QoS, all identifiers (3.3.4-2, 3.3.4-3)
                qos = min(message.qos, max(subscription.qos for subscription, _ in found))
                retain = message.retain and any(subscription.retain_as_published for subscription, _ in found)
                identifiers = sorted(identifier for _, identifier in found if identifier is not None)
                self._owe(session, Owed(message, qos, retain, tuple(identifiers)))

    @staticmethod
    def _owe(session: Session, owed: Owed) -> None:
        if owed.qos:
            session.owed.append(owed)
        elif session.connection is not None:
            session.connection.at_most_once.append(owed)

    # Subscriptions

    def _subscribe(self, connection: Connection, session: Session, packet: p.Subscribe) -> None:
        connection.replies.append(p.SubAck(packet.packet_id, tuple(ReasonCode(s.qos) for s in packet.subscriptions)))
        identifier = packet.subscription_identifier
        wanted = []
        for subscription in packet.subscriptions:
            is_new = subscription.topic_filter not in session.subscriptions
            session.subscriptions[subscription.topic_filter] = (subscription, identifier)
            if subscription.retain_handling == 0 or (subscription.retain_handling == 1 and is_new):
                wanted.append(subscription)
                self._take_back(session, subscription.topic_filter)
        for subscription in wanted:
            for message in self.retained.values():  # whoever published them: No Local is about forwarding
                if message.expires_at > self.now and matches(subscription.topic_filter, message.topic_name):
                    identifiers = () if identifier is None else (identifier,)
                    qos, topic_filter = min(message.qos, subscription.qos), subscription.topic_filter
                    self._owe(session, Owed(message, qos, True, identifiers, for_filter=topic_filter))

    @staticmethod
    def _take_back(session: Session, topic_filter: str) -> None:
        """Retained messages for a subscription that is gone, or made again, are owed no more unless they have left
        (3.10.4-2, 3.10.4-3)."""
        session.owed = [o for o in session.owed if o.packet_id is not None or o.for_filter != topic_filter]

    @staticmethod
    def _unsubscribe(connection: Connection, session: Session, packet: p.Unsubscribe) -> None:
        for topic_filter in packet.topic_filters:
            Model._take_back(session, topic_filter)
        codes = [
            ReasonCode.NO_SUBSCRIPTION_EXISTED
            if session.subscriptions.pop(topic_filter, None) is None
            else ReasonCode.SUCCESS
            for topic_filter in packet.topic_filters
        ]
        connection.replies.append(p.UnsubAck(packet.packet_id, tuple(codes) if connection.v5 else ()))

    # Acknowledgements of what went out

    @staticmethod
    def _acknowledge(connection: Connection, session: Session, packet: p.PubAck | p.PubRec | p.PubComp) -> None:
        owed = session.owed_as(packet.packet_id)
        if isinstance(packet, p.PubRec) and (owed is None or owed.qos != 2):
            code = ReasonCode.PACKET_IDENTIFIER_NOT_FOUND if connection.v5 else ReasonCode.SUCCESS
            connection.replies.append(p.PubRel(packet.packet_id, code))
        elif isinstance(packet, p.PubRec) and owed is not None and packet.reason_code < 0x80:
            owed.released = owed.live = True
            if owed in connection.repeat:
                connection.repeat.remove(owed)
            connection.replies.append(p.PubRel(packet.packet_id))
        elif owed is not None and (
            isinstance(packet, p.PubRec)
            or (isinstance(packet, p.PubAck) and owed.qos == 1)
            or (isinstance(packet, p.PubComp) and owed.released)
        ):
            session.owed.remove(owed)
            if owed in connection.repeat:
                connection.repeat.remove(owed)

    # What the Server does

    def sent(self, connection: Connection, packet: Packet) -> None:
        """The Server sent this packet: it must be one that it may send now."""
        if isinstance(packet, p.ConnAck):  # the rest is the Server's own choice
            packet = p.ConnAck(
                session_present=packet.session_present,
                reason_code=packet.reason_code,
                session_expiry_interval=packet.session_expiry_interval,
            )
        elif isinstance(packet, p.Disconnect):
            packet = p.Disconnect(packet.reason_code)
        elif isinstance(packet, p.PubAck | p.PubRec | p.PubRel | p.PubComp | p.SubAck):
            packet.reason_string = None  # its words are the Server's own choice
        demand(connection.greeted or isinstance(packet, p.ConnAck), "CONNACK is the first packet (3.2.0-1)")
        connection.greeted = True
        if isinstance(packet, p.Publish):
            packet.subscription_identifiers = tuple(sorted(packet.subscription_identifiers))
            self._judge(connection, packet)
            return
        if isinstance(packet, p.PubRel) and connection.repeat and connection.repeat[0].released:
            owed = connection.repeat[0]
            if owed.packet_id == packet.packet_id:
                del connection.repeat[0]
                owed.live = True
                return
        expected = connection.replies.popleft() if connection.replies else None
        demand(expected == packet, f"a control packet in its order: {expected}")

    def _judge(self, connection: Connection, packet: p.Publish) -> None:
        session = connection.session
        assert session is not None
        packet_id = packet.packet_id
        if packet.dup:
            demand(connection.repeat, "DUP only where something is repeated (3.3.1-1)")
            owed = connection.repeat.pop(0)
            expected = connection.publish_of(owed, self.now, packet_id=owed.packet_id, dup=True)
            demand(not owed.released and expected == packet, f"repeated as it was, in order (4.4.0-1): {expected}")
        else:
            owed = self._first_alike(connection, session, packet)
            if packet.qos:
                demand(packet_id and session.owed_as(packet_id) is None, "a Packet Identifier in use (2.2.1-3)")
                demand(not connection.repeat, "new messages come behind repeated ones (4.6.0-1)")
                session.owed.remove(owed)  # what is under way stands in front, in the order of sending (4.6.0-1)
                session.owed.insert(sum(o.packet_id is not None for o in session.owed), owed)
                owed.packet_id = packet_id
            else:
                connection.at_most_once.remove(owed)
        owed.live = True
        unfinished = sum(owed.live and not owed.released for owed in session.owed)
        demand(unfinished <= connection.receive_maximum, "more than Receive Maximum under way (3.3.4-9)")

    def _first_alike(self, connection: Connection, session: Session, packet: p.Publish) -> Owed:
        """The oldest message of each publisher to the topic, at the QoS, may be next (4.6.0-5)."""
        waiting: Iterable[Owed] = connection.at_most_once if packet.qos == 0 else self._waiting(session)
        first: dict[str, Owed] = {}
        for owed in waiting:
            if owed.message.topic_name == packet.topic_name and owed.qos == packet.qos:
                first.setdefault(owed.message.publisher, owed)
        candidates = [connection.publish_of(o, self.now, packet_id=packet.packet_id, dup=False) for o in first.values()]
        demand(packet in candidates, f"the next message of this topic and QoS: one of {candidates}")
        return list(first.values())[candidates.index(packet)]

    def _waiting(self, session: Session) -> Iterator[Owed]:
        return (o for o in session.owed if o.packet_id is None and o.message.expires_at > self.now)

    def settled(self, connection: Connection) -> None:
        """The Server has sent what it wants to: nothing may be missing."""
        demand(not connection.replies, f"missing: {list(connection.replies)}")
        session = connection.session
        if not connection.open or session is None:
            return
        demand(not connection.at_most_once, f"not sent: {connection.at_most_once}")
        under_way = sum(owed.live for owed in session.owed)
        if under_way < connection.receive_maximum:
            demand(not connection.repeat, f"not repeated: {connection.repeat}")
            waiting = list(self._waiting(session))
            demand(not waiting, f"not sent although there is a free slot: {waiting}")
