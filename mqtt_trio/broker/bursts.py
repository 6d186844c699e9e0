"""Retained messages on their way to new subscriptions: a burst each, which goes out as fast as its client takes it.

Nothing of a burst waits in outbox or queue, so neither bound cuts it off: what has no room yet stays with the retained
store. At QoS 1 and 2, messages that come meanwhile queue behind it, so that a client sees the retained message of a
topic before what was published after it. At QoS 0 they do not wait; instead the burst leaves out what they replaced.

A burst is work for others to wait for, so it goes in steps: a step looks through NODES of the retained store and puts
BYTES_AHEAD into the outbox, then everybody else gets their turn (`Broker.defer`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.queues import Burst
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Delivery, Session

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.outbox import Outbox

BYTES_AHEAD: Final = 262_144
"""Bytes of frames that bursts put into an outbox in one step."""
NODES: Final = 20_000
"""Nodes of the retained store that one step looks at before it leaves the next subscription to another step: some
milliseconds. One search is not cut."""
OPEN_MESSAGES: Final = 100_000
"""Messages of unfinished bursts of one session from where on the next ones look for theirs when it is their turn, so
that a client with many subscriptions cannot hold as many lists."""


class Bursts:
    """Sends bursts. They belong to their session and go on when it is resumed."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    @staticmethod
    def begin(session: Session, options: SubscriptionOptions) -> None:
        """Add the burst for a subscription; `Sender.pump` sends it."""
        session.bursts.append(Burst(options, session.queue.added))

    @staticmethod
    def cancel(session: Session, topic_filter: str) -> None:
        """Forget the bursts for a filter that was unsubscribed or subscribed again [MQTT5-3.10.4-2]; what has left has
        left."""
        bursts = session.bursts
        for burst in [burst for burst in bursts if burst.options.topic_filter == topic_filter]:
            at = bursts.index(burst)
            del bursts[at]
            if at < bursts.opened:
                bursts.opened -= 1
                bursts.left -= len(burst.unacknowledged) + len(burst.acknowledged)
                bursts.unacknowledged -= len(burst.unacknowledged)

    def advance(self, session: Session, outbox: Outbox, now: float) -> bool:
        """Open what comes next and send what goes out at QoS 0, whatever waits at QoS 1 and 2; False when there is more
        of it than a step may send."""
        bursts = session.bursts
        retained = self.broker.retained
        visited = 0
        while bursts.opened < len(bursts) and bursts.left < OPEN_MESSAGES:
            if visited >= NODES:
                self.broker.defer(session)
                break
            before = retained.visited
            self._open(session, bursts[bursts.opened], now)
            visited += retained.visited - before
        return not bursts.unacknowledged or self._send_unacknowledged(session, outbox, now)

    def _open(self, session: Session, burst: Burst, now: float) -> None:
        """Look for the messages that the client may have."""
        broker, bursts = self.broker, session.bursts
        may_receive = broker.sender.may_receive
        for message in reversed(broker.retained.match(burst.options.topic_filter, now + broker.wall_offset)):
            if may_receive is None or may_receive(session, message.topic_name):
                qos = min(message.qos, burst.options.qos)
                (burst.acknowledged if qos else burst.unacknowledged).append(message)
        found = len(burst.unacknowledged) + len(burst.acknowledged)
        if not found:
            del bursts[bursts.opened]
            return
        bursts.opened += 1
        bursts.left += found
        bursts.unacknowledged += len(burst.unacknowledged)

    def _send_unacknowledged(self, session: Session, outbox: Outbox, now: float) -> bool:
        sender, retained, bursts = self.broker.sender, self.broker.retained, session.bursts
        for burst in list(bursts):
            messages = burst.unacknowledged
            while messages:
                if outbox.limit - outbox.room >= BYTES_AHEAD:
                    return False
                message = messages[-1]
                if (
                    retained.get(message.topic_name) is message
                    and not sender.revoked(session, message, now)
                    and not sender.send_next(session, outbox, self._delivery(message, burst.options), now)
                ):
                    return False
                messages.pop()
                bursts.left -= 1
                bursts.unacknowledged -= 1
            if not burst.acknowledged and burst in bursts:
                bursts.remove(burst)
                bursts.opened -= 1
            if not bursts.unacknowledged:
                break
        return True

    def send_acknowledged(self, session: Session, outbox: Outbox, now: float) -> bool:
        """Send what goes out at QoS 1 and 2 of the first burst; False when window, outbox or step do not take all."""
        bursts, sender = session.bursts, self.broker.sender
        if not bursts.opened:
            self.broker.defer(session)
            return False
        burst = bursts[0]
        messages = burst.acknowledged
        while messages:
            if len(session.inflight) >= session.send_maximum:
                return False
            if outbox.limit - outbox.room >= BYTES_AHEAD:
                outbox.starved = True
                return False
            message = messages.pop()
            bursts.left -= 1
            if not sender.revoked(session, message, now):
                sender.send_next(session, outbox, self._delivery(message, burst.options), now)
        if burst.unacknowledged:
            return False
        del bursts[0]
        bursts.opened -= 1
        return True

    @staticmethod
    def _delivery(message: Message, options: SubscriptionOptions) -> Delivery:
        identifier = options.subscription_identifier
        identifiers = () if identifier is None else (identifier,)
        return Delivery(message, min(message.qos, options.qos), True, identifiers)  # [MQTT5-3.3.1-8]
