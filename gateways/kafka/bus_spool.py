"""The way of the bus over the disk: while Kafka is away, or slow, records go through a spool [K22].

Those that are on their way when that begins are written as well, in front of what comes: the next process sends them
again should this one never hear of them. Behind the outage the spool is read and sent in order, and new records queue
behind it until it is empty.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

import trio

from gateways.kafka.bus_answers import BusAnswers
from gateways.kafka.bus_outgoing import Outgoing
from gateways.kafka.bus_window import HARD, BusWindow
from mqtt_trio.gateway import Spool, SpoolRecord

log = logging.getLogger("gateways.kafka.bus")

DRAIN_BYTES: Final = 4 * 1024 * 1024
"""Bytes that were read from the spool and are not confirmed; beyond them the rest stays on disk."""


class Outlet(Protocol):
    """What the spool uses of the outbox that it belongs to: the way to Kafka."""

    @property
    def flights(self) -> Mapping[Outgoing, None]:
        """Records that were offered to Kafka and are not over, in their order."""
        ...

    @property
    def takes(self) -> bool:
        """Kafka takes records."""
        ...

    def send(self, outgoing: Outgoing, done: Callable[[Outgoing, Exception | None], None]) -> None:
        """Offer a record to Kafka; `done` has to call the method of this name."""
        ...

    def done(self, outgoing: Outgoing, failure: Exception | None) -> None:
        """Kafka has a record, or never will."""
        ...

    def leave(self, outgoing: Outgoing) -> None:
        """The disk has it: memory and the session store need it no more."""
        ...

    def look(self) -> None:
        """The way over the spool may end."""
        ...

    def wake(self) -> None:
        """Records are on disk: who waits for that goes on, and answers leave."""
        ...

    async def movement(self) -> None:
        """Wait until a record is over or on disk, or Kafka went away or came back."""
        ...


class BusSpool:
    """Records of one node that go over its disk. Trio thread only.

    Attributes:
      disk: where they are kept.
      is_on: records go over the spool at present.
      spooled: messages that went this way.
      lost: messages that were on disk and are no record.
    """

    def __init__(self, disk: Spool, window: BusWindow, answers: BusAnswers, outlet: Outlet) -> None:
        self.disk = disk
        self.is_on = False
        self.spooled = self.lost = 0
        self._window = window
        self._answers = answers
        self._outlet = outlet
        self._queue: deque[Outgoing] = deque()  # on their way into the spool
        self._written: deque[Outgoing] = deque()  # handed to the spool, which does not have them on disk yet
        self._tail: deque[Outgoing] = deque()  # in the spool and in hand, in the order of their positions
        self._drained = 0
        self._aside_messages = self._aside_size = 0
        self._in_hand = False  # something was read from the spool and not sent

    async def start(self, nursery: trio.Nursery) -> None:
        """Own the directory, and send what it holds, in tasks of `nursery`; return once what the last process left is
        known.

        Raises:
          StoreError: the directory cannot be used.
        """
        await nursery.start(self.disk.run)
        self.disk.changed = self._disk_changed
        self.is_on = self.disk.unread < self.disk.end
        nursery.start_soon(self._drain)

    # --- onto the disk

    def begin(self, early: Iterable[Outgoing]) -> None:
        """What is on its way is written as well, then `early`, which has not left, and everything else goes the long
        way. What has a note, too: the next process sends what is in the spool before what is noted, and must find it
        in front of what comes."""
        self.is_on = True
        for outgoing in list(self._outlet.flights):
            if outgoing.number:
                self._answers.release(outgoing)
            if outgoing.spool_end is None:
                self._queue.append(outgoing)
        self._queue += early
        self._fill()

    def put(self, outgoing: Outgoing) -> None:
        """Let a record go this way, behind all before it."""
        self._queue.append(outgoing)
        if outgoing.number:
            self._answers.release(outgoing)
        self._fill()

    def _fill(self) -> None:
        """Put into the spool what waits for it, as far as it fits."""
        disk, queue, flights = self.disk, self._queue, self._outlet.flights
        while queue:
            outgoing = queue[0]
            if outgoing.over:
                queue.popleft()
                continue
            data = outgoing.packed()
            if not disk.fits(len(data)):
                return
            queue.popleft()
            disk.append(data, max(outgoing.messages, 1), read=outgoing in flights)
            outgoing.spool_end = disk.end
            self._written.append(outgoing)
            if outgoing in flights:
                self._tail.append(outgoing)
            else:
                self.spooled += outgoing.messages

    def _disk_changed(self) -> None:
        while self._written and (self._written[0].spool_end or 0) <= self.disk.durable:
            outgoing = self._written.popleft()
            self._answers.release(outgoing)
            if outgoing in self._outlet.flights:
                self._put_aside(outgoing)
            else:
                self._outlet.leave(outgoing)
        self._fill()
        self._outlet.wake()

    def _put_aside(self, outgoing: Outgoing) -> None:
        """Give back the room of what was on its way when the outage was noticed, since that may be the whole window,
        and would hold up what comes until Kafka is back. Memory holds it still: at most HARD windows are put aside."""
        messages, size = self._aside_messages + outgoing.messages, self._aside_size + outgoing.size
        window = self._window
        if outgoing.counted and messages <= HARD * window.max_messages and size <= HARD * window.max_size:
            outgoing.counted, outgoing.aside = False, True
            self._aside_messages, self._aside_size = messages, size
            window.settle(outgoing.messages, outgoing.size)

    # --- from the disk

    async def _drain(self) -> None:
        """Send what the spool holds, in order, while Kafka takes it."""
        outlet = self._outlet
        while True:
            found = await self.disk.read()
            self._in_hand = True
            for record in found:
                while not outlet.takes or self._drained >= DRAIN_BYTES:
                    await outlet.movement()
                self._send_again(record)
            self._in_hand = False
            outlet.look()

    def _send_again(self, record: SpoolRecord) -> None:
        try:
            outgoing = Outgoing.of(record.data)
        except ValueError as exc:
            self.lost += record.messages
            log.error("%d messages in the spool of the bus are lost: %s", record.messages, exc)  # noqa: TRY400
            outgoing = Outgoing(0, b"", 0, 0, over=True)
        outgoing.counted = False  # it takes room on the disk
        outgoing.spool_end = record.end
        self._tail.append(outgoing)
        if outgoing.over:
            self._acknowledge()
            return
        self._drained += len(outgoing.value)
        self._outlet.send(outgoing, self._drained_one)

    def _drained_one(self, outgoing: Outgoing, failure: Exception | None) -> None:
        self._drained -= len(outgoing.value)
        self._outlet.done(outgoing, failure)

    def forget(self, outgoing: Outgoing) -> None:
        """A record that is in the spool is over."""
        if outgoing.aside:
            outgoing.aside = False
            self._aside_messages -= outgoing.messages
            self._aside_size -= outgoing.size
        self._acknowledge()

    def _acknowledge(self) -> None:
        """The spool may forget what is over, from its front on."""
        end = None
        while self._tail and self._tail[0].over:
            end = self._tail.popleft().spool_end
        if end is not None:
            self.disk.acknowledge(end)

    def end_if_empty(self) -> None:
        """Records go to Kafka directly again once everything in the spool has."""
        if not self._queue and not self._in_hand and self.disk.unread == self.disk.end:
            self.is_on = False

    # --- the end

    @property
    def is_settled(self) -> bool:
        """The disk has every record that was to go this way."""
        return not self._queue and not self._written

    def give_up(self) -> list[Outgoing]:
        """Forget what the spool had no room for, and return it: the process ends."""
        left = list(self._queue)
        self._queue.clear()
        return left

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {f"bus_{name}": value for name, value in self.disk.counters().items()}
