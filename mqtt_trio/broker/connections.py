"""Sessions and their connections: take-over, the end of connections and of sessions, deadlines."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from mqtt_trio.broker.aliases import OutboundAliases
from mqtt_trio.broker.events import ClientDisconnected, SessionExpired, SessionTakenOver
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.outbox import ClientLink
from mqtt_trio.broker.session import NEVER, Session
from mqtt_trio.broker.wills import publish_will, will_due_at
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import Connect, Disconnect, Packet

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker


@attrs.frozen
class Newcomer:
    """A client that has connected to some node of a cluster."""

    client_id: str
    user_name: str | None
    clean_start: bool
    connected_at: float
    """UTC seconds since the epoch, by the clock of its node."""


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
        self.watchers: list[Callable[[Newcomer], None]] = []
        """Told of each client that has connected with a Client Identifier of its own."""

    # The beginning of a connection

    def open(self, link: ClientLink, packet: Connect, client_id: str, now: float) -> tuple[Session, bool]:
        """Join an authenticated connection and its session, taken over, resumed or new; return the session and
        whether it was there."""
        old = self.sessions.get(client_id)
        if old is not None:
            self._detach_old(old, link, packet, now)
        session = self.sessions.get(client_id)  # gone when the old one did not outlive its connection
        present = session is not None
        if session is None:
            session = self.sessions[client_id] = Session(client_id)
            self.broker.metrics.sessions += 1
        self._attach(link, session, packet, now)
        return session, present

    def _detach_old(self, old: Session, link: ClientLink, packet: Connect, now: float) -> None:
        """Take over from another connection, then end the session if the new one starts clean."""
        if (old_link := old.link) is not None:
            old_link.end(ReasonCode.SESSION_TAKEN_OVER, "another connection has the same Client Identifier")
            self._taken_over(old, old_link, link.peer, now)
        if packet.clean_start:  # [MQTT5-3.1.2-4]
            if self.sessions.get(old.client_id) is old:
                self._end_session(old, now)
        else:
            old.will = old.will_at = None  # the session goes on before the Will was due [MQTT5-3.1.3-9]

    def tell_watchers(self, session: Session, packet: Connect, now: float) -> None:
        """A client is connected, and its user is known. One whose Client Identifier was made here is nowhere else."""
        if self.watchers and packet.client_id:
            at = now + self.broker.wall_offset
            newcomer = Newcomer(session.client_id, session.user_name, packet.clean_start, at)
            for tell in self.watchers:
                tell(newcomer)

    def connected_at(self, client_id: str) -> float | None:
        """UTC seconds at which a client that is connected now did so, or None."""
        session = self.sessions.get(client_id)
        return None if session is None or session.link is None else session.connected_at + self.broker.wall_offset

    def taken_elsewhere(self, newcomer: Newcomer, node: str, now: float) -> bool:
        """A client has connected to another node: here its connection is over [MQTT5-3.1.4-3], and with Clean Start its
        session as well [MQTT5-3.1.2-4]. False: nothing ended, and what is another user's never does."""
        session, broker = self.sessions.get(newcomer.client_id), self.broker
        if session is None or (broker.binds_sessions and session.user_name != newcomer.user_name):
            return False
        if (link := session.link) is not None:
            link.end(ReasonCode.SESSION_TAKEN_OVER, f"the client has connected to node {node}")
            self._taken_over(session, link, f"node {node}", now)
        if newcomer.clean_start:
            if self.sessions.get(session.client_id) is session:
                self._end_session(session, now)
        else:
            session.will = session.will_at = None  # its client is back before the Will was due [MQTT5-3.1.3-9]
            if session.number and self.sessions.get(session.client_id) is session:
                broker.keeper.changed(session)
        return link is not None or newcomer.clean_start

    def _taken_over(self, session: Session, old_link: ClientLink, new_peer: str, now: float) -> None:
        broker = self.broker
        broker.metrics.sessions_taken_over += 1
        broker.emit(
            SessionTakenOver(
                at=now + broker.wall_offset, client_id=session.client_id, old_peer=old_link.peer, new_peer=new_peer
            )
        )
        self.lost(old_link, now)

    def _attach(self, link: ClientLink, session: Session, packet: Connect, now: float) -> None:
        """Join a session and a link in one step."""
        limits = self.broker.limits
        v5 = packet.protocol_version == ProtocolVersion.MQTT_5_0
        outbox = link.outbox
        outbox.session = session
        outbox.protocol_version = int(packet.protocol_version)
        if packet.maximum_packet_size is not None:
            outbox.maximum_packet_size = packet.maximum_packet_size
        if aliases := min(packet.topic_alias_maximum or 0, limits.topic_alias_maximum):  # [MQTT5-3.1.2-27]
            outbox.aliases = OutboundAliases(aliases)
        session.forget_routes()
        session.link, session.outbox = link, outbox
        session.connected_at = now
        session.deadline = session.will_at = None
        session.acks.clear()
        session.carried = set(session.received) if session.received else None
        session.send_maximum = min(limits.inflight_messages, packet.receive_maximum or 65_535)  # [MQTT5-3.3.4-9]
        if v5:
            session.expiry_interval = min(packet.session_expiry_interval or 0, limits.session_expiry_interval)
        else:
            session.expiry_interval = 0 if packet.clean_start else limits.session_expiry_interval
        session.will = packet.will
        link.session = session

    # The end of a connection

    def disconnect(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        """The client says goodbye: no Will unless it asks for it [MQTT5-3.1.2-10]."""
        assert isinstance(packet, Disconnect)
        if packet.session_expiry_interval is not None:
            limit = self.broker.limits.session_expiry_interval
            session.expiry_interval = min(packet.session_expiry_interval, limit)
        if packet.reason_code == ReasonCode.NORMAL_DISCONNECTION:  # any other one publishes it [MQTT5-3.14.4-3]
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
        if session.acks:
            broker.keeper.withdrawal.abandoned(session, link.outbox)
            session.acks.clear()
        session.link = session.outbox = link.outbox.session = None
        link.lane = None
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
        self._wait_for_return(session, now)

    def _wait_for_return(self, session: Session, now: float) -> None:
        """A session has no connection any more: publish its Will or set its time, end it or set its end."""
        broker, expiry = self.broker, session.expiry_interval
        if session.shares and expiry:
            broker.shares.left(session, now)
        session.ended_at = now
        session.deadline = None if expiry == NEVER else now + expiry
        session.will_at = will_due_at(session, now)
        if session.will_at is not None:
            if session.will_at <= now:
                publish_will(self.broker, session, now)
            else:
                self.schedule(session.will_at, session)
        if expiry == 0:
            self._end_session(session, now)
        else:
            if session.deadline is not None:
                self.schedule(session.deadline, session)
            if session.number:
                broker.keeper.changed(session)

    def _end_session(self, session: Session, now: float) -> None:
        """Remove a session with all that belongs to it; a Will that still waits is due [MQTT5-3.1.2-8]."""
        broker = self.broker
        if session.will is not None:
            publish_will(self.broker, session, now)
        session.deadline = None
        self.sessions.pop(session.client_id, None)
        if session.shares:
            broker.shares.ended(session, now)
        if session.number:
            broker.keeper.ended(session)
        broker.router.unsubscribe_all(session.subscriptions, session)
        session.forget_routes()
        metrics = broker.metrics
        metrics.subscriptions -= len(session.subscriptions)
        metrics.messages_queued -= len(session.queue)
        metrics.dropped_session_ended += len(session.queue)
        metrics.sessions -= 1
        session.forget_messages()

    # Deadlines

    def schedule(self, deadline: float, session: Session) -> None:
        """Have `run_deadlines` look at a session at `deadline`."""
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
                publish_will(self.broker, session, now)
                if session.number:
                    self.broker.keeper.changed(session)
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
