"""What of the broker the store has (sessions, groups, subscriptions, retained messages), and the store's answers."""

from __future__ import annotations

from heapq import merge
from typing import TYPE_CHECKING

from mqtt_trio.broker.events import OutageBegan, OutageEnded
from mqtt_trio.broker.journal import ROW_SIZE, Held, frame_of
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.queues import MessageQueue
from mqtt_trio.broker.retained_changes import RetainedChanges
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Delivery, Session, number_of
from mqtt_trio.broker.shares import ShareGroup
from mqtt_trio.broker.store import Batch
from mqtt_trio.broker.withdrawal import Withdrawal
from mqtt_trio.protocol.topics import is_system_topic

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.outbox import Outbox


class Keeper:
    """Keeps the journal of one broker true, and does what follows from the store's answers. Where the journal keeps
    nothing, no session and no group gets a number, and nothing here is called."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.journal = broker.journal
        self.sessions: dict[int, Session] = {}
        self.groups: dict[int, ShareGroup] = {}
        self.withdrawal = Withdrawal(broker, self)
        self.retained_changes = RetainedChanges()
        self.left_out: set[str] = set()
        """Topics of retained messages in the store for which [Limits] left no room at the start, as long as it has
        these."""
        self.outage_since: float | None = None
        """Monotonic instant of the first of the commits that failed, until one with messages succeeds. A store without
        space goes on taking what needs none: that is no end of the outage, it only lets the next message try."""
        self._brings_messages = False
        """Whether the batch that is out does."""
        self._rows = 0
        """Rows of messages in it."""
        self._replaced: set[str] = set()
        """Topics of its retained messages, where some were left out."""

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
        before = session.received_kept.get(packet_id)
        if before == -value:  # one row for each, or it would be in use for ever once this one is freed
            self.journal.batch.received[session.number, before] = False
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
        self.journal.take_number()  # the publisher's answer waits for it
        self.journal.dirty = True

    def retained_gone(self, topic_name: str) -> None:
        """A retained message was removed, has expired, or had to go; or may be in the store alone."""
        if self.journal.keeps and not is_system_topic(topic_name):
            self.journal.batch.retained[topic_name] = None
            self.journal.size += ROW_SIZE
            self.journal.take_number()
            self.journal.dirty = True

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

    def restore_retained(self, topic_name: str, message: Message | None) -> None:
        """A change was taken back: make what held before hold again."""
        retained = self.broker.retained
        if message is not None and retained.set(message):
            self.retained(message)
        elif topic_name in self.left_out:
            retained.remove(topic_name)
            self.journal.batch.retained.pop(topic_name, None)  # the store has another one
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
        if self.left_out:
            self._replaced = set(batch.retained)
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
        self.left_out -= self._replaced
        self._replaced = set()
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
        self.withdrawal.run(outboxes, reason, now)
