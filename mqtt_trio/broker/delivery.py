"""Messages on their way out: to an audience, through windows and queues, again after a reconnect."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from mqtt_trio.broker.audience import Audience, Member
from mqtt_trio.broker.events import MessageDropped
from mqtt_trio.broker.journal import RELEASED as RELEASED_FLAG
from mqtt_trio.broker.journal import RETAIN, Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.metrics import Metrics
from mqtt_trio.broker.outbox import Outbox
from mqtt_trio.broker.queues import MessageQueue
from mqtt_trio.broker.session import RELEASED, Delivery, FastDelivery, Released, Session, number_of, qos_of
from mqtt_trio.broker.shares import ShareGroup
from mqtt_trio.broker.tap import FrameRun, read_run
from mqtt_trio.protocol.codes import PacketType, ProtocolVersion, QoS
from mqtt_trio.protocol.encode import EncodedPublish, encode
from mqtt_trio.protocol.packets import PubRel

if TYPE_CHECKING:
    from mqtt_trio.broker.bursts import Bursts

Drop: TypeAlias = Callable[[MessageDropped], None]
Encodings: TypeAlias = dict[tuple[int, int, bool, tuple[int, ...], tuple[int, bool]], EncodedPublish]
"""Encodings of one message by (version, QoS, RETAIN, Subscription Identifiers, (Topic Alias, whether it is known))."""


class Sender:
    """The outbound half of the broker: everything that fills outboxes with messages."""

    def __init__(self, limits: Limits, metrics: Metrics, wall_offset: float, drop: Drop, journal: Journal) -> None:
        self.limits = limits
        self.metrics = metrics
        self.wall_offset = wall_offset
        self.drop = drop
        self.journal = journal
        self.may_receive: Callable[[Session, str], bool] | None = None
        """Asked again before a message leaves a queue or is repeated, as rights may have been revoked since it was
        routed; None: everybody may receive everything."""
        self.share: Callable[[ShareGroup, Message, Encodings, float], None]
        """Send a message to one member of a share group."""
        self.gated = False
        """The store must have the message that is being delivered for somebody, and its publisher is told when it has
        not. Copies at QoS 2 leave once it has, so that nobody has one already when the publisher begins anew."""
        self.bursts: Bursts
        """What sends retained messages to new subscriptions."""
        self.pull: Callable[[Session, float], None]
        """Let a session have what waits in its share groups, as far as it can take it."""

    def deliver(self, message: Message, audience: Audience, now: float, *, gated: bool = False) -> None:
        """Send one message to every member of an audience, encoded once per kind of copy. `gated`: those at QoS 2 get
        it once the store has it."""
        self.gated = gated
        encodings: Encodings = {}
        for member in audience.members:
            retain = message.retain and member.retain_as_published  # [MQTT5-3.3.1-12], [MQTT5-3.3.1-13]
            qos = min(message.qos, member.qos)  # [MQTT5-3.8.4-8]
            self.send(member.session, Delivery(message, qos, retain, member.subscription_identifiers), encodings, now)
        for group in audience.groups:
            self.share(group, message, encodings, now)
        self.gated = False

    def deliver_singly(
        self,
        run: FrameRun,
        members: Iterable[Member],
        groups: Iterable[ShareGroup],
        now: float,
        *,
        gated: bool = False,
    ) -> None:
        """Send the frames of a run to members whose copies are not the frames themselves, and to share groups."""
        self.gated = gated
        for message in read_run(run):
            encodings: Encodings = {}
            for member in members:
                qos = min(message.qos, member.qos)
                delivery = Delivery(message, qos, False, member.subscription_identifiers)
                self.send(member.session, delivery, encodings, now)
            for group in groups:
                self.share(group, message, encodings, now)
        self.gated = False

    def send(self, session: Session, delivery: Delivery, encodings: Encodings, now: float) -> None:
        """Send or queue one delivery; what neither fits is dropped and counted."""
        outbox = session.outbox
        if delivery.qos == 0:
            if outbox is None:
                return  # nobody is owed a QoS 0 message while its client is away
            frame = self._frame(delivery, outbox, encodings, 0, now)
            if frame is None:
                return
            if not self._offer(outbox, frame):
                self.dropped("outbox_full", session, delivery.message, now)
            return
        if (
            outbox is None
            or session.queue
            or session.resending
            or session.bursts
            or len(session.inflight) >= session.send_maximum
            or outbox.room <= outbox.held_size
        ):
            self.enqueue(delivery, session, now)
            if outbox is not None and outbox.room <= outbox.held_size:
                outbox.starved = True
            return
        self._send_acknowledged(session, outbox, delivery, encodings, now)

    def send_next(self, session: Session, outbox: Outbox, delivery: Delivery, now: float) -> bool:
        """Send a delivery that does not wait in the queue; the caller has seen a free slot and some room. False: it
        does not fit yet, nothing happened."""
        if delivery.qos:
            self._send_acknowledged(session, outbox, delivery, {}, now)
            return True
        frame = self._frame(delivery, outbox, {}, 0, now)
        if frame is not None and len(frame) > outbox.limit:  # it came in under larger limits: it never fits
            self.dropped("outbox_full", session, delivery.message, now)
            return True
        return frame is None or self._offer(outbox, frame)

    def _offer(self, outbox: Outbox, frame: bytes) -> bool:
        """Offer a QoS 0 frame."""
        if not outbox.offer(frame):
            return False
        self.metrics.messages_sent_qos0 += 1
        if outbox.aliases is not None:
            outbox.aliases.sent()
        return True

    def _send_acknowledged(
        self, session: Session, outbox: Outbox, delivery: Delivery, encodings: Encodings, now: float
    ) -> None:
        """Send one QoS 1 or 2 delivery; the caller has seen a free slot and room."""
        packet_id = session.take_id()
        gated = delivery.qos == 2 and not session.number and self._waits_for_others(delivery)
        # For the store to have its Packet Identifier; or only behind others that wait [MQTT5-4.6.0-6].
        waits = gated or (delivery.qos == 2 and (session.number != 0 or outbox.held_size > 0))
        frame = self._frame(delivery, outbox, encodings, packet_id, now, plain=waits)
        if frame is None:
            if delivery.number:
                self.journal.done(delivery.number)
            return
        session.inflight[packet_id] = delivery
        if gated:
            before = delivery.number
            self.journal.gate(session, delivery, packet_id)
            if before > 0:  # it was the group's
                self.journal.done(before)
        elif session.number or delivery.group is not None:
            self._keep(session, delivery, packet_id)
        if waits:
            self.journal.hold(outbox).publishes[packet_id] = frame
            outbox.held_size += len(frame)
        else:
            self._put(outbox, frame)
        if delivery.qos == 1:
            self.metrics.messages_sent_qos1 += 1
        else:
            self.metrics.messages_sent_qos2 += 1

    def _waits_for_others(self, delivery: Delivery) -> bool:
        """Whether a delivery to a session that is not kept is of a message that may still be taken back: it is being
        published, or waited in a queue since, or was the share group's and the store does not have it yet."""
        return self.gated or delivery.number < 0 or delivery.number > self.journal.safe

    def _keep(self, session: Session, delivery: Delivery, packet_id: int) -> None:
        """Note that a delivery goes out under `packet_id`.

        What a share group hands out at QoS 1 stays the group's until it is acknowledged, so that another member gets it
        after a crash. A QoS 2 delivery that has begun belongs to its member, and ends with its session [MQTT5-4.8.2-5].
        """
        journal, group = self.journal, delivery.group
        if group is not None and delivery.qos == 1:
            if group.number and not delivery.number:
                journal.add(group.number, delivery, 0)
            return
        before = delivery.number
        if before and (group is not None or not session.number):  # it was the group's
            journal.done(before)
            delivery.number = 0
        if not session.number:
            return
        if delivery.number and delivery.number < session.last_number:
            # It leaves behind one that got its number later, a retained message: numbers are the order of sending.
            journal.done(delivery.number)
            delivery.number = 0
        if delivery.number:
            journal.move(delivery.number, session.number, packet_id, delivery.qos | RETAIN * delivery.retain)
        else:
            journal.add(session.number, delivery, packet_id)
            if before:
                journal.renumbered[before] = delivery.number
        session.last_number = delivery.number

    def _frame(
        self,
        delivery: Delivery,
        outbox: Outbox,
        encodings: Encodings,
        packet_id: int,
        now: float,
        *,
        dup: bool = False,
        plain: bool = False,
    ) -> bytes | None:
        """Encode one copy, or None when this receiver must not get it (expired, too large).

        Whoever puts the frame into an outbox with aliases tells them so with `sent`. `plain`: without a Topic Alias,
        because the frame waits and others overtake it.
        """
        alias, known = 0, False
        if outbox.aliases is not None:
            if plain:
                outbox.aliases.withdraw()
            else:
                alias, known = outbox.aliases.propose(delivery.message.topic_name)
        encoded = self._encoded(delivery, outbox, encodings, (alias, known), now, dup)
        if encoded is not None and encoded.size > outbox.maximum_packet_size and outbox.aliases is not None and alias:
            outbox.aliases.withdraw()  # an alias may take more than it saves
            encoded = self._encoded(delivery, outbox, encodings, (0, False), now, dup)
        if encoded is None:
            return None
        if encoded.size > outbox.maximum_packet_size:  # [MQTT5-3.1.2-24], [MQTT5-3.1.2-25]
            self.dropped("too_large", outbox.session, delivery.message, now)
            return None
        return encoded.frame(packet_id, dup=dup)

    def _encoded(
        self,
        delivery: Delivery,
        outbox: Outbox,
        encodings: Encodings,
        alias: tuple[int, bool],
        now: float,
        dup: bool,
    ) -> EncodedPublish | None:
        """Find or make the encoding of one copy; None when it has expired."""
        message = delivery.message
        version = outbox.protocol_version
        key = (version, delivery.qos, delivery.retain, delivery.subscription_identifiers, alias)
        encoded = encodings.get(key)
        if encoded is None:
            interval = message.properties.message_expiry_interval
            if interval is not None:
                interval = int(message.published_at + interval - (now + self.wall_offset) + 0.999)
                if dup:
                    interval = max(interval, 0)  # its delivery has begun, so it is brought to an end
                elif interval <= 0:  # [MQTT5-3.3.2-5]
                    self.dropped("expired", outbox.session, message, now)
                    return None
            encoded = encodings[key] = EncodedPublish(
                "" if alias[1] else message.topic_name,
                message.payload,
                message.properties,
                version=ProtocolVersion(version),
                qos=QoS(delivery.qos),
                retain=delivery.retain,
                subscription_identifiers=delivery.subscription_identifiers,
                message_expiry_interval=interval,
                topic_alias=alias[0] or None,
            )
        return encoded

    @staticmethod
    def _put(outbox: Outbox, frame: bytes) -> None:
        outbox.put(frame)
        if outbox.aliases is not None:
            outbox.aliases.sent()

    def enqueue(self, delivery: Delivery, owner: Session | ShareGroup, now: float) -> None:
        """Have a delivery wait; what the bounds of the queue push out is dropped and counted."""
        expired, dropped = owner.own_queue().add(delivery, self.limits, now + self.wall_offset)
        self.metrics.messages_queued += 1 - len(dropped) - len(expired)
        if delivery in dropped:
            pass
        elif owner.number:
            self.journal.add(owner.number, delivery, 0)
        elif self.gated and delivery.qos == 2:
            self.journal.gate(owner, delivery, 0)
        session = owner if isinstance(owner, Session) else None
        for reason, deliveries in (("expired", expired), ("queue_full", dropped)):
            for lost in deliveries:
                if lost.number:
                    self.journal.done(lost.number)
                self.dropped(reason, session, lost.message, now)

    def taken(self, queue: MessageQueue) -> Delivery:
        """Take the oldest delivery out of a queue."""
        self.metrics.messages_queued -= 1
        return queue.take()

    def pump(self, session: Session, now: float) -> None:
        """Repeat what is left to repeat, then send from the queue, while the window and the outbox have room."""
        outbox = session.outbox
        if outbox is None:
            return
        outbox.starved = bool(session.bursts) and not self.bursts.advance(session, outbox, now)
        while session.resending and len(session.inflight) - len(session.resending) < session.send_maximum:
            if outbox.room <= outbox.held_size:
                outbox.starved = True
                return
            self._repeat(session, outbox, session.resending.popitem(last=False)[0], now)
        if session.resending:
            return
        queue, bursts = session.queue, session.bursts
        while queue or bursts:
            if bursts and not (queue and queue[0].turn <= bursts[0].behind):
                if not self.bursts.send_acknowledged(session, outbox, now):
                    return
                continue
            if len(session.inflight) >= session.send_maximum:
                return
            if outbox.room <= outbox.held_size:
                outbox.starved = True
                return
            delivery = self.taken(queue)
            if not self.revoked(session, delivery.message, now):
                self._send_acknowledged(session, outbox, delivery, {}, now)
            elif delivery.number:
                self.journal.done(delivery.number)
        if session.shares:
            self.pull(session, now)

    def resend(self, session: Session, now: float) -> None:
        """Repeat what was in flight when the last connection ended, then go on with the queue [MQTT5-4.4.0-1]."""
        for packet_id, entry in session.inflight.items():
            if isinstance(entry, tuple):
                session.inflight[packet_id] = self.from_fast(entry, session, now)
        session.resending = OrderedDict.fromkeys(session.inflight)
        self.pump(session, now)

    def _repeat(self, session: Session, outbox: Outbox, packet_id: int, now: float) -> None:
        entry = session.inflight[packet_id]
        if isinstance(entry, Released):
            self.put_pubrel(outbox, packet_id, entry)
            return
        assert isinstance(entry, Delivery)
        if self.revoked(session, entry.message, now):
            self._withdraw(session, outbox, packet_id, entry)
            return
        # What was sent once keeps its id until it is acknowledged, also when it is expired by now: the client may
        # hold the id of a QoS 2 message, and would take a new message under it for this one.
        waits = entry.qos == 2 and entry.number != 0
        frame = self._frame(entry, outbox, {}, packet_id, now, dup=True, plain=waits)
        if frame is None:
            self._withdraw(session, outbox, packet_id, entry)
            return
        if waits:  # the store may not have its Packet Identifier yet
            self.journal.hold(outbox).publishes[packet_id] = frame
            outbox.held_size += len(frame)
        else:
            self._put(outbox, frame)
        if entry.qos == 1:
            self.metrics.messages_sent_qos1 += 1
        else:
            self.metrics.messages_sent_qos2 += 1

    def revoked(self, session: Session, message: Message, now: float) -> bool:
        """Whether the client may not have a message any more; then it is counted as dropped."""
        if self.may_receive is None or self.may_receive(session, message.topic_name):
            return False
        self.dropped("not_authorized", session, message, now)
        return True

    def _withdraw(self, session: Session, outbox: Outbox, packet_id: int, entry: Delivery) -> None:
        """End a delivery that had begun without repeating it. A client may hold the id of a QoS 2 message and would
        take a new message under it for this one: PUBREL makes it let go, its PUBCOMP frees the id."""
        if entry.qos == 1:
            del session.inflight[packet_id]
            if entry.number:
                self.journal.done(entry.number)
            return
        self.put_pubrel(outbox, packet_id, self.release(session, packet_id))

    def release(self, session: Session, packet_id: int) -> Released:
        """Of a QoS 2 delivery only PUBREL is owed from now on."""
        number = number_of(session.inflight[packet_id])
        released = RELEASED
        if number:
            released = Released(number)
            self.journal.move(number, session.number, packet_id, 2 | RELEASED_FLAG)
        session.inflight[packet_id] = released
        session.resending.pop(packet_id, None)
        return released

    def put_pubrel(self, outbox: Outbox, packet_id: int, released: Released) -> None:
        """Send PUBREL once the store knows of the PUBREC, where it has the delivery."""
        frame = encode(PubRel(packet_id), ProtocolVersion(outbox.protocol_version))
        if released.number:
            self.journal.hold(outbox).frames.append(frame)  # counted when it leaves
            return
        outbox.put(frame)
        self.metrics.packets_sent += 1

    def from_fast(self, entry: FastDelivery, session: Session, now: float) -> Delivery:
        """Make an ordinary delivery of one that the fast lane sent."""
        head, tail, version, number = entry
        qos = qos_of(entry)
        run = FrameRun(head + b"\0\1" + tail, 1, qos, ProtocolVersion(version), "", now + self.wall_offset)
        return Delivery(read_run(run)[0], qos, number=number)

    def acknowledged(self, session: Session, packet_id: int, packet_type: PacketType, now: float) -> bool:
        """A PUBACK or PUBCOMP came: free its slot. False when no such delivery waits for it."""
        entry = session.inflight.get(packet_id)
        if entry is None:
            return False
        if packet_type is PacketType.PUBACK:
            if qos_of(entry) != 1:
                return False
        elif not isinstance(entry, Released):
            return False
        self.finished(session, packet_id, now)
        return True

    def finished(self, session: Session, packet_id: int, now: float) -> None:
        """A delivery is at its end: its slot and its Packet Identifier are free."""
        entry = session.inflight.pop(packet_id)
        if number := number_of(entry):
            self.journal.done(number)
        if session.resending:
            session.resending.pop(packet_id, None)
        if session.waiting:
            self.pump(session, now)

    def dropped(self, reason: str, session: Session | None, message: Message, now: float) -> None:
        """Count a message that somebody does not get; `session` None: a whole share group, or nobody in particular."""
        name = f"dropped_{reason}"
        setattr(self.metrics, name, getattr(self.metrics, name) + 1)
        client_id = session.client_id if session is not None else ""
        self.drop(
            MessageDropped(at=now + self.wall_offset, reason=reason, topic_name=message.topic_name, client_id=client_id)
        )
