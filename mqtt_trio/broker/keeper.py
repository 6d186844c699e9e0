"""What of the broker the store has (sessions, groups, subscriptions, retained messages), and the store's answers."""

from __future__ import annotations

from heapq import merge
from typing import TYPE_CHECKING

from mqtt_trio.broker.events import OutageBegan, OutageEnded
from mqtt_trio.broker.journal import AGAIN, RELEASED, RETAIN, ROW_SIZE, Freeing, Held, Kept, frame_of, positive
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.queues import MessageQueue
from mqtt_trio.broker.retained_changes import RetainedChanges
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Delivery, Session, number_of, qos_of
from mqtt_trio.broker.shares import ShareGroup
from mqtt_trio.broker.store import Batch, Number
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import PubAck, PubRec
from mqtt_trio.protocol.topics import is_system_topic

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.outbox import Outbox

REFUSAL = ReasonCode.QUOTA_EXCEEDED
"""What a 5.0 publisher is told while the store takes nothing."""


class Keeper:
    """Keeps the journal of one broker true, and does what follows from the store's answers. Where the journal keeps
    nothing, no session and no group gets a number, and nothing here is called."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.journal = broker.journal
        self.sessions: dict[int, Session] = {}
        self.groups: dict[int, ShareGroup] = {}
        self._refused: dict[Session, None] = {}
        """3.x publishers of what could not be kept. While a failure is dealt with."""
        self._withdrawn: dict[int, tuple[MessageQueue, set[Number], set[Number]]] = {}
        """Of each queue with withdrawn deliveries: what waited there, and which of it goes. While a failure is dealt
        with."""
        self._freed: dict[Session, None] = {}
        """Sessions that have a free slot in their window by it. While a failure is dealt with."""
        self.retained_changes = RetainedChanges()
        self.left_out: set[str] = set()
        """Topics of retained messages in the store for which [Limits] left no room at the start."""
        self.outage_since: float | None = None
        """Monotonic instant of the first of the commits that failed, until one with messages succeeds. A store without
        space goes on taking what needs none: that is no end of the outage, it only lets the next message try."""
        self._brings_messages = False
        """Whether the batch that is out does."""
        self._rows = 0
        """Rows of messages in it."""

    # Sessions

    def attached(self, session: Session) -> None:
        """A session has a connection, and with it the Session Expiry Interval that decides whether it is kept."""
        if not session.number:
            if not self.journal.keeps or not session.expiry_interval:
                return
            session.number = self.journal.new_owner()
            self.sessions[session.number] = session
        self.changed(session)

    def changed(self, session: Session) -> None:
        """Note who a session is, when it ends, and its Will."""
        offset = self.broker.wall_offset
        will = session.will
        will_frame = None
        if will is not None:
            message = Message(will.topic_name, will.payload, int(will.qos), will.retain, will.properties)
            will_frame = will.will_delay_interval.to_bytes(4, "big") + frame_of(message)
        self.journal.dirty = True
        self.journal.size += ROW_SIZE + len(will_frame or b"")
        self.journal.batch.sessions[session.number] = (
            session.number,
            session.client_id,
            session.user_name,
            session.expiry_interval,
            None if session.link is not None or session.ended_at is None else session.ended_at + offset,
            will_frame,
            None if session.will_at is None else session.will_at + offset,
        )

    def ended(self, session: Session) -> None:
        """A session is at its end, with everything that belongs to it. Called before its messages are forgotten."""
        journal, number = self.journal, session.number
        for entry in session.inflight.values():
            if delivery := number_of(entry):
                journal.done(delivery)
        self._drop(session.queue)
        batch = journal.batch
        for topic_filter in session.subscriptions:
            batch.subscriptions.pop((number, topic_filter), None)
        for value in session.received_kept.values():
            batch.received.pop((number, value), None)
        batch.sessions[number] = None
        journal.size += ROW_SIZE
        journal.dirty = True
        del self.sessions[number]

    def _drop(self, queue: MessageQueue) -> None:
        for delivery in queue:
            if delivery.number:
                self.journal.done(delivery.number)

    def subscribed(self, session: Session, options: SubscriptionOptions) -> None:
        """A session has a new subscription, or other options."""
        byte = options.qos | options.no_local << 2 | options.retain_as_published << 3 | options.retain_handling << 4
        key = (session.number, options.topic_filter)
        self.journal.batch.subscriptions[key] = (*key, byte, options.subscription_identifier)
        self.journal.size += ROW_SIZE + len(options.topic_filter)
        self.journal.dirty = True

    def unsubscribed(self, session: Session, topic_filter: str) -> None:
        """A session gave up a subscription."""
        self.journal.batch.subscriptions[session.number, topic_filter] = None
        self.journal.size += ROW_SIZE + len(topic_filter)
        self.journal.dirty = True

    def received(self, session: Session, packet_id: int, *, gated: bool = False) -> None:
        """An inbound QoS 2 Packet Identifier is in use. `gated`: taps have not let its message go, so if that is not
        known any more when it comes again, it is shown to them once more."""
        value = -packet_id if gated else packet_id
        session.received_kept[packet_id] = value
        self.journal.batch.received[session.number, value] = True
        self.journal.size += ROW_SIZE
        self.journal.dirty = True

    def freed(self, session: Session, packet_id: int) -> None:
        """An inbound QoS 2 Packet Identifier is free again."""
        session.gates.pop(packet_id, None)
        value = session.received_kept.pop(packet_id, None)
        if value is not None:
            self.journal.batch.received[session.number, value] = False
            self.journal.size += ROW_SIZE
            self.journal.dirty = True

    # Share groups

    def joined(self, group: ShareGroup, session: Session) -> None:
        """A group has a member that is kept: then so is what waits for the group. What members were sent and have not
        acknowledged may come back to it, so it is in front; each member's part of that is in order."""
        if group.number or not session.number:
            return
        group.number = self.journal.new_owner()
        self.groups[group.number] = group
        group.forget_routes()  # they know whether anybody is kept
        self.journal.batch.groups[group.number] = group.name
        self.journal.size += ROW_SIZE
        self.journal.dirty = True
        sent = [
            [entry for entry in member.inflight.values() if isinstance(entry, Delivery) and entry.group is group]
            for member in group.members
        ]
        for delivery in merge(*sent, key=lambda delivery: delivery.message.published_at):
            if delivery.qos == 1:
                self.journal.add(group.number, delivery, 0)
        for delivery in group.queue:
            before = -delivery.number
            self.journal.add(group.number, delivery, 0)
            if before > 0:
                del self.journal.gated[before]
                self.journal.renumbered[before] = delivery.number

    def group_ended(self, group: ShareGroup) -> None:
        """A group has lost its last member. Called before its queue is dropped."""
        self._drop(group.queue)
        self.journal.batch.groups[group.number] = None
        self.journal.size += ROW_SIZE
        self.journal.dirty = True
        del self.groups[group.number]

    # Retained messages

    def retained(self, message: Message) -> None:
        """A retained message was set."""
        if is_system_topic(message.topic_name):
            return
        row = (message.topic_name, frame_of(message), message.client_id, message.published_at)
        self.journal.batch.retained[message.topic_name] = row
        self.journal.size += ROW_SIZE + len(row[1])
        self.journal.mark()  # the publisher's answer waits for it
        self.journal.dirty = True
        self.left_out.discard(message.topic_name)

    def retained_gone(self, topic_name: str) -> None:
        """A retained message was removed, has expired, or had to go; or may be in the store alone."""
        if self.journal.keeps and not is_system_topic(topic_name):
            self.journal.batch.retained[topic_name] = None
            self.journal.size += ROW_SIZE
            self.journal.mark()
            self.journal.dirty = True
            self.left_out.discard(topic_name)

    def retained_by(self, message: Message, before: Message | None) -> None:
        """The change that was noted last is that of this PUBLISH; until the store has it, it may be refused. `before`:
        what the topic had."""
        if not self.journal.keeps or is_system_topic(message.topic_name):
            return
        if message.qos:
            after = self.broker.retained.get(message.topic_name)
            self.retained_changes.note(self.journal.last_number, message.topic_name, before, after)
        else:
            self.retained_changes.settle(message.topic_name)

    def _restore_retained(self, topic_name: str, message: Message | None) -> None:
        """A change was taken back."""
        retained = self.broker.retained
        if message is not None and retained.set(message):
            self.retained(message)
        else:
            retained.remove(topic_name)
            self.retained_gone(topic_name)
        self.broker.metrics.retained_messages = len(retained)

    # The store's answers; whoever calls flushes behind

    def take(self) -> Batch:
        """Hand out what is to be committed next."""
        broker, journal = self.broker, self.journal
        batch = journal.take()
        self._brings_messages = batch.brings_messages
        self._rows = len(batch.deliveries) + len(batch.moves) + len(batch.done)
        if id(journal) in broker.stopped:
            broker.resume_publishers(journal)
        return batch

    def committed(self, now: float) -> None:
        """The batch that was taken is on disk: send what waited for it."""
        broker, journal = self.broker, self.journal
        if self.outage_since is not None and self._brings_messages:
            broker.emit(OutageEnded(at=now + broker.wall_offset, system="store", duration=now - self.outage_since))
            self.outage_since = None
        broker.metrics.store_commits += 1
        broker.metrics.store_rows += self._rows
        outboxes = journal.committed()
        self.retained_changes.committed(journal.safe)
        for outbox in outboxes:
            while outbox.held and outbox.held[0].number <= journal.done_number:
                self._release(outbox, outbox.held.pop(0))
        broker.call_inside()

    def _release(self, outbox: Outbox, held: Held) -> None:
        session = outbox.session
        if session is None:
            return  # the connection is gone, its client asks again
        outbox.held_acks -= sum(type(answer) is tuple and answer[0] == 1 for answer in held.acks)
        outbox.held_size -= sum(map(len, held.publishes.values()))
        frames = held.release()
        if frames:
            outbox.put(frames)
            self.broker.metrics.packets_sent += len(held.acks) + len(held.frames) + len(held.replies)
        if session.link is not None:
            self.broker.unstall(session.link)

    def failed(self, batch: Batch, reason: str, now: float) -> None:
        """The batch that was taken could not be kept: it comes again. Publishers learn now that their messages are not
        kept, everything else waits."""
        broker = self.broker
        if self.outage_since is None:
            self.outage_since = now
            broker.emit(OutageBegan(at=now + broker.wall_offset, system="store", reason=reason))
        broker.metrics.store_failures += 1
        outboxes = self.journal.failed(batch, reason)
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
            for held in outbox.held:
                replies, held.replies = held.replies, []
                if replies and outbox.session is not None:
                    outbox.put(b"".join(replies))
                    broker.metrics.packets_sent += len(replies)
            # Behind all of its answers: what it sent meanwhile is answered after them.
            if outbox.session is not None and outbox.session.link is not None:
                broker.unstall(outbox.session.link)

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
            self.freed(publisher, packet_id)

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
        if (change := self.retained_changes.withdraw(number)) is not None:
            self._restore_retained(*change)
        while (later := self.journal.renumbered.get(abs(number))) is not None:
            number = later
        if abs(number) in self.journal.gated:
            self._withdraw_gated(abs(number))
            return
        row = self.journal.batch.deliveries.get(number)
        if row is None:
            return
        owner, packet_id = row[1], row[2]
        session, group = self.sessions.get(owner), self.groups.get(owner)
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
