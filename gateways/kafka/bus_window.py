"""How much of the bus may wait for Kafka, and what happens beyond it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

import attrs

from mqtt_trio.gateway import Answer, Hold, ReasonCode, Refused

log = logging.getLogger("gateways.kafka.bus")

HARD: Final = 2
"""Times the window at which publishers stop altogether."""
REFUSE: Final = 4
"""Times the window at which nothing more is taken: what was on its way when publishers stopped has room before."""


@attrs.define
class Waiting:
    """A message that was taken beyond the window."""

    hold: Hold
    messages: int
    size: int


class BusWindow:
    """Messages and bytes that wait or are on their way, for one producer. Trio thread only.

    Inside the window everything is taken. Beyond it QoS 0 is dropped and counted, in messages; QoS 1 and 2 are taken
    and acknowledged in order when there is room. At twice the window `stop` is called, back inside it `resume`. At four
    times the window QoS 1 and 2 are refused (only publishers inside the process can come so far).
    """

    def __init__(self, messages: int, size: int, *, stop: Callable[[], None], resume: Callable[[], None]) -> None:
        """`messages`, `size` (bytes): the window."""
        self.max_messages = messages
        self.max_size = size
        self.messages = 0
        self.size = 0
        self.dropped = 0
        self.held = 0
        self.refused = 0
        self.stops = 0
        self._stop = stop
        self._resume = resume
        self._stopped = False
        self._waiting: deque[Waiting] = deque()
        self._waiting_messages = 0
        self._waiting_size = 0

    @property
    def full(self) -> bool:
        """The window is reached."""
        return self.messages >= self.max_messages or self.size >= self.max_size

    def add(self, messages: int, size: int) -> None:
        """Messages were taken inside the window."""
        self.messages += messages
        self.size += size

    def beyond(self, qos: int, messages: int, size: int) -> Answer:
        """Say what becomes of messages that find the window full: a Hold, they are taken and counted; otherwise they
        are not taken: None, dropped (QoS 0); Refused."""
        if qos == 0:
            self.dropped += messages
            return None
        if self.messages >= REFUSE * self.max_messages or self.size >= REFUSE * self.max_size:
            self.refused += messages
            return Refused(ReasonCode.QUOTA_EXCEEDED)
        self.messages += messages
        self.size += size
        self.held += messages
        hold = Hold()
        self._waiting.append(Waiting(hold, messages, size))
        self._waiting_messages += messages
        self._waiting_size += size
        if not self._stopped and (self.messages >= HARD * self.max_messages or self.size >= HARD * self.max_size):
            self._stopped = True
            self.stops += 1
            log.warning(
                "%d messages (%d bytes) wait for Kafka: publishers of QoS 1 and 2 wait", self.messages, self.size
            )
            self._stop()
        return hold

    def settle(self, messages: int, size: int) -> None:
        """Messages need no room any more: let as many acknowledgements go as fit into the window now, in order."""
        self.messages -= messages
        self.size -= size
        waiting = self._waiting
        while waiting:
            first = waiting[0]
            inside = self.messages - self._waiting_messages
            inside_size = self.size - self._waiting_size
            if inside > 0 and (inside + first.messages > self.max_messages or inside_size + first.size > self.max_size):
                return  # and the window is still full: publishers stay stopped
            waiting.popleft()
            self._waiting_messages -= first.messages
            self._waiting_size -= first.size
            first.hold.release()
        if self._stopped and not self.full:
            self._stopped = False
            self._resume()

    def release_all(self) -> None:
        """Let all acknowledgements go: the bus ends, and with `Ack = "none"` they say what this node keeps [K22]."""
        while self._waiting:
            self._waiting.popleft().hold.release()
        self._waiting_messages = self._waiting_size = 0
        if self._stopped:
            self._stopped = False
            self._resume()
