"""Shared Subscriptions [MQTT5-4.8.2]: groups of sessions, each message to one of them.

A group is one subscriber of the router, under the filter behind its share name. A message goes to the next member, in
turn, that can take it at once: online, nothing of its own waiting, a free slot in its window, room in its outbox, the
right to the topic, a Maximum Packet Size that holds the message. When nobody can, a QoS 0 message is dropped, and
others wait in the queue of the group, within the bounds of a session's queue, for the first member that can. So nothing
waits behind a slow, frozen or absent member. Where members differ in rights or sizes, a member passes over the first
PASSED_OVER messages that are not for it.

What a member has been sent at QoS 1 and not acknowledged goes back to the front of the queue when its connection ends
while another member is there, or when its session ends. At QoS 2 a delivery that has begun stays with its member:
completed when it returns [MQTT5-4.8.2-4], given up with its session [MQTT5-4.8.2-5].

Where a gateway joins nodes, a group may have members on several of them: a `Spread` knows on which one a message is to
be delivered, and takes what waits where no member is connected to a node that has some [K23].
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from mqtt_trio.broker.journal import RETAIN, frame_of
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.queues import MessageQueue
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Delivery, Session
from mqtt_trio.broker.spread import Spread
from mqtt_trio.protocol.topics import split_shared
from mqtt_trio.protocol.wire import MAXIMUM_POSSIBLE_PACKET_SIZE

PASSED_OVER: Final = 1000
"""Messages of a group's queue that a member which may not have them, or for which they are too large, looks behind."""
IDENTIFIER: Final = 8
"""Bytes by which a copy may be larger than the message: a Subscription Identifier, longer lengths."""

if TYPE_CHECKING:
    from mqtt_trio.broker.audience import Audience
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.delivery import Encodings
    from mqtt_trio.broker.outbox import Outbox


class ShareGroup:
    """All sessions with the same `$share/NAME/FILTER`."""

    __slots__ = ("audiences", "members", "name", "number", "owing", "queue", "topic_filter", "turns")

    def __init__(self, name: str) -> None:
        self.name = name
        """`$share/NAME/FILTER`, as it stands in SUBSCRIBE."""
        self.topic_filter = split_shared(name)[1]
        self.members: dict[Session, SubscriptionOptions] = {}
        self.turns: deque[Session] = deque()
        """The members that are connected, the one whose turn it is first."""
        self.owing: dict[Session, None] = {}
        """Members that are away and have not acknowledged messages of the group."""
        self.number = 0
        """In the store; 0: no member's session is kept."""
        self.queue = MessageQueue()
        """What no member could take yet."""
        self.audiences: set[Audience] = set()
        """Route cache entries that name this group."""

    def own_queue(self) -> MessageQueue:
        """Return the queue to add to."""
        return self.queue

    def forget_routes(self) -> None:
        """Invalidate every route that names this group."""
        for audience in list(self.audiences):
            audience.invalidate()


