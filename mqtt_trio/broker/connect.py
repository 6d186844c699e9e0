"""From CONNECT to CONNACK: checks, authentication, what the CONNACK says; re-authentication behind it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from mqtt_trio.broker.access import AuthenticationMethod, Challenge, Credentials, Denied, Granted, Pending, Step
from mqtt_trio.broker.events import ClientConnected, ClientRefused
from mqtt_trio.broker.outbox import ClientLink
from mqtt_trio.broker.session import Session
from mqtt_trio.protocol.codes import CONNECT_RETURN_CODES, ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import Auth, ConnAck, Connect, Disconnect, Packet

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker

V5: Final = ProtocolVersion.MQTT_5_0
KEEP_ALIVE_FACTOR: Final = 1.5
"""A client may be silent for one and a half times its Keep Alive [MQTT5-3.1.2-22], [MQTT3-3.1.2-24]."""


@attrs.define(eq=False)
class _Exchange:
    """One authentication that did not end with the packet that began it."""

    credentials: Credentials
    connect: Connect | None
    """None: a re-authentication."""
    method: AuthenticationMethod | None
    challenge: Challenge | None = None
    """What the client has to answer."""
    pending: Pending | None = None
    """What we have to wait for; at most one of both."""


class Handshakes:
    """Handles the packets of clients that have no CONNACK yet, and AUTH of those that have."""

    def __init__(self, broker: Broker, methods: Iterable[AuthenticationMethod]) -> None:
        self.broker = broker
        self.methods = {method.name: method for method in methods}
        self._exchanges: dict[ClientLink, _Exchange] = {}

    def handle(self, link: ClientLink, packet: Packet, now: float) -> bool:
        """Handle a packet in front of the CONNACK. False: the answer has to be waited for and the link is paused;
        hand the same packet in after resume."""
        exchange = self._exchanges.get(link)
        if isinstance(packet, Connect) and exchange is None:
            exchange = self._open(link, packet, now)
            if exchange is None:
                return True
            step = self._first_step(exchange, packet)
        elif exchange is None or isinstance(packet, Disconnect):
            link.end(None, "DISCONNECT by the client before its CONNACK")
            return True
        else:
            step = self._next_step(exchange, packet)
        if isinstance(step, Pending):
            if not step.decided:
                exchange.pending = step
                self._exchanges[link] = exchange
                link.pause(step)
                step.when_decided(partial(self._decided, link, step))
                return False
            step = _decision(step)
        if isinstance(step, Challenge):
            assert exchange.method is not None, "an Authenticator has no challenge"
            exchange.challenge = step
            self._exchanges[link] = exchange
            auth = Auth(ReasonCode.CONTINUE_AUTHENTICATION, exchange.method.name, step.data)  # [MQTT5-4.12.0-2]
            self.broker.reply(link, auth)
            return True
        self._exchanges.pop(link, None)
        assert exchange.connect is not None, "re-authentication goes another way"
        if isinstance(step, Denied):
            self._refuse(link, exchange.connect, step, now)
        else:
            self._admit(link, exchange, step, now)
        return True

    def forget(self, link: ClientLink) -> None:
        """The connection is gone."""
        exchange = self._exchanges.pop(link, None)
        if exchange is not None and exchange.pending is not None:
            exchange.pending.abandon()

    # CONNECT

    def _open(self, link: ClientLink, packet: Connect, now: float) -> _Exchange | None:
        """Look at a CONNECT by itself; None when that ended in a refusal."""
        broker = self.broker
        client_id = packet.client_id
        if not client_id:
            if packet.protocol_version is ProtocolVersion.MQTT_3_1 or (
                packet.protocol_version is not V5 and not packet.clean_start  # [MQTT3-3.1.3-8]
            ):
                denied = Denied(ReasonCode.CLIENT_IDENTIFIER_NOT_VALID, "a Client Identifier is needed")
                self._refuse(link, packet, denied, now)  # [MQTT3-3.1.3-9]
                return None
            client_id = broker.random_id()  # [MQTT5-3.1.3-6], [MQTT3-3.1.3-6]
            while client_id in broker.connections.sessions:  # [MQTT5-3.2.2-16]
                client_id = broker.random_id()
        method = None
        if packet.authentication_method is not None:
            method = self.methods.get(packet.authentication_method)
            if method is None:  # [MQTT5-4.12.0-1]
                denied = Denied(ReasonCode.BAD_AUTHENTICATION_METHOD, "the Authentication Method is not known")
                self._refuse(link, packet, denied, now, told=denied.reason)
                return None
        credentials = Credentials(
            client_id, packet.user_name, packet.password, link.peer, link.listener, link.certificate_subject
        )
        return _Exchange(credentials, packet, method)

    def _first_step(self, exchange: _Exchange, packet: Connect) -> Step:
        if exchange.method is None:
            return self.broker.authenticator.authenticate(exchange.credentials)
        return exchange.method.start(exchange.credentials, packet.authentication_data)

    @staticmethod
    def _next_step(exchange: _Exchange, packet: Packet) -> Step:
        """What follows a packet that came again because its answer is there, or the client's AUTH."""
        if exchange.pending is not None:
            pending, exchange.pending = exchange.pending, None
            return pending
        challenge, exchange.challenge = exchange.challenge, None
        assert isinstance(packet, Auth)
        assert challenge is not None, "bytes behind a packet are not looked at before its answer is out"
        return challenge.answered(packet.authentication_data)

    def _decided(self, link: ClientLink, pending: Pending) -> None:
        """The answer is there: have the same packet handed in again, then what came behind it."""
        link.resume(pending)
        self.broker.flush()

    def _admit(self, link: ClientLink, exchange: _Exchange, granted: Granted, now: float) -> None:
        """Let an authenticated client have its session, unless something else is in the way."""
        broker, connections = self.broker, self.broker.connections
        packet, client_id = exchange.connect, exchange.credentials.client_id
        assert packet is not None
        principal = granted.principal
        old = connections.sessions.get(client_id)
        denied: Denied | None = None
        told: str | None = None
        if packet.will is not None and not broker.may_publish(principal, packet.will.topic_name):
            denied = Denied(ReasonCode.NOT_AUTHORIZED, told := "the Will Topic is not allowed")
        elif packet.will is not None and packet.will.topic_name.count("/") >= broker.limits.topic_levels:
            denied = Denied(ReasonCode.TOPIC_NAME_INVALID, told := "the Will Topic has too many levels")
        elif old is None and len(connections.sessions) >= broker.limits.sessions:
            denied = Denied(ReasonCode.QUOTA_EXCEEDED, "[Limits] Sessions is reached")
        elif broker.journal.overfull and _begins_kept(packet, old):
            denied = Denied(ReasonCode.QUOTA_EXCEEDED, f"no session can be kept: {broker.journal.failing}")
        elif old is not None and broker.binds_sessions and old.user_name != principal.user_name:
            denied = Denied(ReasonCode.NOT_AUTHORIZED, "the session belongs to another user")
        if denied is not None:
            self._refuse(link, packet, denied, now, told=told)
            return
        session, present = connections.open(link, packet, client_id, now)
        session.user_name = principal.user_name
        broker.keeper.attached(session)
        self._accept(link, session, packet, self._connack(link, session, packet, granted, present), now)
        if present and session.link is link:  # it took its CONNACK
            broker.sender.resend(session, now)
            if session.shares:
                broker.shares.arrived(session, now)
        connections.tell_watchers(session, packet, now)

    def _connack(self, link: ClientLink, session: Session, packet: Connect, granted: Granted, present: bool) -> ConnAck:
        """Say what was granted; what is absent is as the client asked, or without a limit."""
        limits = self.broker.limits
        connack = ConnAck(session_present=present)
        if packet.protocol_version is not V5:
            return connack
        if limits.keep_alive and (packet.keep_alive == 0 or packet.keep_alive > limits.keep_alive):
            connack.server_keep_alive = limits.keep_alive  # [MQTT5-3.1.2-21]
        if not packet.client_id:
            connack.assigned_client_identifier = session.client_id  # [MQTT5-3.2.2-16]
        if session.expiry_interval != (packet.session_expiry_interval or 0):
            connack.session_expiry_interval = session.expiry_interval
        if limits.receive_maximum < 65_535:
            connack.receive_maximum = limits.receive_maximum
        connack.maximum_packet_size = limits.maximum_packet_size
        if link.connection.topic_alias_maximum:
            connack.topic_alias_maximum = link.connection.topic_alias_maximum
        if packet.authentication_method is not None:
            connack.authentication_method = packet.authentication_method  # [MQTT5-4.12.0-5]
            connack.authentication_data = granted.data
        if packet.request_response_information and self.broker.response_information is not None:  # [MQTT5-3.1.2-28]
            connack.response_information = self.broker.response_information(granted.principal)
        return connack

    def _accept(self, link: ClientLink, session: Session, packet: Connect, connack: ConnAck, now: float) -> None:
        """Send the successful CONNACK and set what it promises."""
        broker = self.broker
        keep_alive = packet.keep_alive if connack.server_keep_alive is None else connack.server_keep_alive
        link.silence_limit = KEEP_ALIVE_FACTOR * keep_alive if keep_alive else None
        link.deadline_changed()
        broker.metrics.connections_accepted += 1
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
                session_present=connack.session_present,
                keep_alive=keep_alive,
            )
        )
        broker.reply(link, connack)  # behind the rest: a client that does not take it is lost by that
        if session.link is link:
            link.lane = broker.connections.make_lane(broker, session, link.outbox)

    def _refuse(
        self, link: ClientLink, packet: Connect, denied: Denied, now: float, *, told: str | None = None
    ) -> None:
        """Answer a CONNECT with a refusal and close [MQTT5-3.2.2-7]. `told` becomes the Reason String: what the client
        can mend, never why it is not trusted."""
        broker = self.broker
        broker.metrics.connections_refused += 1
        broker.emit(
            ClientRefused(
                at=now + broker.wall_offset,
                client_id=packet.client_id,
                peer=link.peer,
                listener=link.listener,
                reason_code=denied.reason_code,
                reason=denied.reason,
            )
        )
        if packet.protocol_version is V5 or denied.reason_code in CONNECT_RETURN_CODES:
            reference = denied.server_reference
            broker.reply(link, ConnAck(reason_code=denied.reason_code, reason_string=told, server_reference=reference))
        link.end(None, denied.reason)

    # Re-authentication

    def auth(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        """Handle AUTH of a connected client; messages go on meanwhile [MQTT5-4.12.1]. Never waits."""
        assert isinstance(packet, Auth)
        exchange = self._exchanges.get(link)
        if packet.reason_code is ReasonCode.RE_AUTHENTICATE:
            name = link.connection.authentication_method
            method = self.methods.get(name) if name is not None else None
            if exchange is not None or method is None:
                link.end(ReasonCode.PROTOCOL_ERROR, "AUTH RE_AUTHENTICATE during a re-authentication")
                return True
            credentials = Credentials(
                session.client_id, session.user_name, None, link.peer, link.listener, link.certificate_subject
            )
            exchange = self._exchanges[link] = _Exchange(credentials, None, method)
            self._go_on(link, exchange, method.start(credentials, packet.authentication_data))
        elif exchange is None or exchange.challenge is None:
            link.end(ReasonCode.PROTOCOL_ERROR, "AUTH that answers nothing")
        else:
            challenge, exchange.challenge = exchange.challenge, None
            self._go_on(link, exchange, challenge.answered(packet.authentication_data))
        return True

    def _go_on(self, link: ClientLink, exchange: _Exchange, step: Step) -> None:
        """Tell a connected client how its re-authentication stands."""
        if isinstance(step, Pending):
            if not step.decided:
                exchange.pending = step
                step.when_decided(partial(self._decided_again, link, exchange, step))
                return
            step = _decision(step)
        assert exchange.method is not None
        session = link.session
        assert session is not None
        name = exchange.method.name
        if isinstance(step, Challenge):
            exchange.challenge = step
            self.broker.reply(link, Auth(ReasonCode.CONTINUE_AUTHENTICATION, name, step.data))
            return
        del self._exchanges[link]
        if isinstance(step, Denied):  # [MQTT5-4.12.1-2]
            link.end(ReasonCode.NOT_AUTHORIZED, step.reason or "the re-authentication failed")
        elif step.principal.user_name != session.user_name:
            link.end(ReasonCode.NOT_AUTHORIZED, "the re-authentication is of another user")
        else:
            self.broker.reply(link, Auth(ReasonCode.SUCCESS, name, step.data))

    def _decided_again(self, link: ClientLink, exchange: _Exchange, pending: Pending) -> None:
        exchange.pending = None
        try:
            self._go_on(link, exchange, pending)
        except Exception as exc:  # whoever decides drives the link; the error stays this client's
            link.failed(exc)
        self.broker.flush()


def _begins_kept(packet: Connect, old: Session | None) -> bool:
    """Whether a CONNECT begins a session that outlives its connection."""
    if old is not None and old.number and not packet.clean_start:
        return False
    return bool(packet.session_expiry_interval) if packet.protocol_version is V5 else not packet.clean_start


def _decision(pending: Pending) -> Granted | Denied | Challenge:
    """The answer that is there.

    Raises:
      Exception: the one that is there instead; it ends the connection.
    """
    if pending.error is not None:
        raise pending.error
    assert pending.decision is not None
    return pending.decision
