"""What waits for a session or a share group: messages within [Limits] QueueMessages and QueueBytes, retained bursts."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Final

import attrs

from mqtt_trio.broker.message import Message

if TYPE_CHECKING:
    from mqtt_trio.broker.limits import Limits
    from mqtt_trio.broker.router import SubscriptionOptions
    from mqtt_trio.broker.session import Delivery

NEVER = float("inf")


class MessageQueue(deque["Delivery"]):
    """A deque, so that the hot loops ask at C speed whether something waits, which knows its size. Only these methods
    change it."""

    __slots__ = ("added", "expires_at", "size")

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        """Bytes of all messages, as `Message.size` counts."""
        self.added = 0
        """Deliveries that ever came; the next one gets this plus 1 as its `turn`."""
        self.expires_at = NEVER
        """UTC seconds at which the first one expires, or a little earlier."""

    def add(self, delivery: Delivery, limits: Limits, utc: float) -> tuple[list[Delivery], list[Delivery]]:
        """Append within the bounds. Returns what made room because it had expired by `utc` [MQTT5-3.3.2-5], and what
        the bounds pushed out: nothing, older ones, or `delivery` itself."""
        size = delivery.message.size
        if size > limits.queue_bytes or limits.queue_messages == 0:
            return [], [delivery]
        expired: list[Delivery] = []
        dropped: list[Delivery] = []
        while len(self) >= limits.queue_messages or self.size + size > limits.queue_bytes:
            if self.expires_at <= utc:
                expired += self._drop_expired(utc)
            elif limits.queue_overflow == "drop-new":
                return expired, [delivery]
            else:
                dropped.append(self.take())
        self.put_last(delivery)
        return expired, dropped

    def _drop_expired(self, utc: float) -> list[Delivery]:
        """Remove what has expired; say so of the rest by `expires_at`, so that it is not looked through again."""
        expired, kept = [], []
        self.expires_at = NEVER
        for delivery in self:
            at = delivery.message.expires_at
            if at is not None and at <= utc:
                expired.append(delivery)
                self.size -= delivery.message.size
            else:
                kept.append(delivery)
                self.expires_at = min(self.expires_at, NEVER if at is None else at)
        self.clear()
        self.extend(kept)
        return expired

    def put_last(self, delivery: Delivery) -> None:
        """Append without asking for the bounds."""
        self.append(delivery)
        self.size += delivery.message.size
        self.added += 1
        delivery.turn = self.added
        if (at := delivery.message.expires_at) is not None:
            self.expires_at = min(self.expires_at, at)

    def take(self) -> Delivery:
        """Remove and return the oldest one."""
        delivery = self.popleft()
        self.size -= delivery.message.size
        return delivery

    def take_at(self, at: int) -> Delivery:
        """Remove and return the one at a place."""
        delivery = self[at]
        del self[at]
        self.size -= delivery.message.size
        return delivery

    def put_back(self, deliveries: Iterable[Delivery]) -> None:
        """Put deliveries in front, in their order; they were in the queue before, so no bound is asked."""
        back = list(deliveries)
        self.extendleft(reversed(back))
        self.size += sum(delivery.message.size for delivery in back)
        for delivery in back:
            if (at := delivery.message.expires_at) is not None:
                self.expires_at = min(self.expires_at, at)

    def withdraw(self, numbers: Container[int]) -> int:
        """Remove the deliveries with these numbers of their rows in the store; return how many there were."""
        kept = [delivery for delivery in self if delivery.number not in numbers]
        count = len(self) - len(kept)
        self.clear()
        self.extend(kept)
        self.size = sum(delivery.message.size for delivery in kept)
        return count

    def drop_all(self) -> int:
        """Empty the queue; return how many messages that were."""
        count = len(self)
        self.clear()
        self.size = 0
        self.expires_at = NEVER
        return count


class _NothingWaits(MessageQueue):
    __slots__ = ()

    def put_last(self, delivery: Delivery) -> None:
        raise TypeError("a queue of its own is needed first")

    def put_back(self, deliveries: Iterable[Delivery]) -> None:
        raise TypeError("a queue of its own is needed first")


NOTHING_WAITS: Final = _NothingWaits()
"""The queue of every session for which nothing has waited yet. An empty deque takes 0.8 KiB, a tenth of what an idle
connection may cost."""


@attrs.define(eq=False)
class Burst:
    """The retained messages for one subscription."""

    options: SubscriptionOptions
    behind: int
    """`Delivery.turn` of the last message that was in the session's queue before: they go first."""
    unacknowledged: list[Message] = attrs.Factory(list)
    """What goes out at QoS 0, the next one last."""
    acknowledged: list[Message] = attrs.Factory(list)
    """What goes out at QoS 1 and 2, the next one last."""


class BurstQueue(list[Burst]):
    """The bursts of one session; the first `opened` ones have looked for their messages."""

    __slots__ = ("left", "opened", "unacknowledged")

    def __init__(self) -> None:
        super().__init__()
        self.opened = 0
        self.left = 0
        """Messages of all that are opened."""
        self.unacknowledged = 0
        """Those of them that go out at QoS 0."""
