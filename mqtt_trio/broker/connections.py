"""Sessions and their connections: CONNECT, take-over, Wills, the end of connections and of sessions."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

from mqtt_trio.broker.access import Credentials, Denied
from mqtt_trio.broker.events import (
    ClientConnected,
    ClientDisconnected,
    ClientRefused,
    SessionExpired,
    SessionTakenOver,
    WillPublished,
)
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.outbox import ClientLink
from mqtt_trio.broker.session import NEVER, Session
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import ConnAck, Connect, Disconnect, Packet

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker

KEEP_ALIVE_FACTOR = 1.5
"""A client may be silent for one and a half times its Keep Alive [MQTT5-3.1.2-22], [MQTT3-3.1.2-24]."""


class Connections:
    """The table of sessions, and the deadlines that outlive a connection."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.sessions: dict[str, Session] = {}
        self._deadlines: list[tuple[float, int, Session]] = []
        self._number = 0
        self.make_lane: type[FastLane] = FastLane
        """What handles bytes first; tests put one that takes nothing."""
        self.deadline_added: Callable[[], None] = lambda: None
        """Called with each new deadline, for whoever sleeps until the next one."""

    # CONNECT

    def connect(self, link: ClientLink, packet: Connect, now: float) -> None:
        """Handle the CONNECT of a new connection up to its CONNACK."""
        broker = self.broker
        v5 = packet.protocol_version == ProtocolVersion.MQTT_5_0
        client_id = packet.client_id
        if not client_id:
            if not v5 and not packet.clean_start:  # [MQTT3-3.1.3-8]
                self._refuse(
                    link, packet, ReasonCode.CLIENT_IDENTIFIER_NOT_VALID, "an empty id needs Clean Session", now
                )
                return
            client_id = broker.random_id()  # [MQTT5-3.1.3-6], [MQTT3-3.1.3-6]
        if packet.authentication_method is not None:
            self._refuse(link, packet, ReasonCode.BAD_AUTHENTICATION_METHOD, "no Authentication Method is known", now)
            return
        decision = broker.authenticator.authenticate(
            Credentials(client_id, packet.user_name, packet.password, link.peer, link.listener)
        )
        if isinstance(decision, Denied):
            self._refuse(link, packet, decision.reason_code, decision.reason, now)
            return
        principal = decision.principal
        if packet.will is not None and not broker.authorizer.may_publish(principal, packet.will.topic_name):
            self._refuse(link, packet, ReasonCode.NOT_AUTHORIZED, "the Will Topic is not allowed", now)
            return
        old = self.sessions.get(client_id)
        if old is None and len(self.sessions) >= broker.limits.sessions:
            self._refuse(link, packet, ReasonCode.QUOTA_EXCEEDED, "[Limits] Sessions is reached", now)
            return
        if old is not None:
            self._detach_old(old, link, packet, now)
        session = self.sessions.get(client_id)  # gone when the old one did not outlive its connection
        present = session is not None
        if session is None:
            session = self.sessions[client_id] = Session(client_id)
            broker.metrics.sessions += 1
        session.user_name = principal.user_name
        self._attach(link, session, packet, now)
        self._accept(link, session, packet, present, now)
        if present:
            broker.sender.resend(session, now)

    def _detach_old(self, old: Session, link: ClientLink, packet: Connect, now: float) -> None:
        """Take over from another connection, then end the session if the new one starts clean."""
        broker = self.broker
        if (old_link := old.link) is not None:
            old_link.end(ReasonCode.SESSION_TAKEN_OVER, "another connection has the same Client Identifier")
            broker.metrics.sessions_taken_over += 1
            broker.emit(
                SessionTakenOver(
                    at=now + broker.wall_offset, client_id=old.client_id, old_peer=old_link.peer, new_peer=link.peer
                )
            )
            self.lost(old_link, now)
        if packet.clean_start:  # [MQTT5-3.1.2-4]
            if self.sessions.get(old.client_id) is old:
                self._end_session(old, now)
        else:
            old.will = old.will_at = None  # the session goes on before the Will was due [MQTT5-3.1.3-9]

    def _attach(self, link: ClientLink, session: Session, packet: Connect, now: float) -> None:
        """Join a session and a link in one step."""
        limits = self.broker.limits
        v5 = packet.protocol_version == ProtocolVersion.MQTT_5_0
        outbox = link.outbox
        outbox.session = session
        outbox.protocol_version = int(packet.protocol_version)
        if packet.maximum_packet_size is not None:
            outbox.maximum_packet_size = packet.maximum_packet_size
        session.forget_routes()
        session.link, session.outbox = link, outbox
        session.deadline = session.will_at = None
        session.acks.clear()
        session.send_maximum = min(limits.inflight_messages, packet.receive_maximum or 65_535)  # [MQTT5-3.3.4-9]
        if v5:
            session.expiry_interval = min(packet.session_expiry_interval or 0, limits.session_expiry_interval)
        else:
            session.expiry_interval = 0 if packet.clean_start else limits.session_expiry_interval
        session.will = packet.will
        if packet.clean_start:
            session.received.clear()
        link.session = session

    def _accept(self, link: ClientLink, session: Session, packet: Connect, present: bool, now: float) -> None:
        """Send the successful CONNACK and set what it promises."""
        broker, limits = self.broker, self.broker.limits
        keep_alive = packet.keep_alive
        connack = ConnAck(session_present=present)
        if packet.protocol_version == ProtocolVersion.MQTT_5_0:
            if limits.keep_alive and (keep_alive == 0 or keep_alive > limits.keep_alive):
                keep_alive = connack.server_keep_alive = limits.keep_alive  # [MQTT5-3.1.2-21]
            if not packet.client_id:
                connack.assigned_client_identifier = session.client_id  # [MQTT5-3.2.2-16]
            if session.expiry_interval != (packet.session_expiry_interval or 0):
                connack.session_expiry_interval = session.expiry_interval
            if limits.receive_maximum < 65_535:
                connack.receive_maximum = limits.receive_maximum
            connack.maximum_packet_size = limits.maximum_packet_size
            connack.shared_subscription_available = 0
            if link.connection.topic_alias_maximum:
                connack.topic_alias_maximum = link.connection.topic_alias_maximum
        link.silence_limit = KEEP_ALIVE_FACTOR * keep_alive if keep_alive else None
        link.deadline_changed()
        broker.metrics.clients_connected += 1
        broker.emit(
            ClientConnected(
                at=now + broker.wall_offset,
                client_id=session.client_id,
                peer=link.peer,
                listener=link.listener,
                protocol_version=packet.protocol_version,
                user_name=session.user_name,
                clean_start=packet.clean_start,
                session_present=present,
                keep_alive=keep_alive,
            )
        )
        broker.reply(link, connack)  # behind the rest: a client that does not take it is lost by that
        if session.link is link:
            link.lane = self.make_lane(broker, session, link.outbox)

    def _refuse(self, link: ClientLink, packet: Connect, code: ReasonCode, reason: str, now: float) -> None:
        """Answer a CONNECT with a refusal and close [MQTT5-3.2.2-7]."""
        broker = self.broker
        broker.metrics.connections_refused += 1
        broker.emit(
            ClientRefused(
                at=now + broker.wall_offset,
                client_id=packet.client_id,
                peer=link.peer,
                listener=link.listener,
                reason_code=code,
                reason=reason,
            )
        )
        broker.reply(link, ConnAck(reason_code=code))
        link.end(None, reason)

    # The end of a connection

    def disconnect(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        """The client says goodbye: no Will unless it asks for it [MQTT5-3.1.2-10]."""
        assert isinstance(packet, Disconnect)
        if packet.session_expiry_interval is not None:
            if session.expiry_interval == 0 and packet.session_expiry_interval:  # [MQTT5-3.14.2-2]
                link.end(ReasonCode.PROTOCOL_ERROR, "Session Expiry Interval was 0 in CONNECT")
                return True
            limit = self.broker.limits.session_expiry_interval
            session.expiry_interval = min(packet.session_expiry_interval, limit)
        if packet.reason_code == ReasonCode.NORMAL_DISCONNECTION:  # any other one publishes it [MQTT5-3.1.2-10]
            session.will = None
        self.lost(link, now, by_client=True)
        link.end(None, "DISCONNECT by the client")
        return True

    def lost(self, link: ClientLink, now: float, *, by_client: bool = False) -> None:
        """Part a session from its link: Will, expiry. Nothing happens when the link is not the session's own."""
        session = link.session
        if session is None or session.link is not link:
            return
        broker = self.broker
        session.link = session.outbox = link.outbox.session = None
        link.lane = None
        session.acks.clear()
        session.forget_routes()
        broker.metrics.clients_connected -= 1
        broker.emit(
            ClientDisconnected(
                at=now + broker.wall_offset,
                client_id=session.client_id,
                peer=link.peer,
                listener=link.listener,
                reason_code=link.end_reason,
                reason=link.end_text,
                by_client=by_client,
            )
        )
        expiry = session.expiry_interval
        session.deadline = None if expiry == NEVER else now + expiry
        if session.will is not None:
            session.will_at = now + min(session.will.will_delay_interval, expiry)  # [MQTT5-3.1.3-9]
            if session.will_at <= now:
                self._publish_will(session, now)
            else:
                self._schedule(session.will_at, session)
        if expiry == 0:
            self._end_session(session, now)
        elif session.deadline is not None:
            self._schedule(session.deadline, session)

    def _publish_will(self, session: Session, now: float) -> None:
        """Publish the Will Message once [MQTT5-3.1.2-8]."""
        will, session.will, session.will_at = session.will, None, None
        if will is None:
            return
        broker = self.broker
        message = Message(
            will.topic_name,
            will.payload,
            int(will.qos),
            will.retain,
            will.properties,
            session.client_id,
            now + broker.wall_offset,
        )
        broker.metrics.wills_published += 1
        broker.emit(WillPublished(at=now + broker.wall_offset, client_id=session.client_id, topic_name=will.topic_name))
        if message.retain:
            broker.inbound.retain(message)  # [MQTT5-3.1.2-15]
        broker.publish(message, now, tapped=True)

    def _end_session(self, session: Session, now: float) -> None:
        """Remove a session with all that belongs to it; a Will that still waits is due [MQTT5-3.1.2-8]."""
        broker = self.broker
        if session.will is not None:
            self._publish_will(session, now)
        session.deadline = None
        self.sessions.pop(session.client_id, None)
        broker.router.unsubscribe_all(session.subscriptions, session)
        session.forget_routes()
        metrics = broker.metrics
        metrics.subscriptions -= len(session.subscriptions)
        metrics.messages_queued -= len(session.queue)
        metrics.dropped_session_ended += len(session.queue)
        metrics.sessions -= 1
        session.forget_messages()

    # Deadlines

    def _schedule(self, deadline: float, session: Session) -> None:
        if len(self._deadlines) > 4 * len(self.sessions) + 64:
            # Clients that come and go leave an entry each time, which would stay until its expiry comes up.
            self._deadlines = [entry for entry in self._deadlines if entry[0] in (entry[2].will_at, entry[2].deadline)]
            heapq.heapify(self._deadlines)
        self._number += 1
        heapq.heappush(self._deadlines, (deadline, self._number, session))
        self.deadline_added()

    def next_deadline(self) -> float | None:
        """Instant of the earliest Will or expiry that is still due, or None."""
        while self._deadlines:
            deadline, _, session = self._deadlines[0]
            if deadline in (session.will_at, session.deadline):
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def run_deadlines(self, now: float) -> None:
        """Do what is due at `now`."""
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            session = heapq.heappop(self._deadlines)[2]
            if session.will_at is not None and session.will_at <= now:
                self._publish_will(session, now)
            if session.deadline is not None and session.deadline <= now:
                self.broker.metrics.sessions_expired += 1
                self.broker.emit(
                    SessionExpired(
                        at=now + self.broker.wall_offset,
                        client_id=session.client_id,
                        queued_messages=len(session.queue),
                    )
                )
                self._end_session(session, now)
