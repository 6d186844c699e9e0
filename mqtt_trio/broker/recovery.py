"""What a store held becomes a broker's sessions, groups and retained messages again, before anybody connects."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from mqtt_trio.broker.journal import RELEASED, RETAIN
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import NEVER, Delivery, Released, Session
from mqtt_trio.broker.shares import ShareGroup
from mqtt_trio.broker.store import DeliveryRow, RetainedRow, SessionRow, StoredState, SubscriptionRow
from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.decode import decode_publish
from mqtt_trio.protocol.packets import Will
from mqtt_trio.protocol.topics import split_shared
from mqtt_trio.protocol.wire import read_header

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker

logger = logging.getLogger(__name__)

VERSIONS: Final = {4: ProtocolVersion.MQTT_3_1_1, 5: ProtocolVersion.MQTT_5_0}


class Recovery:
    """Gives one broker, which has no sessions yet, what its store held."""

    def __init__(self, broker: Broker, state: StoredState, now: float) -> None:
        self.broker = broker
        self.state = state
        self.now = now
        self.sessions: dict[int, Session] = {}
        self.groups: dict[int, ShareGroup] = {}
        self._groups_by_name: dict[str, ShareGroup] = {}
        self.unreadable = 0
        """Rows that cannot be what was written; they are left out, and counted in one message."""
        self.beyond_limits = 0
        """Retained messages for which [Limits] leave no room any more. They stay in the store."""
        self._last: tuple[bytes | None, int, Message | None] = (None, 0, None)

    def run(self) -> None:
        """Restore everything, then do what became due meanwhile: sessions that expired are removed, Wills whose delay
        ran out are published."""
        self.restore()
        self.broker.connections.run_deadlines(self.now)

    def restore(self) -> None:
        """Restore everything. Messages that expired meanwhile are removed; a session whose client was connected counts
        as disconnected now. What is due is left to the first `run_deadlines`: taps are to see the Wills, too."""
        journal, state = self.broker.journal, self.state
        journal.last_owner, journal.last_number = state.last_owner, state.last_number
        journal.safe = journal.last_number
        journal.resumed, journal.marks = state.last_owner, state.marks
        for retained in state.retained:
            self._retained(retained)
        for session in state.sessions:
            self._session(session)
        for number, name in state.groups:
            self.groups[number] = self._groups_by_name[name] = group = ShareGroup(name)
            group.number = number
        for subscription in state.subscriptions:
            self._subscription(subscription)
        for number, value in state.received:
            if (session_found := self.sessions.get(number)) is not None:
                packet_id = abs(value)
                session_found.received.add(packet_id)
                session_found.received_kept[packet_id] = value
                if value < 0:
                    session_found.gates[packet_id] = None
        for delivery in state.deliveries:
            self._delivery(delivery)
        journal.drop_contents(state.contents)
        self._finish()

    def _retained(self, row: RetainedRow) -> None:
        message = self._message(row[1], 5, row[3], row[2])
        if message is None:
            return
        broker = self.broker
        expires_at = message.expires_at
        if expires_at is not None and expires_at <= self.now + broker.wall_offset:
            broker.keeper.retained_gone(row[0])
        elif not broker.retained.set(message):
            self.beyond_limits += 1
            broker.keeper.left_out.add(row[0])
        broker.metrics.retained_messages = len(broker.retained)

    def _message(self, frame: bytes, version: int, published_at: float, client_id: str = "") -> Message | None:
        """Decode a PUBLISH; one frame is often that of many deliveries."""
        if frame is self._last[0]:
            return self._last[2]
        message: Message | None = None
        try:
            header = read_header(frame, 0)
            if header is not None and header[1] == len(frame) and frame[0] >> 4 == 3:
                packet = decode_publish(frame[0] & 15, frame, header[0], header[1], VERSIONS[version])
                now = self.now + self.broker.wall_offset
                message = Message.of(packet, client_id, min(published_at, now))  # nothing is younger than now
        except (RemoteProtocolError, KeyError, IndexError):
            pass
        self.unreadable += message is None
        self._last = (frame, version, message)
        return message

    def _session(self, row: SessionRow) -> None:
        broker, offset = self.broker, self.broker.wall_offset
        number, client_id, user_name, expiry_interval, ended_at, will, will_at = row
        session = self.sessions[number] = Session(client_id)
        session.number, session.user_name, session.expiry_interval = number, user_name, expiry_interval
        session.ended_at = self.now if ended_at is None else min(ended_at - offset, self.now)
        session.deadline = None if expiry_interval == NEVER else session.ended_at + expiry_interval
        if will is not None:
            self._will(session, will)
            if session.will is not None:
                delay = min(session.will.will_delay_interval, expiry_interval)
                latest = self.now + delay  # the clock on the wall may have been set back
                session.will_at = latest if will_at is None else min(will_at - offset, latest)
        broker.connections.sessions[client_id] = session
        broker.keeper.sessions[number] = session
        broker.metrics.sessions += 1
        if ended_at is None:
            broker.keeper.changed(session)

    def _will(self, session: Session, will: bytes) -> None:
        message = self._message(will[4:], 5, 0.0)
        if message is not None:
            session.will = Will(
                topic_name=message.topic_name,
                payload=message.payload,
                qos=QoS(message.qos),
                retain=message.retain,
                will_delay_interval=int.from_bytes(will[:4]),
                properties=message.properties,
            )

    def _subscription(self, row: SubscriptionRow) -> None:
        number, topic_filter, byte, identifier = row
        session = self.sessions.get(number)
        if session is None:
            return
        broker = self.broker
        options = SubscriptionOptions(
            topic_filter, QoS(byte & 3), byte & 4 != 0, byte & 8 != 0, byte >> 4 & 3, identifier
        )
        session.subscriptions[topic_filter] = options
        broker.metrics.subscriptions += 1
        if split_shared(topic_filter)[0] is None:
            broker.router.subscribe(topic_filter, session, options)
            return
        if topic_filter not in broker.shares.groups and (group := self._groups_by_name.get(topic_filter)) is not None:
            broker.shares.restore(group, options)
        broker.shares.join(session, options)

    def _delivery(self, row: DeliveryRow) -> None:
        number, owner, packet_id, flags, identifiers, version, published_at, content, frame = row
        journal = self.broker.journal
        session, group = self.sessions.get(owner), self.groups.get(owner)
        if frame is None:
            frame = self.state.contents.get(content)
            journal.restore_content(number, content)
        message = self._message(frame, version, published_at) if frame is not None else None
        if message is None or (session is None and group is None):
            journal.done(number)
            return
        delivery = Delivery(message, flags & 3, flags & RETAIN != 0, _identifiers(identifiers), group, number)
        if packet_id and session is not None:
            session.inflight[packet_id] = Released(number) if flags & RELEASED else delivery
            session.last_number = number  # what leaves the queue behind it may have a lower one
            return
        owner_found = session or group
        assert owner_found is not None
        owner_found.own_queue().put_last(delivery)
        self.broker.metrics.messages_queued += 1

    def _finish(self) -> None:
        """End groups without members, and have the timer look at sessions and Wills."""
        broker, connections = self.broker, self.broker.connections
        for session in self.sessions.values():
            for deadline in (session.will_at, session.deadline):
                if deadline is not None:
                    connections.schedule(deadline, session)
        for group in self.groups.values():
            if not group.members:
                broker.keeper.groups[group.number] = group
                broker.keeper.group_ended(group)
                broker.metrics.messages_queued -= group.queue.drop_all()
        broker.metrics.retained_refused += self.beyond_limits
        if self.beyond_limits:
            logger.warning(
                "%d retained messages are left in the store: RetainedMessages or RetainedBytes of [Limits] is reached",
                self.beyond_limits,
            )
        if self.unreadable:
            logger.warning("%d messages in the store cannot be read and are left out", self.unreadable)


def _identifiers(block: bytes | None) -> tuple[int, ...]:
    """Read Subscription Identifiers, four bytes each."""
    if block is None:
        return ()
    return tuple(int.from_bytes(block[at : at + 4]) for at in range(0, len(block), 4))
