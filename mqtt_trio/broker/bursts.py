"""Retained messages on their way to a new subscription: a burst that goes out as fast as its client takes it.

Nothing of a burst waits in outbox or queue, so neither bound cuts it off: what has no room yet stays with the retained
store. At QoS 1 and 2, messages that come meanwhile queue behind it, so that a client sees the retained message of a
topic before what was published after it. At QoS 0 they do not wait; instead the burst leaves out what they replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Delivery, Session

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.outbox import Outbox

BYTES_AHEAD: Final = 262_144
"""Bytes of frames that a burst puts into an outbox before it waits until they have left: other clients get their turn,
and a client with a small window is not sent what it cannot read."""


OPEN_MESSAGES: Final = 100_000
"""Messages of unfinished bursts of one session from where on the next ones look for theirs when it is their turn, so
that a client with many subscriptions cannot hold as many lists."""


@attrs.define(eq=False)
class Burst:
    """The retained messages for one subscription."""

    options: SubscriptionOptions
    behind: int
    """Deliveries of the session's queue that go first: they were there before."""
    opened: bool = False
    """Whether the messages were looked for."""
    unacknowledged: list[Message] = attrs.Factory(list)
    """What goes out at QoS 0, the next one last."""
    acknowledged: list[Message] = attrs.Factory(list)
    """What goes out at QoS 1 and 2, the next one last."""


class Bursts:
    """Sends bursts. They belong to their session and go on when it is resumed."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def begin(self, session: Session, options: SubscriptionOptions, now: float) -> None:
        """Send the burst for a subscription, or what can be sent of it now."""
        self.cancel(session, options.topic_filter)
        bursts = session.bursts
        burst = Burst(options, len(session.queue) - sum(burst.behind for burst in bursts))
        if sum(len(burst.unacknowledged) + len(burst.acknowledged) for burst in bursts) < OPEN_MESSAGES:
            self._open(burst, session, now)
        bursts.append(burst)
        self.broker.sender.pump(session, now)

    @staticmethod
    def cancel(session: Session, topic_filter: str) -> None:
        """Forget the burst for a filter that was unsubscribed or subscribed again, unless it has begun."""
        for burst in session.bursts:
            if not burst.opened and burst.options.topic_filter == topic_filter:
                session.bursts.remove(burst)
                return

    def _open(self, burst: Burst, session: Session, now: float) -> None:
        """Look for the messages that the client may have."""
        broker = self.broker
        may_receive = broker.sender.may_receive
        burst.opened = True
        for message in reversed(broker.retained.match(burst.options.topic_filter, now + broker.wall_offset)):
            if may_receive is None or may_receive(session, message.topic_name):
                qos = min(message.qos, burst.options.qos)
                (burst.acknowledged if qos else burst.unacknowledged).append(message)

    def send_unacknowledged(self, session: Session, outbox: Outbox, now: float) -> bool:
        """Send what goes out at QoS 0, of every burst, whatever waits; False when the outbox does not take all."""
        sender, retained = self.broker.sender, self.broker.retained
        for burst in session.bursts:
            messages = burst.unacknowledged
            while messages:
                if outbox.limit - outbox.room >= BYTES_AHEAD:
                    return False
                message = messages[-1]
                if retained.get(message.topic_name) is message and not sender.send_next(
                    session, outbox, self._delivery(message, burst.options), now
                ):
                    return False
                messages.pop()
        return True

    def send_acknowledged(self, session: Session, outbox: Outbox, now: float) -> bool:
        """Send what goes out at QoS 1 and 2 of the first burst; False when window or outbox do not take all."""
        burst = session.bursts[0]
        if not burst.opened:
            self._open(burst, session, now)
            if not self.send_unacknowledged(session, outbox, now):
                outbox.starved = True
                return False
        messages = burst.acknowledged
        while messages:
            if len(session.inflight) >= session.send_maximum:
                return False
            if outbox.limit - outbox.room >= BYTES_AHEAD:
                outbox.starved = True
                return False
            self.broker.sender.send_next(session, outbox, self._delivery(messages.pop(), burst.options), now)
        if not burst.unacknowledged:
            session.bursts.popleft()
        return not burst.unacknowledged

    @staticmethod
    def _delivery(message: Message, options: SubscriptionOptions) -> Delivery:
        identifier = options.subscription_identifier
        identifiers = () if identifier is None else (identifier,)
        return Delivery(message, min(message.qos, options.qos), True, identifiers)  # [MQTT5-3.3.1-8]