class Shares:
    """All share groups of the node."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.groups: dict[str, ShareGroup] = {}
        self.spread: Spread | None = None
        """What knows of members on other nodes."""

    # Members

    def join(self, session: Session, options: SubscriptionOptions) -> None:
        """Make `session` a member of a group, or replace its options; `arrived` has it served."""
        group = self.groups.get(options.topic_filter)
        if group is None:
            group = self.groups[options.topic_filter] = ShareGroup(options.topic_filter)
            self.broker.router.subscribe(group.topic_filter, group, options)
        if session not in group.members:
            if session.outbox is not None:
                group.turns.append(session)
            session.shares[group.name] = group
            self.broker.metrics.shared_subscriptions += 1
        group.members[session] = options
        self.broker.keeper.joined(group, session)
        self._changed(group)

    def leave(self, session: Session, name: str) -> None:
        """End a membership; the group ends with its last member. What the member was sent stays with it."""
        group = session.shares.pop(name)
        for packet_id, entry in session.inflight.items():
            if isinstance(entry, Delivery) and entry.group is group:
                entry.group = None
                self._keep_alone(session, packet_id, entry)
        del group.members[session]
        group.owing.pop(session, None)
        if session in group.turns:
            group.turns.remove(session)
        metrics = self.broker.metrics
        metrics.shared_subscriptions -= 1
        if group.members:
            self._changed(group)
            return
        if self.spread is not None:
            self.spread.ended(name)
        del self.groups[name]
        self.broker.router.unsubscribe(group.topic_filter, group)
        group.forget_routes()
        if group.number:
            self.broker.keeper.group_ended(group)
        dropped = group.queue.drop_all()
        metrics.messages_queued -= dropped
        metrics.dropped_session_ended += dropped

    def restore(self, group: ShareGroup, options: SubscriptionOptions) -> None:
        """Take over a group that the store had; its members join."""
        self.groups[group.name] = group
        self.broker.keeper.groups[group.number] = group
        self.broker.router.subscribe(group.topic_filter, group, options)

    def arrived(self, session: Session, now: float) -> None:
        """A member is here: it may have what waits, and what members that are away have not acknowledged."""
        for group in session.shares.values():
            if session not in group.turns:
                group.turns.append(session)
            group.owing.pop(session, None)
            for member in list(group.owing):
                self._give_back(member, group)
            self._changed(group)
        self.broker.sender.pump(session, now)

    def left(self, session: Session, now: float) -> None:
        """The connection of a member ended: others that are here get what it has not acknowledged."""
        for group in session.shares.values():
            if session in group.turns:
                group.turns.remove(session)
            group.owing[session] = None
            if group.turns:
                self._give_back(session, group)
                self._serve(group, now)
            self._changed(group)

    def ended(self, session: Session, now: float) -> None:
        """A session is at its end: others get what it has not acknowledged, here or not."""
        for group in list(session.shares.values()):
            self._give_back(session, group)
            self.leave(session, group.name)
            self._serve(group, now)

    def _give_back(self, session: Session, group: ShareGroup) -> None:
        """Put the unacknowledged QoS 1 messages of a member that is away back into the queue, in their order."""
        group.owing.pop(session, None)
        inflight = session.inflight
        mine = [
            packet_id
            for packet_id, entry in inflight.items()
            if isinstance(entry, Delivery) and entry.group is group and entry.qos == 1
        ]
        if not mine:
            return
        back: list[Delivery] = []
        for packet_id in mine:
            entry = inflight.pop(packet_id)
            assert isinstance(entry, Delivery)
            session.resending.pop(packet_id, None)
            back.append(Delivery(entry.message, entry.message.qos, group=group, number=entry.number))
        group.queue.put_back(back)
        self.broker.metrics.messages_queued += len(back)

    def _serve(self, group: ShareGroup, now: float) -> None:
        """Let members have what waits, until it is gone or nobody can take more."""
        for _ in range(len(group.turns)):
            if not group.queue:
                return
            session = group.turns[0]
            group.turns.rotate(-1)
            self.broker.sender.pump(session, now)

    # Groups that span nodes

    def spread_over(self, spread: Spread) -> None:
        """Ask `spread` from now on whether a message is for the members here, and tell it who is here."""
        self.spread = spread
        for group in self.groups.values():
            self._changed(group)

    def _changed(self, group: ShareGroup) -> None:
        if self.spread is not None:
            ready = len(group.turns)
            waits = not ready and any(options.qos for options in group.members.values())
            self.spread.changed(group.name, ready, waits=waits, kept=group.number != 0)

    def take_waiting(self, name: str, *, ends: bool = False) -> list[Message]:
        """Give away what waits for a group of which no member is connected, in order: the caller has members elsewhere
        get it, and notes that in the batch of the store that is being filled. What may still be taken back from its
        publisher stays for now, unless the group `ends`."""
        group, journal = self.groups.get(name), self.broker.journal
        if group is None or (group.turns and not ends) or (journal.failing is not None and not ends):
            return []
        for member in list(group.owing):
            self._give_back(member, group)
        taken: list[Message] = []
        while group.queue and (ends or 0 <= group.queue[0].number <= journal.safe):
            delivery = self._taken(group.queue, 0)
            if delivery.number:
                journal.done(delivery.number)
            taken.append(delivery.message)
        return taken

    # Messages

    def deliver(self, group: ShareGroup, message: Message, encodings: Encodings, now: float) -> None:
        """Send a message to the member whose turn it is, or have it wait; unless it is for a member elsewhere."""
        if self.spread is None or self.spread.serves(group.name, message):
            self.hand_out(group, message, encodings, now)

    def hand_out(self, group: ShareGroup, message: Message, encodings: Encodings, now: float) -> None:
        """Send a message to the member whose turn it is here, or have it wait."""
        if message.qos and group.queue and not self._differ(group):
            self._wait(group, message, now)  # who could take it would have taken what waits
            return
        for _ in range(len(group.turns)):
            session = group.turns[0]
            group.turns.rotate(-1)
            if self._can_take(session, group.members[session], message):
                self._send(group, session, message, encodings, now)
                return
        self._nobody_can(group, message, now)

    def _can_take(self, session: Session, options: SubscriptionOptions, message: Message) -> bool:
        outbox = session.outbox
        if outbox is None or not self._may_have(session, message):
            return False
        if not self._fits(message, outbox):
            return False
        if min(message.qos, options.qos) == 0:
            return outbox.room >= message.size
        return session.can_take_now

    def _differ(self, group: ShareGroup) -> bool:
        """Whether a message may be for some members only."""
        return self.broker.sender.may_receive is not None or any(
            session.outbox is not None and session.outbox.maximum_packet_size < MAXIMUM_POSSIBLE_PACKET_SIZE
            for session in group.turns
        )

    @staticmethod
    def _fits(message: Message, outbox: Outbox) -> bool:
        """Whether the client accepts a packet of that size, whatever else its copy holds."""
        maximum = outbox.maximum_packet_size
        return maximum >= MAXIMUM_POSSIBLE_PACKET_SIZE or len(frame_of(message)) + IDENTIFIER <= maximum

    def _may_have(self, session: Session, message: Message) -> bool:
        may_receive = self.broker.sender.may_receive
        return may_receive is None or may_receive(session, message.topic_name)

    def _send(
        self, group: ShareGroup, session: Session, message: Message, encodings: Encodings, now: float, number: int = 0
    ) -> None:
        options = group.members[session]
        identifier = options.subscription_identifier
        delivery = Delivery(
            message,
            min(message.qos, options.qos),  # [MQTT5-4.8.2-3]
            message.retain and options.retain_as_published,
            () if identifier is None else (identifier,),
            group,
            number,
        )
        if number and not delivery.qos:
            self.broker.journal.done(number)
        self.broker.sender.send(session, delivery, encodings, now)

    def _nobody_can(self, group: ShareGroup, message: Message, now: float) -> None:
        """No member takes a message at once: it waits for one that will, or is dropped and counted."""
        sender = self.broker.sender
        reason = self._never(group, message)
        if reason is not None:
            sender.dropped(reason, None, message, now)
        elif message.qos and any(options.qos for options in group.members.values()):
            self._wait(group, message, now)
        elif group.turns:
            sender.dropped("outbox_full", None, message, now)
        # At QoS 0 nobody is owed a message while all are away.

    def _never(self, group: ShareGroup, message: Message) -> str | None:
        """Why no member of today can ever take a message, or None."""
        reason = "not_authorized"
        for session in group.members:
            if self._may_have(session, message):
                if session.outbox is None or self._fits(message, session.outbox):
                    return None
                reason = "too_large"
        return reason

    def _wait(self, group: ShareGroup, message: Message, now: float) -> None:
        sender = self.broker.sender
        sender.enqueue(Delivery(message, message.qos, group=group), group, now)
        for session in group.turns:
            outbox = session.outbox
            if outbox is not None and outbox.room <= outbox.held_size:
                outbox.starved = True

    def pull(self, session: Session, now: float) -> None:
        """A member may be able to take more: let it have what waits in its groups."""
        for group in session.shares.values():
            queue, at = group.queue, 0
            while at < min(len(queue), PASSED_OVER) and (outbox := session.outbox) is not None:
                message = queue[at].message
                if self._can_take(session, group.members[session], message):
                    self._send(group, session, message, {}, now, self._taken(queue, at).number)
                elif (reason := self._never(group, message)) is not None:
                    if number := self._taken(queue, at).number:
                        self.broker.journal.done(number)
                    self.broker.sender.dropped(reason, None, message, now)
                elif not session.can_take_now:
                    outbox.starved = outbox.starved or outbox.room <= outbox.held_size
                    break
                else:
                    at += 1

    def _taken(self, queue: MessageQueue, at: int) -> Delivery:
        self.broker.metrics.messages_queued -= 1
        return queue.take_at(at)

    def _keep_alone(self, session: Session, packet_id: int, entry: Delivery) -> None:
        """What a member was sent at QoS 1 is its own from now on, no more its group's."""
        if not entry.number or entry.qos != 1:
            return
        journal = self.broker.journal
        if session.number:
            journal.move(entry.number, session.number, packet_id, entry.qos | RETAIN * entry.retain)
        else:
            journal.done(entry.number)
            entry.number = 0
