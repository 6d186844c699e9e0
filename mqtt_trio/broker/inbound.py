"""PUBLISH on its way in: checks, retained store, taps, fan-out, acknowledgement."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from mqtt_trio.broker.journal import AGAIN, TURN, Freeing, Kept, positive
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.outbox import ClientLink, Outbox
from mqtt_trio.broker.reasons import NO_SUCH_IDENTIFIER, why_not_published
from mqtt_trio.broker.session import PendingAck, Session
from mqtt_trio.broker.store import Number
from mqtt_trio.broker.tap import Hold, Refused, TapRoute, keeps
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import Packet, PubAck, PubComp, Publish, PubRec, PubRel

if TYPE_CHECKING:
    from mqtt_trio.broker.audience import Audience
    from mqtt_trio.broker.broker import Broker


class Inbound:
    """The inbound half of the broker."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def publish(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        """Handle a PUBLISH; False when the publisher must wait before it is looked at."""
        assert isinstance(packet, Publish)
        broker = self.broker
        if packet.qos:
            if packet.qos == 2 and packet.packet_id in session.received:
                self._repeated(link, session, packet, now)
                return True
            if not self._may_take(link, session):
                return session.link is not link  # ended: handled; paused: not
        if packet.topic_name.count("/") >= broker.limits.topic_levels:
            self._refuse_topic(link, session, packet)
            return True
        if not broker.may_publish(broker.principal(session), packet.topic_name):
            broker.metrics.dropped_not_authorized += 1
            self._refuse(session, packet.qos, packet.packet_id or 0, ReasonCode.NOT_AUTHORIZED)
            return True
        message = Message.of(packet, session.client_id, now + broker.wall_offset)
        self._count(packet.qos)
        audience = broker.audience(message.topic_name, session.client_id)
        journal = broker.journal
        if journal.failing is not None and self._needs_store(packet, audience):
            broker.metrics.refused_by_store += 1
            self.refuse_unkept(session, packet.qos, packet.packet_id or 0)
            return True
        before = journal.last_number
        answers = self.show(audience.taps, message)
        if answers and self.refused(session, packet.qos, packet.packet_id or 0, answers):
            return True
        if packet.qos == 2:
            session.received.add(packet.packet_id or 0)  # [MQTT5-4.3.3-10]
        if packet.retain:
            self.retain(message)
        gated = packet.qos == 2 and journal.keeps and (packet.retain or audience.kept)
        broker.sender.deliver(message, audience, now, gated=gated)
        if packet.qos:
            self._answer(session, packet, answers, before)
        if link.lane is not None:
            link.lane.learn(message.topic_name, audience)
        return True

    @staticmethod
    def _needs_store(packet: Publish, audience: Audience) -> bool:
        """Whether a message may be acknowledged only once the store has what it leads to."""
        return bool(packet.qos) and (packet.retain or audience.kept or any(map(keeps, audience.taps)))

    def _answer(self, session: Session, packet: Publish, answers: Sequence[Hold | Refused], before: Number) -> None:
        """Acknowledge a message that was delivered; `before` is the last number of the journal in front of it."""
        packet_id, last = packet.packet_id or 0, self.broker.journal.last_number
        kept = (before, last) if last != before else None
        if kept is None and packet.retain and packet.qos == 2 and session.number and packet_id in session.received:
            # It removed nothing. Behind a kill it would be new when it comes again, and undo what came after it, which
            # the store knows for received.
            gated = any(isinstance(answer, Hold) and not answer.kept for answer in answers)
            self.broker.keeper.received(session, packet_id, gated=gated)
        self.acknowledge(session, int(packet.qos), packet_id, answers, kept)

    def _may_take(self, link: ClientLink, session: Session) -> bool:
        """Whether a QoS 1 or 2 PUBLISH may be looked at now; pauses or ends the link where not."""
        broker = self.broker
        if broker.stopped:
            broker.stall(link)
            return False
        limit, received = broker.limits.receive_maximum, session.received
        known = len(received) + link.outbox.held_acks
        # Counting what waits takes time for each of its members, so only where the sum may be reached.
        if known + len(session.acks) >= limit and (
            known
            - len(session.carried or ())  # the quota begins anew with each connection [MQTT5-4.9.0-1]
            + sum(ack.qos == 1 or ack.packet_id not in received for ack in session.acks)
            >= limit
        ):
            if link.connection.protocol_version == ProtocolVersion.MQTT_5_0:
                link.end(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED, "more than Receive Maximum unacknowledged messages")
                return False
            if session.acks or link.outbox.held_acks:
                broker.stall(link)
                return False
        return True

    def retain(self, message: Message, *, waits: bool = False) -> None:
        """Keep or remove the retained message of a topic [MQTT5-3.3.1-5], [MQTT5-3.3.1-6]. `waits`: who brings it waits
        for room in the journal, so it is not refused for want of any."""
        broker = self.broker
        retained = broker.retained
        topic_name = message.topic_name
        before = retained.get(topic_name)
        if kept := waits or not broker.journal.overfull:
            kept = retained.set(message)
            if not kept and retained.drop_expired(message.published_at):
                kept = retained.set(message)  # expired ones were in the way
        else:
            retained.remove(topic_name)  # nobody gets an old one for a new one
        if kept and message.payload:
            if broker.journal.keeps:
                broker.keeper.retained(message)
                broker.keeper.retained_by(message, before)
        elif before is not None or topic_name in broker.keeper.left_out or (message.qos and broker.journal.sources):
            # Others may have one where this node has none: what a gateway notes for them is in the commit of this.
            broker.keeper.retained_gone(topic_name)
            broker.keeper.retained_by(message, before)
        broker.metrics.retained_refused += not kept
        broker.metrics.retained_messages = len(broker.retained)

    @staticmethod
    def show(taps: Sequence[TapRoute], message: Message) -> list[Hold | Refused]:
        """Show a message to the taps, up to one that refuses; what they want before it is acknowledged."""
        answers: list[Hold | Refused] = []
        for tap in taps:
            if (answer := tap.take(message)) is not None:
                answers.append(answer)
                if isinstance(answer, Refused):
                    break
        return answers

    def refused(self, session: Session, qos: int, packet_id: int, answers: Sequence[Hold | Refused]) -> bool:
        """Answer a publish that a tap refused; False when none did."""
        for answer in answers:
            if isinstance(answer, Refused):
                self.broker.metrics.dropped_by_tap += 1
                self._refuse(session, qos, packet_id, answer.reason_code)
                return True
        return False

    def acknowledge(
        self,
        session: Session,
        qos: int,
        packet_id: int,
        answers: Sequence[Hold | Refused],
        kept: Kept | None = None,
    ) -> None:
        """Send PUBACK or PUBREC, or queue it behind what it has to wait for. `kept`: the store must have these
        deliveries first."""
        holds = [answer for answer in answers if isinstance(answer, Hold)]
        if qos == 2 and session.number and packet_id in session.received and kept != AGAIN:
            noted = any(hold.kept for hold in holds)
            if kept is not None or noted:
                self.broker.keeper.received(session, packet_id, gated=any(not hold.kept for hold in holds))
        link = session.link
        if link is None and not (holds and qos == 2 and packet_id in session.received):
            return  # the delivery ended its own publisher
        if link is not None and not holds and not session.acks:
            if kept is not None or link.outbox.answers_wait:
                self.hold(link.outbox, qos, packet_id, kept)
            else:
                self.broker.reply(link, PubAck(packet_id) if qos == 1 else PubRec(packet_id))
            return
        negative = partial(self._negative, session, qos, packet_id)
        ack = PendingAck(positive(qos, packet_id), qos, packet_id, len(holds), negative, kept=kept, link=link)
        if link is not None:
            session.acks.append(ack)
        if qos == 2 and holds:
            session.gates[packet_id] = ack
        for hold in holds:
            hold.when_released(partial(self._released, session, ack, hold))

    def hold(self, outbox: Outbox, qos: int, packet_id: int, kept: Kept | None) -> None:
        """Have an answer wait for the store, or for answers that do."""
        first, last = kept or TURN
        self.broker.journal.hold(outbox).acks.append((qos, packet_id, first, last))
        outbox.held_acks += qos == 1

    def _released(self, session: Session, ack: PendingAck, hold: Hold) -> None:
        """One hold of one acknowledgement was released: send what may go now, in order."""
        ack.waiting_for -= 1
        ack.refused = ack.refused or hold.refused
        if ack.waiting_for == 0 and session.gates.get(ack.packet_id) is ack:
            if ack.refused is None:
                del session.gates[ack.packet_id]
            else:
                session.gates[ack.packet_id] = None
        link = session.link
        if link is None or ack.link is not link:
            return  # the connection is gone, the client will ask again
        acks, safe = session.acks, self.broker.journal.safe
        while acks and acks[0].waiting_for == 0:
            ack = acks.pop(0)
            kept = ack.kept
            if kept is not None and ack.qos == 2 and ack.packet_id not in session.received:
                ack.refused = ReasonCode.QUOTA_EXCEEDED  # the store failed meanwhile, and its first one was taken back
            if kept is not None and kept != AGAIN and kept[1] <= safe:
                kept = None  # the store has it by now
            if ack.refused is None and not ack.negative and (kept is not None or link.outbox.answers_wait):
                self.hold(link.outbox, ack.qos, ack.packet_id, kept)
                continue
            frame = ack.frame if ack.refused is None else ack.on_refused(ack.refused)
            if frame:
                self._put_answer(link, frame)
        if len(acks) < self.broker.limits.receive_maximum:
            self.broker.unstall(link)

    def _negative(self, session: Session, qos: int, packet_id: int, reason_code: ReasonCode) -> bytes:
        """The frame that says no, or nothing after ending a 3.x client, whose version has none. What a 3.x client sends
        again then goes to the taps alone, when its subscribers have it."""
        link = session.link
        assert link is not None
        if link.connection.protocol_version != ProtocolVersion.MQTT_5_0:
            link.end(reason_code, "the message was refused")
            return b""
        frees = qos == 2 and packet_id in session.received_kept
        if qos == 2:
            session.received.discard(packet_id)
            session.gates.pop(packet_id, None)
            self.broker.keeper.freed(session, packet_id)
        told = why_not_published(reason_code, self.broker.limits)
        packet = PubAck(packet_id, reason_code, told) if qos == 1 else PubRec(packet_id, reason_code, told)
        frame = link.connection.encode(packet)
        return Freeing(frame) if frees else frame

    def _refuse(self, session: Session, qos: int, packet_id: int, reason_code: ReasonCode) -> None:
        """Say no to a PUBLISH. QoS 0 has no answer; a 3.x client is told nothing where it merely may not."""
        link = session.link
        assert link is not None
        if qos == 0:
            return
        if reason_code is ReasonCode.NOT_AUTHORIZED and link.connection.protocol_version != ProtocolVersion.MQTT_5_0:
            self.acknowledge(session, qos, packet_id, ())  # [MQTT3-3.3.5-2]: acknowledged and dropped
            return
        frame = self._negative(session, qos, packet_id, reason_code)
        if frame:
            if session.acks:
                negative = partial(self._negative, session, qos, packet_id)
                session.acks.append(PendingAck(frame, qos, packet_id, 0, negative, link=link, negative=True))
            else:
                self._put_answer(link, frame)

    def _put_answer(self, link: ClientLink, frame: bytes) -> None:
        """Send a negative answer, behind answers that wait for the store."""
        if link.outbox.answers_wait or isinstance(frame, Freeing):
            self.broker.journal.hold(link.outbox).acks.append(frame)
            return
        link.outbox.put(frame)
        self.broker.metrics.packets_sent += 1

    def refuse_unkept(self, session: Session, qos: int, packet_id: int) -> None:
        """Say no to a publish that the store, which takes nothing, would have to keep."""
        link = session.link
        assert link is not None
        if link.connection.protocol_version == ProtocolVersion.MQTT_5_0:
            self._refuse(session, qos, packet_id, ReasonCode.QUOTA_EXCEEDED)
        else:
            self.broker.keeper.withdrawal.refuse(session, qos, packet_id)

    def _refuse_topic(self, link: ClientLink, session: Session, packet: Publish) -> None:
        """A Topic Name is not malformed, but not accepted here: that alone is worth telling at QoS 0 as well."""
        text = f"a Topic Name of more than {self.broker.limits.topic_levels} levels"
        if packet.qos and link.connection.protocol_version == ProtocolVersion.MQTT_5_0:
            self._refuse(session, packet.qos, packet.packet_id or 0, ReasonCode.TOPIC_NAME_INVALID)
        else:
            link.end(ReasonCode.TOPIC_NAME_INVALID, text)

    def _repeated(self, link: ClientLink, session: Session, packet: Publish, now: float) -> None:
        """A QoS 2 message came again: the same answer, no second delivery [MQTT5-4.3.3-10]. What the taps did not let
        go is answered when they do, or shown to them again."""
        packet_id = packet.packet_id or 0
        if any(ack.qos == 2 and ack.packet_id == packet_id for ack in session.acks):
            return  # its first PUBREC is still on the way
        kept = AGAIN if packet_id in session.received_kept else None  # the store may not have it yet
        answers: list[Hold | Refused] = []
        if packet_id in session.gates:
            if (waiting := session.gates[packet_id]) is not None:
                waiting.link = link
                session.acks.append(waiting)
                return
            message = Message.of(packet, session.client_id, now + self.broker.wall_offset)
            taps = self.broker.audience(message.topic_name, session.client_id).taps
            answers = self.show([tap for tap in taps if not keeps(tap)], message)
            if self.refused(session, 2, packet_id, answers):
                return
            del session.gates[packet_id]
        self.acknowledge(session, 2, packet_id, answers, kept)

    def pubrel(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        """The publisher lets go of a QoS 2 Packet Identifier [MQTT5-4.3.3-11]."""
        assert isinstance(packet, PubRel)
        waits = packet.packet_id in session.received_kept
        if session.carried:
            session.carried.discard(packet.packet_id)
        if packet.packet_id in session.received:
            session.received.remove(packet.packet_id)
            session.gates.pop(packet.packet_id, None)
            answer = PubComp(packet.packet_id)
        else:
            answer = PubComp(packet.packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND, NO_SUCH_IDENTIFIER)
            # Another connection may have freed it, and the store may not know yet: after a crash the identifier would
            # be in use again, and the next message under it be taken for a repetition.
            waits = session.number != 0
        self.broker.keeper.freed(session, packet.packet_id)
        if waits:
            self.broker.journal.hold(link.outbox).frames.append(link.connection.encode(answer))
        else:
            self.broker.reply(link, answer)
        return True

    def _count(self, qos: int) -> None:
        metrics = self.broker.metrics
        if qos == 0:
            metrics.messages_received_qos0 += 1
        elif qos == 1:
            metrics.messages_received_qos1 += 1
        else:
            metrics.messages_received_qos2 += 1
