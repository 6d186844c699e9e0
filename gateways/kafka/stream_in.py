"""From mqtt.messages to the subscribers [K11]: what others put there is published like a client's message.

A record is done with, and its offset may be stored in the group, when the store has what kept sessions are owed of it
and every tap has let it go: archive groups by their `Ack`, the bus once Kafka, or the spool, has it for the other
nodes. Whatever may take long holds the whole stream up, and the records stay in Kafka meanwhile: no room in the journal
or in a window, a tap that refuses, dead letters that wait for Kafka.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

import attrs
import trio

from gateways.kafka.group_poller import Handed, Membership, Progress
from gateways.kafka.records import ConsumedRecord, Reason
from gateways.kafka.stream_records import MalformedError, OwnRecords, is_own, message_of
from mqtt_trio.gateway import Hold, LocalClient, Parcel

log = logging.getLogger("gateways.kafka.messages")

WINDOW_RECORDS: Final = 1000
WINDOW_BYTES: Final = 8 * 1024 * 1024
"""Records, and bytes of them, that may be published and not done with. Outcome: the others stay in Kafka."""
BATCH: Final = 64
"""Records that are published in one stretch."""
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
"""Seconds between two attempts with a message that a tap refuses."""


class Letters(Protocol):
    """What is used of `DeadLetters`."""

    @property
    def has_room(self) -> bool: ...

    def undeliverable(
        self, record: ConsumedRecord, reason: Reason, error: str, done: Callable[[], None], *, redrivable: bool = True
    ) -> None: ...


@attrs.define(eq=False)
class Entry:
    """A record that was taken and is not done with."""

    record: ConsumedRecord
    progress: Progress
    size: int
    parcel: Parcel | None = None
    """Its message, until that is published."""
    waiting: int = 1
    """What it waits for; 0: it is done with."""
    refused: bool = False
    """Something did not keep it after all."""


@attrs.frozen
class Waiting:
    """A record that came and was not looked at."""

    record: ConsumedRecord
    membership: Membership
    tenure: int
    progress: Progress


class StreamIn:
    """Publishes what others put into the topic. Trio thread only."""

    def __init__(self, local: LocalClient, letters: Letters) -> None:
        """`local` publishes; `letters` get what is no message."""
        self.own_records = OwnRecords()
        self.own = self.published = self.malformed = self.repeated = self.left = self.undelivered = 0
        self._local = local
        self._letters = letters
        self._waiting: deque[Waiting] = deque()
        self._flight: deque[Entry] = deque()
        self._flight_size = 0
        self._unpublished: deque[Entry] = deque()
        """Those of `_flight` whose message a tap refused, or that are behind such a one."""
        self._unkept: list[Entry] = []
        self._asks_store = self._awaits_room = self._stopping = False
        self._go = trio.Event()
        self._refused = trio.Event()
        self._pause = FIRST_PAUSE
        self._moved = trio.Event()

    # --- what comes

    def on_records(self, handed: Handed) -> None:
        """Take records, in their order."""
        if self._stopping:
            return  # they stay in Kafka
        membership, tenure, progress = handed.membership, handed.tenure, handed.progress
        self._waiting.extend(Waiting(record, membership, tenure, progress) for record in handed.records)
        self._pump()

    async def room(self) -> None:
        """Wait until all that came was looked at."""
        while self._waiting:
            await self._movement()
        await trio.lowlevel.checkpoint()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Go on when something that was waited for has come; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._try_again)
            task_status.started()
            while True:
                await self._go.wait()
                self._go = trio.Event()
                self._pump()
                await trio.lowlevel.checkpoint()

    async def _try_again(self) -> None:
        """What a tap refused, and what found no room for its letter."""
        while True:
            await self._refused.wait()
            await trio.sleep(self._pause)
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
            self._refused = trio.Event()
            self._pump()

    async def finish(self) -> None:
        """Take nothing more, wait until what was taken is done with. Bounded by the caller's cancel scope."""
        self._stopping = True
        self._waiting.clear()
        while self._flight:
            await self._movement()

    # --- what is published

    def _pump(self) -> None:
        """Publish what may be published now. Never out of somebody's outcome: it would come back to who is at it."""
        while self._publish_next():
            pass
        self._moved.set()

    def _publish_next(self) -> bool:
        """Publish some more; False: there is nothing, or something is to be waited for."""
        if self._unpublished:
            return self._publish()
        if not self._may_take():
            return False
        self._take_some()
        return self._publish() if self._unpublished else True

    def _may_take(self) -> bool:
        if not self._waiting or len(self._flight) >= WINDOW_RECORDS or self._flight_size >= WINDOW_BYTES:
            return False
        if not self._letters.has_room:
            self._refused.set()  # nobody tells when there is some
            return False
        return True

    def _take_some(self) -> None:
        """Look at some records; their messages, and letters about those without one, are on their way then."""
        for _ in range(BATCH):
            if not self._may_take():
                break
            waiting = self._waiting.popleft()
            record, delivered = waiting.record, waiting.progress.delivered
            partition = (record.topic, record.partition)
            if waiting.membership.has_lost(partition, waiting.tenure):
                self.left += 1
            elif record.offset < delivered.get(partition, 0):
                self.repeated += 1
            else:
                delivered[partition] = record.offset + 1
                self._take(record, waiting.progress)
        self._settle()

    def _take(self, record: ConsumedRecord, progress: Progress) -> None:
        entry = Entry(record, progress, len(record.value or b""))
        self._flight.append(entry)
        self._flight_size += entry.size
        if is_own(record):
            self.own += 1
            entry.waiting = 0
            return
        try:
            message = message_of(record)
        except MalformedError as exc:
            self._malformed(entry, str(exc))
            return
        if (objection := self._local.objection(message.topic_name)) is not None:
            self._malformed(entry, f"topic: {objection}")
            return
        entry.parcel = Parcel(message)
        self._unpublished.append(entry)

    def _malformed(self, entry: Entry, error: str) -> None:
        self.malformed += 1
        self._letters.undeliverable(entry.record, Reason.MALFORMED, error, partial(self._done, entry))

    def _publish(self) -> bool:
        """Publish what was taken; False: not all of it can be published now."""
        local, unpublished = self._local, self._unpublished
        if not local.has_room(tapped=True):
            if not self._awaits_room:
                self._awaits_room = True
                local.when_room(self._room_again, tapped=True)
            return False
        parcels = [entry.parcel for entry in unpublished if entry.parcel is not None]
        try:
            count = local.bring(parcels)
        except Exception as exc:  # whatever is in it: a record never stops those behind it
            log.exception("a record of mqtt.messages could not be published")
            count = next(number for number, parcel in enumerate(parcels) if not parcel.brought)
            self._published(count)
            self._fail(unpublished.popleft(), exc)
            return True
        self._published(count)
        if count:
            self._pause = FIRST_PAUSE
        if unpublished:
            self._refused.set()
        return not unpublished

    def _published(self, count: int) -> None:
        for _ in range(count):
            entry = self._unpublished.popleft()
            parcel, entry.parcel = entry.parcel, None
            assert parcel is not None
            self.published += 1
            entry.waiting = 1 + len(parcel.holds)
            self._unkept.append(entry)
            for hold in parcel.holds:
                hold.when_released(partial(self._released, entry, hold))
        self._ask_store()

    def _fail(self, entry: Entry, exc: Exception) -> None:
        self.undelivered += 1
        entry.parcel = None
        text = f"{type(exc).__name__}: {exc}"
        self._letters.undeliverable(entry.record, Reason.UNDELIVERED, text, partial(self._done, entry))

    def _room_again(self) -> None:
        self._awaits_room = False
        self._go.set()

    # --- what is waited for

    def _ask_store(self) -> None:
        if not self._asks_store and self._unkept:
            self._asks_store = True
            asked, self._unkept = self._unkept, []
            self._local.when_kept(partial(self._kept, asked))

    def _kept(self, entries: Sequence[Entry]) -> None:
        self._asks_store = False
        for entry in entries:
            self._done(entry, settle=False)
        self._ask_store()
        self._settle()

    def _released(self, entry: Entry, hold: Hold) -> None:
        entry.refused = entry.refused or hold.refused is not None
        self._done(entry)

    def _done(self, entry: Entry, *, settle: bool = True) -> None:
        """One thing that a record waited for has come."""
        entry.waiting -= 1
        if entry.waiting == 0 and entry.refused:
            # Its subscribers have it, so it is not for writing again.
            entry.waiting, entry.refused = 1, False
            self.undelivered += 1
            text = "an archive group, or the bus, did not keep the message; subscribers of this node got it"
            done = partial(self._done, entry)
            self._letters.undeliverable(entry.record, Reason.UNDELIVERED, text, done, redrivable=False)
        elif settle:
            self._settle()

    def _settle(self) -> None:
        """Note how far everything is done with."""
        flight = self._flight
        while flight and not flight[0].waiting:
            entry = flight.popleft()
            self._flight_size -= entry.size
            record = entry.record
            entry.progress.done[record.topic, record.partition] = record.offset + 1
            self._go.set()

    # --- others

    async def _movement(self) -> None:
        if self._moved.is_set():
            self._moved = trio.Event()
        await self._moved.wait()

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "stream_records_own": self.own + self.own_records.left_out,
            "stream_messages_published": self.published,
            "stream_records_malformed": self.malformed,
            "stream_records_repeated": self.repeated,
            "stream_records_left": self.left,
            "stream_records_undelivered": self.undelivered,
            "stream_records_waiting": len(self._flight),
        }
