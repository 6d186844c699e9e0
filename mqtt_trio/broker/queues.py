"""Messages that wait for a session or a share group, in order, within [Limits] QueueMessages and QueueBytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqtt_trio.broker.limits import Limits
    from mqtt_trio.broker.session import Delivery


class MessageQueue(deque["Delivery"]):
    """A deque, so that the hot loops ask at C speed whether something waits, which knows its size. Only these methods
    change it."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        """Bytes of all messages, as `Message.size` counts."""

    def add(self, delivery: Delivery, limits: Limits) -> list[Delivery]:
        """Append within the bounds; return what they pushed out: nothing, older ones, or `delivery` itself."""
        size = delivery.message.size
        if size > limits.queue_bytes or limits.queue_messages == 0:
            return [delivery]
        dropped: list[Delivery] = []
        while len(self) >= limits.queue_messages or self.size + size > limits.queue_bytes:
            if limits.queue_overflow == "drop-new":
                return [delivery]
            dropped.append(self.take())
        self.append(delivery)
        self.size += size
        return dropped

    def put_last(self, delivery: Delivery) -> None:
        """Append a delivery that was in the queue when the process ended; no bound is asked."""
        self.append(delivery)
        self.size += delivery.message.size

    def take(self) -> Delivery:
        """Remove and return the oldest one."""
        delivery = self.popleft()
        self.size -= delivery.message.size
        return delivery

    def put_back(self, deliveries: Iterable[Delivery]) -> None:
        """Put deliveries in front, in their order; they were in the queue before, so no bound is asked."""
        back = list(deliveries)
        self.extendleft(reversed(back))
        self.size += sum(delivery.message.size for delivery in back)

    def withdraw(self, number: int) -> bool:
        """Remove the delivery with this number of its row in the store, one of the newest; say whether it was there."""
        for at in range(len(self) - 1, -1, -1):
            delivery = self[at]
            if delivery.number == number:
                del self[at]
                self.size -= delivery.message.size
                return True
            if 0 < delivery.number < number:
                return False
        return False

    def drop_all(self) -> int:
        """Empty the queue; return how many messages that were."""
        count = len(self)
        self.clear()
        self.size = 0
        return count
