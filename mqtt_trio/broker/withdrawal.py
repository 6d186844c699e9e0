"""What becomes of publishes that the store could not keep: their publishers are told, what they led to is taken back.

A 5.0 publisher gets a negative answer. A 3.x publisher, whose version has none, is disconnected and sends everything
that was not answered again, in order; so nothing that it sent behind a refused message may stay. What has left at QoS 1
stays with whoever has it; at QoS 2 nothing has left before the store had it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mqtt_trio.broker.journal import AGAIN, RELEASED, RETAIN, Freeing, Held, Kept, positive
from mqtt_trio.broker.queues import MessageQueue
from mqtt_trio.broker.session import Delivery, Session, number_of, qos_of
from mqtt_trio.broker.shares import ShareGroup
from mqtt_trio.broker.store import Number
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import PubAck, PubRec

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.keeper import Keeper
    from mqtt_trio.broker.outbox import Outbox

REFUSAL = ReasonCode.QUOTA_EXCEEDED
"""What a 5.0 publisher is told while the store takes nothing."""


class Withdrawal:
    """Takes back what a failed commit was to keep."""

    def __init__(self, broker: Broker, keeper: Keeper) -> None:
        self.broker = broker
        self.keeper = keeper
        self.journal = broker.journal
        self._refused: dict[Session, None] = {}
        """3.x publishers of what could not be kept. While `run` is under way."""
        self._withdrawn: dict[int, tuple[MessageQueue, set[Number], set[Number]]] = {}
        """Of each queue with withdrawn deliveries: what waited there, and which of it goes. While `run`
        is under way."""
        self._freed: dict[Session, None] = {}
        """Sessions that have a free slot in their window by it. While `run` is under way."""

    def run(self, outboxes: Sequence[Outbox], reason: str, now: float) -> None:
        """A commit failed: answer the publishers that wait on these connections, in order."""
        broker = self.broker
        for outbox in outboxes:
            self._answer_all(outbox)
        for outbox in outboxes:
            self._refuse_repetitions(outbox)
        for session in self._refused:
            self._take_back_pending(session)
        self._empty_queues()
        freed, self._freed = self._freed, {}
        for session in freed:
            broker.sender.pump(session, now)
        refused, self._refused = self._refused, {}
        for session in refused:
            if session.link is not None:
                session.link.end(REFUSAL, f"messages cannot be stored: {reason}")
        for outbox in outboxes:
            self._let_go(outbox)
            for held in outbox.held:
                replies, held.replies = held.replies, []
                if replies and outbox.session is not None:
                    outbox.put(b"".join(replies))
                    broker.metrics.packets_sent += len(replies)
            # Behind all of its answers: what it sent meanwhile is answered after them.
            if outbox.session is not None and outbox.session.link is not None:
                broker.unstall(outbox.session.link)

    def _let_go(self, outbox: Outbox) -> None:
        """Send what only waited behind copies that have been taken back: the store need not have it."""
        session = outbox.session
        if session is None or session.number:
            return
        for held in outbox.held:
            while held.publishes:
                packet_id = next(iter(held.publishes))
                entry = session.inflight.get(packet_id)  # none: its client has acknowledged what it cannot have
                if entry is not None and number_of(entry):
                    return  # it goes on waiting, and so does what is behind it
                frame = held.publishes.pop(packet_id)
                outbox.held_size -= len(frame)
                outbox.put(frame)

    def _refuse_repetitions(self, outbox: Outbox) -> None:
        """Of the answers that go on waiting, say no to those whose message was taken back with another connection."""
        session = outbox.session
        if session is None or session.link is None:
            return
        for held in outbox.held:
            for at, answer in enumerate(held.acks):
                if isinstance(answer, bytes) or answer[0] == 1 or answer[1] in session.received:
                    continue
                if session.link.connection.protocol_version == ProtocolVersion.MQTT_5_0:
                    held.acks[at] = session.link.connection.encode(PubRec(answer[1], REFUSAL))
                else:
                    self._refused[session] = None

    def _take_back_pending(self, publisher: Session) -> None:
        """A 3.x publisher is going to be disconnected: what it sent behind the message that was refused and what a tap
        holds must not overtake that one."""
        safe = self.journal.safe
        for held in publisher.outbox.held if publisher.outbox is not None else ():
            waiting, held.acks = held.acks, []
            for answer in waiting:
                if isinstance(answer, bytes) or answer[3] <= safe:
                    held.acks.append(answer)
                else:
                    self._take_back(publisher, answer[0], answer[1], answer[2:])
        for ack in publisher.acks:
            if ack.kept is not None and ack.kept[1] > safe:
                self._take_back(publisher, ack.qos, ack.packet_id, ack.kept)
        publisher.acks.clear()

    def _take_back(self, publisher: Session | None, qos: int, packet_id: int, kept: Kept) -> None:
        for number in range(kept[0] + 1, kept[1] + 1):
            self._withdraw(number)
        if qos == 2 and publisher is not None:
            publisher.received.discard(packet_id)
            self.keeper.freed(publisher, packet_id)

    def abandoned(self, session: Session, outbox: Outbox) -> None:
        """A connection ends while answers wait for taps: until the store has what they led to, it may still be taken
        back. Called while the outbox is the session's."""
        for ack in session.acks:
            if ack.kept is not None and ack.kept[1] > self.journal.safe:
                self.journal.hold(outbox).acks.append((ack.qos, ack.packet_id, *ack.kept))
                outbox.held_acks += ack.qos == 1

    def _answer_all(self, outbox: Outbox) -> None:
        """Give the answers that waited for what could not be kept, in order."""
        for held in outbox.held:
            for at, answer in enumerate(held.acks):
                if isinstance(answer, bytes) and not isinstance(answer, Freeing):
                    self._put_answer(outbox, answer)
                elif isinstance(answer, Freeing) or self._must_wait(held, answer):
                    del held.acks[:at]
                    return
                else:
                    self._answer(outbox, held, answer)
            held.acks.clear()

    def _must_wait(self, held: Held, answer: tuple[int, int, Number, Number]) -> bool:
        """Whether an answer can be neither positive nor negative yet: that of a QoS 2 message that came again, whose
        first one had not been answered before its connection ended, and which the store does not have yet."""
        session, packet_id = held.session, answer[1]
        if answer[2:] != AGAIN or session is None or packet_id not in session.received:
            return False
        value = session.received_kept.get(packet_id, packet_id)
        return self.journal.batch.received.get((session.number, value)) is True

    def _answer(self, outbox: Outbox, held: Held, answer: tuple[int, int, Number, Number]) -> None:
        """Say yes to what the store has or need not have; no to the rest, which is taken back as far as it has not
        left, also when the connection is gone: its client sends it again."""
        qos, packet_id, first, last = answer
        publisher = held.session
        if qos == 1:
            outbox.held_acks -= 1
        if answer[2:] == AGAIN:
            is_kept = publisher is not None and packet_id in publisher.received
        else:
            is_kept = last <= self.journal.safe
        if is_kept:
            self._put_answer(outbox, positive(qos, packet_id))
            return
        self._take_back(publisher, qos, packet_id, (first, last))
        session = outbox.session
        if session is not None and session.link is not None:
            self.broker.metrics.refused_by_store += 1
            if session.link.connection.protocol_version == ProtocolVersion.MQTT_5_0:
                self.refuse(session, qos, packet_id)
            else:
                self._refused[session] = None  # ended once nothing that was withdrawn is in a queue any more
        elif qos == 2 and publisher is not None and self._waits_again(publisher, packet_id):
            self._refused[publisher] = None

    @staticmethod
    def _waits_again(publisher: Session, packet_id: int) -> bool:
        """Whether a message came again on another connection of a 3.x client, where its answer waits for a tap: what is
        sent behind it must not overtake it. A 5.0 client is told in its turn."""
        link = publisher.link
        if link is None or link.connection.protocol_version == ProtocolVersion.MQTT_5_0:
            return False
        return any(ack.qos == 2 and ack.packet_id == packet_id for ack in publisher.acks)

    def _put_answer(self, outbox: Outbox, frame: bytes) -> None:
        if outbox.session is not None:
            outbox.put(frame)
            self.broker.metrics.packets_sent += 1

    def refuse(self, session: Session, qos: int, packet_id: int) -> None:
        """Tell a publisher that its message is not kept [MQTT5-4.13.2]; a 3.x client, whose version has no such answer,
        is disconnected and sends it again."""
        link = session.link
        assert link is not None
        if link.connection.protocol_version != ProtocolVersion.MQTT_5_0:
            link.end(REFUSAL, f"messages cannot be stored: {self.journal.failing}")
            return
        packet = PubAck(packet_id, REFUSAL) if qos == 1 else PubRec(packet_id, REFUSAL)
        link.outbox.put(link.connection.encode(packet))
        self.broker.metrics.packets_sent += 1

    def _withdraw(self, number: Number) -> None:
        """Take back a retained message, or a delivery that waits in a queue or whose frame waits for the store; what
        was sent stays sent."""
        if (change := self.keeper.retained_changes.withdraw(number)) is not None:
            self.keeper.restore_retained(*change)
        while (later := self.journal.renumbered.get(abs(number))) is not None:
            number = later
        if abs(number) in self.journal.gated:
            self._withdraw_gated(abs(number))
            return
        row = self.journal.batch.deliveries.get(number)
        if row is None:
            return
        owner, packet_id = row[1], row[2]
        session, group = self.keeper.sessions.get(owner), self.keeper.groups.get(owner)
        queue = session.queue if session is not None else group.queue if group is not None else None
        if packet_id and session is not None:
            entry = session.inflight.get(packet_id)
            if entry is None or number_of(entry) != number or qos_of(entry) != 2 or row[3] & RELEASED:
                return
            session.resending.pop(packet_id, None)
            self._take_out(session, packet_id)
        elif queue is not None and self._mark(queue, number):
            pass
        else:
            if group is not None:
                self._leave_with_member(group, number)
            return
        self.journal.done(number)

    def _withdraw_gated(self, number: Number) -> None:
        """Take back what the store would not have got and whose frame waits for others, or that waits in a queue."""
        owner, _, packet_id = self.journal.gated.pop(number)
        if not packet_id:
            self._mark(owner.queue, -number)
        elif isinstance(owner, Session):
            entry = owner.inflight.get(packet_id)
            if isinstance(entry, Delivery) and entry.number == -number and entry.qos == 2:
                self._take_out(owner, packet_id)

    def _take_out(self, session: Session, packet_id: int) -> None:
        """Remove what is in flight under an identifier, and its frame."""
        del session.inflight[packet_id]
        if session.outbox is not None:
            for held in session.outbox.held:
                session.outbox.held_size -= len(held.publishes.pop(packet_id, b""))
            self._freed[session] = None

    def _mark(self, queue: MessageQueue, number: Number) -> bool:
        """Have `_empty_queues` take a delivery out of a queue; False when it is not there."""
        found = self._withdrawn.get(id(queue))
        if found is None:
            found = self._withdrawn[id(queue)] = (queue, {delivery.number for delivery in queue}, set())
        _, waiting, gone = found
        if number not in waiting:
            return False
        gone.add(number)
        return True

    def _empty_queues(self) -> None:
        """Take what was withdrawn out of its queues, each of which is looked through once."""
        for queue, _, gone in self._withdrawn.values():
            self.broker.metrics.messages_queued -= queue.withdraw(gone)
        self._withdrawn.clear()

    def _leave_with_member(self, group: ShareGroup, number: Number) -> None:
        """A member was sent a message of its group at QoS 1: it may complete that, but nobody else gets the message,
        whose publisher is told that it is not kept. At QoS 2 it would come twice when the publisher tries again."""
        for session in group.members:
            for packet_id, entry in session.inflight.items():
                if not isinstance(entry, Delivery) or entry.number != number:
                    continue
                entry.group = None
                if session.number:
                    self.journal.move(number, session.number, packet_id, entry.qos | RETAIN * entry.retain)
                else:
                    entry.number = 0
                    self.journal.done(number)
                return
