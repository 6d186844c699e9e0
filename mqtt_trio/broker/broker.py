"""The broker: what each packet of a connected client does. Synchronous from the packet to the end of the fan-out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

from mqtt_trio.broker.access import (
    AllowAnyone,
    AllowEverything,
    AuthenticationMethod,
    Authenticator,
    Authorizer,
    MethodsOnly,
    Principal,
)
from mqtt_trio.broker.audience import Audience, make_audience, merge_members
from mqtt_trio.broker.bursts import Bursts
from mqtt_trio.broker.connect import Handshakes
from mqtt_trio.broker.connections import Connections
from mqtt_trio.broker.delivery import Sender
from mqtt_trio.broker.events import Event, EventSink
from mqtt_trio.broker.inbound import Inbound
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.keeper import Keeper
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.metrics import Metrics
from mqtt_trio.broker.outbox import ClientLink, Outbox
from mqtt_trio.broker.reasons import NO_SUCH_IDENTIFIER
from mqtt_trio.broker.retained import RetainedMessages
from mqtt_trio.broker.router import Router, SubscriptionOptions
from mqtt_trio.broker.session import Session, qos_of
from mqtt_trio.broker.shares import ShareGroup, Shares
from mqtt_trio.broker.subscriptions import Subscriptions
from mqtt_trio.broker.tap import FrameRun, Hold, Refused, Tap, TapRoute, rank_of
from mqtt_trio.errors import LocalProtocolError
from mqtt_trio.protocol.codes import PacketType, ReasonCode
from mqtt_trio.protocol.packets import (
    Auth,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Unsubscribe,
)
from mqtt_trio.protocol.topics import is_system_topic
from mqtt_trio.protocol.wire import MAXIMUM_POSSIBLE_PACKET_SIZE

PacketHandler: TypeAlias = Callable[[ClientLink, Session, Packet, float], bool]
"""Handles one packet of a connected client at `now`; False: it was left alone, and the link is paused."""
AUDIENCES: Final = 100_000
"""Distinct audiences that are remembered, so that topics which reach the same clients share one."""


class Broker:
    """One node's sessions, subscriptions and retained messages.

    Sans-I/O: `now` is monotonic seconds, `wall_offset` makes UTC of it, `random_id` gives Client Identifiers for
    clients without one. `response_information` makes the Response Information of CONNACK for clients that ask for it,
    such as a prefix for Response Topics [MQTT5-4.10]; without it nobody gets any. Without `authenticator`, everybody
    may connect, or with `authentication_methods` nobody in another way.

    Links call `handle` and `connection_lost`, a timer calls `run_deadlines` at `next_deadline`; whoever called
    flushes behind it.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        random_id: Callable[[], str],
        wall_offset: float = 0.0,
        metrics: Metrics | None = None,
        events: EventSink | None = None,
        authenticator: Authenticator | None = None,
        authorizer: Authorizer | None = None,
        authentication_methods: Sequence[AuthenticationMethod] = (),
        response_information: Callable[[Principal], str | None] | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.limits = limits
        self.random_id = random_id
        self.wall_offset = wall_offset
        self.metrics = metrics or Metrics()
        self.authenticator = authenticator or (MethodsOnly() if authentication_methods else AllowAnyone())
        self.binds_sessions = authenticator is not None or bool(authentication_methods)
        """Whether user names are more than claims: then nobody gets another user's session by its Client Identifier."""
        self.authorizer = authorizer or AllowEverything()
        self.response_information = response_information
        self._sinks = [events] if events is not None else []
        self.journal = journal or Journal(keeps=False)
        """What the store is told."""
        self.router: Router[Session | ShareGroup] = Router()
        self.retained = RetainedMessages(limits.retained_messages, limits.retained_bytes)
        self.taps: list[Tap] = []
        self.touched: list[Outbox] = []
        self.stopped: set[int] = set()
        """Whoever stopped QoS 1 and 2 publishers, by id()."""
        self.inside: list[Callable[[], None]] = []
        """Publishers inside the process: called whenever they may have room again, or the store has taken a batch."""
        self._stalled: dict[ClientLink, None] = {}
        self._deferred: dict[Session, None] = {}
        self._audiences: dict[tuple[object, ...], Audience] = {}
        self.property_blocks: set[bytes] = set()
        """Property blocks that fast lanes found forwardable."""
        self.sender = Sender(limits, self.metrics, wall_offset, self.emit, self.journal)
        if type(self.authorizer) is not AllowEverything:
            self.sender.may_receive = self.may_receive
        self.keeper = Keeper(self)
        self.retained.expired = self.keeper.retained_gone
        self.shares = Shares(self)
        self.sender.pull = self.shares.pull
        self.sender.share = self.shares.deliver
        self.bursts = Bursts(self)
        self.sender.bursts = self.bursts
        self.inbound = Inbound(self)
        self.subscriptions = Subscriptions(self)
        self.connections = Connections(self)
        self.handshakes = Handshakes(self, authentication_methods)
        self._handlers = self._packet_handlers()

    # What drivers call

    def handle(self, link: ClientLink, packet: Packet, now: float) -> bool:
        """Handle one packet. False: it was left alone and the link is paused; hand the same packet in after resume."""
        if (session := link.session) is not None:
            handled = self._handlers[type(packet)](link, session, packet, now)
            self.metrics.packets_received += handled
            return handled
        handled = self.handshakes.handle(link, packet, now)
        self.metrics.packets_received += handled
        return handled

    def connection_lost(self, link: ClientLink, now: float) -> None:
        """The network connection is gone; acts only while it is the session's own."""
        self._stalled.pop(link, None)
        self.handshakes.forget(link)
        self.connections.lost(link, now)

    def next_deadline(self) -> float | None:
        """Monotonic instant at which `run_deadlines` has work, or None."""
        return -math.inf if self._deferred else self.connections.next_deadline()

    def run_deadlines(self, now: float) -> None:
        """Go on with deferred sessions, publish Wills that are due, end sessions that have expired."""
        self.run_deferred(now)
        self.connections.run_deadlines(now)

    def run_deferred(self, now: float) -> bool:
        """Go on with each deferred session once; False when there was none."""
        deferred, self._deferred = self._deferred, {}
        for session in deferred:
            self.sender.pump(session, now)
        return bool(deferred)

    def flush(self) -> None:
        """Have every touched outbox sent; a flush that fails ends its own link only."""
        touched = self.touched
        while touched:
            batch = touched[:]
            touched.clear()
            for outbox in batch:
                outbox.flush()
        journal = self.journal
        if journal.dirty:
            if journal.size > journal.limit and journal.failing is None:  # while it fails they are refused instead
                self.stop_publishers(journal)
            journal.changed()

    def outbox(self) -> Outbox:
        """Make the outbox of a new link."""
        return Outbox(self.touched, self.limits.outbox_bytes)

    def has_room(self, outbox: Outbox, now: float) -> None:
        """A starved outbox was sent: go on with its session's queue."""
        session = outbox.session
        if session is None:
            return
        if session.bursts:
            self.defer(session)  # others first: it may take all day
        else:
            self.sender.pump(session, now)

    def defer(self, session: Session) -> None:
        """Go on with what waits for a session once everybody else had their turn: `run_deadlines` does."""
        if not self._deferred:
            self.connections.deadline_added()
        self._deferred[session] = None

    # What taps and gateways call

    def add_tap(self, tap: Tap) -> None:
        """Show every accepted publish to `tap` from now on, as its rank says behind others or before them."""
        self.taps.append(tap)
        self.taps.sort(key=rank_of)
        self.rights_changed()

    def stop_publishers(self, owner: object) -> None:
        """No QoS 1 or 2 PUBLISH is handled until `owner` lets go. Idempotent."""
        self.stopped.add(id(owner))

    def resume_publishers(self, owner: object) -> None:
        """Undo `stop_publishers` of `owner`; paused links go on in their order."""
        self.stopped.discard(id(owner))
        if not self.stopped:
            stalled, self._stalled = self._stalled, {}
            for link in stalled:
                link.resume(self)
        self.call_inside()

    def call_inside(self) -> None:
        """Have the publishers inside the process look whether they may go on, and what the store has."""
        for look in self.inside:
            look()

    def stall(self, link: ClientLink) -> None:
        """Pause a publisher until there is room for its QoS 1 and 2 messages again."""
        if link not in self._stalled:
            self._stalled[link] = None
            self.metrics.publishers_paused += 1
            link.pause(self)

    def unstall(self, link: ClientLink) -> None:
        """Its acknowledgements are out: let one publisher go on, unless all must wait."""
        if not self.stopped and link in self._stalled:
            del self._stalled[link]
            link.resume(self)

    def rights_changed(self) -> None:
        """Access rules or taps changed: every route is looked up anew."""
        self.router.generation += 1
        self._forget_audiences()

    def watch_events(self, sink: EventSink) -> None:
        """Hand events to `sink` as well from now on."""
        self._sinks.append(sink)

    def emit(self, event: Event) -> None:
        """Hand a rare fact to whoever listens."""
        for sink in self._sinks:
            sink(event)

    # Routes

    def audience(self, topic_name: str, publisher: str, *, tapped: bool = True) -> Audience:
        """Whom a message of `publisher` to `topic_name` reaches."""
        groups: list[ShareGroup] = []
        matches: list[tuple[Session, SubscriptionOptions]] = []
        for subscriber, options in self.router.match(topic_name):
            if isinstance(subscriber, ShareGroup):
                groups.append(subscriber)
            else:
                matches.append((subscriber, options))
        members = merge_members(matches, publisher)
        may_receive = self.authorizer.may_receive
        members = [m for m in members if may_receive(self.principal(m.session), topic_name)]
        members.sort(key=lambda member: member.session.client_id)
        groups.sort(key=lambda group: group.name)
        taps: tuple[TapRoute, ...] = ()
        if tapped and self.taps:
            taps = tuple(route for tap in self.taps if (route := tap.route(topic_name)) is not None)
        key = (
            *((id(m.session), m.qos, m.retain_as_published, m.subscription_identifiers) for m in members),
            None,
            *map(id, groups),
            None,
            *map(id, taps),
        )
        audience = self._audiences.get(key)
        if audience is None:
            if len(self._audiences) >= AUDIENCES:
                self._forget_audiences()
            audience = make_audience(members, tuple(groups), taps, self.limits.maximum_packet_size)
            audience.on_invalid = lambda _: self._audiences.pop(key, None)
            self._audiences[key] = audience
        return audience

    def _forget_audiences(self) -> None:
        for audience in list(self._audiences.values()):
            audience.invalidate()

    def may_receive(self, session: Session, topic_name: str) -> bool:
        """Whether messages of a topic may reach a session."""
        return self.authorizer.may_receive(self.principal(session), topic_name)

    @staticmethod
    def principal(session: Session) -> Principal:
        """Whom access rules are about."""
        return Principal(session.client_id, session.user_name)

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        """Whether a client may publish there. `$SYS` is the server's own, as in mosquitto."""
        return not is_system_topic(topic_name) and self.authorizer.may_publish(principal, topic_name)

    # What the fast lane calls

    def show_run(self, taps: Iterable[TapRoute], run: FrameRun) -> list[Hold | Refused] | None:
        """Show a QoS 1 or 2 run to the taps, up to one that refuses; what they want, or None when it may be
        acknowledged at once."""
        answers: list[Hold | Refused] | None = None
        for tap in taps:
            answer = tap.take_run(run)
            if answer is not None:
                answers = answers or []
                answers.append(answer)
                if isinstance(answer, Refused):
                    break
        return answers

    def refused(self, session: Session, qos: int, packet_id: int, answers: Sequence[Hold | Refused]) -> bool:
        """Answer a publish that a tap refused; False when none did."""
        return self.inbound.refused(session, qos, packet_id, answers)

    def acknowledge_later(
        self,
        session: Session,
        qos: int,
        packet_id: int,
        answers: Sequence[Hold | Refused],
        kept: tuple[int, int] | None,
    ) -> None:
        """Queue the acknowledgement of a publish until every Hold is released and the store has what it must keep."""
        self.inbound.acknowledge(session, qos, packet_id, answers, kept)

    # Packets of a connected client

    def _packet_handlers(self) -> dict[type[Packet], PacketHandler]:
        """Return who handles which packet. A second CONNECT does not get here, nor what only servers send: the
        client's `connection` calls them errors."""
        return {
            Publish: self.inbound.publish,
            PubAck: self._puback,
            PubRec: self._pubrec,
            PubRel: self.inbound.pubrel,
            PubComp: self._pubcomp,
            Subscribe: self.subscriptions.subscribe,
            Unsubscribe: self.subscriptions.unsubscribe,
            PingReq: self._pingreq,
            Disconnect: self.connections.disconnect,
            Auth: self.handshakes.auth,
        }

    def reply(self, link: ClientLink, packet: Packet) -> None:
        """Put a control packet into the client's outbox; one that the client does not take ends it."""
        if (frame := self.encoded(link, packet)) is not None:
            self.metrics.packets_sent += 1
            link.outbox.put(frame)

    @staticmethod
    def encoded(link: ClientLink, packet: Packet) -> bytes | None:
        """Encode a control packet, or end the client that does not take it. PUBACK to PUBCOMP, whose texts may be left
        out, need not ask: none is as large as the CONNACK that the client took."""
        try:
            return link.connection.encode(packet)
        except LocalProtocolError as exc:
            if link.connection.peer_maximum_packet_size >= MAXIMUM_POSSIBLE_PACKET_SIZE:
                raise  # it asked for no maximum: our bug
            link.end(ReasonCode.PACKET_TOO_LARGE, str(exc))  # [MQTT5-3.1.2-24]
            return None

    def _puback(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        assert isinstance(packet, PubAck)
        self.sender.acknowledged(session, packet.packet_id, PacketType.PUBACK, now)
        return True

    def _pubrec(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        assert isinstance(packet, PubRec)
        entry = session.inflight.get(packet.packet_id)
        if entry is None or qos_of(entry) != 2:
            self.reply(link, PubRel(packet.packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND, NO_SUCH_IDENTIFIER))
        elif packet.reason_code >= 0x80:  # [MQTT5-4.3.3-4]: the message is at its end
            self.sender.finished(session, packet.packet_id, now)
        else:
            released = self.sender.release(session, packet.packet_id)
            self.sender.put_pubrel(link.outbox, packet.packet_id, released)
        return True

    def _pubcomp(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        assert isinstance(packet, PubComp)
        self.sender.acknowledged(session, packet.packet_id, PacketType.PUBCOMP, now)
        return True

    def _pingreq(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        self.reply(link, PingResp())  # [MQTT5-3.12.4-1]
        return True

    # Publishing from inside

    def publish(self, message: Message, now: float, *, tapped: bool) -> None:
        """Deliver a message that no network client published (a Will, a gateway's), whatever taps say: there is nobody
        to be told. RETAIN is the caller's business."""
        audience = self.audience(message.topic_name, message.client_id, tapped=tapped)
        spread = self.shares.spread if tapped else None
        if spread is None:
            for tap in audience.taps:
                tap.take(message)
            self.sender.deliver(message, audience, now)
            return
        state = spread.set_aside()
        try:
            for tap in audience.taps:
                tap.take(message)
            self.sender.deliver(message, audience, now)
        finally:
            spread.go_back(state)
