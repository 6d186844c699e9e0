"""The way of a group's messages from its window into its store, over the spool while the store is away [K10].

Messages are numbered as they leave the window. They reach the store in the order of their numbers, whichever way they
take, so what is stored is always a prefix of them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

import attrs
import trio

from mqtt_trio.archive.decoding import RunReader
from mqtt_trio.archive.spool import Spool, SpoolRecord, nothing
from mqtt_trio.archive.spooled import Item, count_of, pack_items, read_items
from mqtt_trio.archive.store import ArchiveStore, Outcome
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import FrameRun
from mqtt_trio.errors import RemoteProtocolError, StoreError

BATCH: Final = 1000
"""Messages of one `submit` at most."""
LINGER: Final = 0.003
"""Seconds that the first message of a burst waits for others: one wake and one submit for all of them."""
RECORD_BYTES: Final = 32 * 1024
RECORD_ITEMS: Final = 100
"""What one record of the spool holds at most, about: it is read, stored and acknowledged whole."""
DRAIN_BYTES: Final = 4 * 1024 * 1024
"""Bytes that were read from the spool and are not stored yet; beyond them the rest stays on disk."""

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class Flight:
    """Messages that the store has got, or that are over without it."""

    first: int
    """Number of the first message."""
    count: int
    messages: list[Message]
    window_size: int = 0
    """Bytes of the window that it gives back."""
    window_count: int = 0
    spool_end: int | None = None
    """Position behind it in the spool; None: it is not there."""
    spool_size: int = 0
    """Bytes of the spool, where it was read from there."""
    covered: int = 0
    """How many of its messages are in the spool, or need not be."""
    outcome: Outcome | None = None
    """None: not known yet."""


class Shipper:
    """Owns a group's store and spool. Trio thread only.

    Attributes:
      pending: items of the window that are on no way yet, each with the bytes that it counts for; whoever appends sets
        `taken`.
      left_messages, left_bytes: totals of what left the window: stored, failed or handed to the spool.
      settled: all messages with lower numbers are stored or have failed.
      spooling: messages go to the spool at present.
      refused: numbers of messages that the store refused; their owner forgets them.
      failures: why messages failed since the owner emptied it.
      stored, failed, spooled, lost: messages, by what became of them; lost: that the spool could not give back.
    """

    def __init__(self, name: str, store: ArchiveStore, spool: Spool | None = None) -> None:
        self.name = name
        self.store = store
        self.spool = spool
        self.changed: Callable[[], None] = nothing
        """Called when `safe`, or what is left in the window, may have changed."""
        self.store_changed: Callable[[], None] = nothing
        """Called when the store went away or came back."""
        self._reader = RunReader()
        self.pending: deque[tuple[Item, int]] = deque()
        self.taken = trio.Event()
        self.left_messages = self.left_bytes = self.settled = 0
        self.spooling = False
        self.refused: set[int] = set()
        self.failures: list[Exception] = []
        self.stored = self.failed = self.spooled = self.lost = 0
        self._next_flight = 0  # number of the next message that takes off
        self._flights: deque[Flight] = deque()
        self._covered = True  # what is in flight is in the spool as well
        self._base = self._base_from = 0  # number - position of what is in the spool, from that position on
        self._read_to = 0  # position behind what was read from the spool
        self._drained = 0  # bytes in flight that were read from the spool
        self._hurry, self._moved = trio.Event(), trio.Event()
        self._stopping = False

    @property
    def safe(self) -> int:
        """All messages with lower numbers are settled, or on disk in the spool."""
        spool = self.spool
        if spool is None or spool.durable < self._base_from:
            return self.settled
        return max(self.settled, spool.durable + self._base)

    # --- tasks ---

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Open the spool, then the store; ship until cancelled.

        Raises:
          StoreError: one of them cannot be opened.
        """
        refusal: StoreError | None = None
        async with trio.open_nursery() as nursery:
            try:
                if self.spool is not None:
                    await nursery.start(self.spool.run)
                    self._resume(self.spool)
                self.store.watch(self._look_at_store)
                await nursery.start(self.store.run)
            except StoreError as exc:
                refusal = exc
                nursery.cancel_scope.cancel()
            else:
                if self.spool is not None:
                    nursery.start_soon(self._drain, self.spool)
                nursery.start_soon(self._ship)
                self._look_at_store()
                task_status.started()
        if refusal is not None:
            raise refusal

    def _resume(self, spool: Spool) -> None:
        """Number what the last process left: it comes before everything else."""
        spool.changed = self._spool_changed
        self.settled = self._next_flight = self._read_to = spool.acknowledged
        self.left_messages = spool.end
        if spool.unread < spool.end:
            self.begin_spooling()

    def _look_at_store(self) -> None:
        if self.store.trouble() is not None:
            self.begin_spooling()
        self.store_changed()
        self._moved.set()

    def begin_spooling(self) -> None:
        """Send everything that is not stored yet over the spool, where there is one."""
        if self.spool is not None and not self.spooling:
            self.spooling, self._covered = True, False
            self.taken.set()
            self._moved.set()

    def _spool_changed(self) -> None:
        if self.spooling and (self.pending or not self._covered):
            self.taken.set()
        self._moved.set()
        self.changed()

    async def _ship(self) -> None:
        while True:
            await self.taken.wait()
            if not self._stopping and not self.spooling:
                with trio.move_on_after(LINGER):
                    await self._hurry.wait()
            self.taken = trio.Event()
            if self.spooling and self.spool is not None:
                await self._fill(self.spool)
            while self.pending and not self.spooling:
                self._ship_batch()
                await trio.lowlevel.checkpoint()  # decoding a batch takes about a millisecond: let others in

    async def stop(self) -> None:
        """Have everything that was taken stored, or, while the store is away, on disk in the spool; close both. Bounded
        by the caller's cancel scope."""
        self._stopping = True
        self.taken.set()
        self._hurry.set()
        self._moved.set()
        if self.spool is not None:
            self.spool.take_all()
        while not self._is_over():
            await self._movement()
        if self.spool is not None:
            await self.spool.stop()
        with trio.CancelScope() as scope:
            if self._flights:  # the spool has them, and the store is away: it shall not wait
                scope.cancel()
            await self.store.stop()

    async def _movement(self) -> None:
        """Wait until anything moves after this call."""
        if self._moved.is_set():
            self._moved = trio.Event()
        await self._moved.wait()

    def _is_over(self) -> bool:
        kept = self.spooling and self._covered and self.store.trouble() is not None
        return not self.pending and (kept or not self._flights)

    # --- over the spool ---

    async def _fill(self, spool: Spool) -> None:
        """Put into the spool what is in flight and not there, then what is pending, as far as it fits."""
        if not self._covered and not await self._cover(spool):
            return
        while self.pending and self.spooling:
            items, size = self._next_items()
            data, count = pack_items(items), sum(map(count_of, items))
            if not spool.fits(len(data)):
                return
            for _ in items:
                self.pending.popleft()
            self._mark(spool, self._next_flight - self._read_to)
            spool.append(data, count)
            self.spooled += count
            self.left_messages += count
            self.left_bytes += size
            self._moved.set()
            await trio.lowlevel.checkpoint()
        self.changed()

    def _next_items(self) -> tuple[list[Item], int]:
        """Return the oldest pending items that make up one record, and the bytes that they count for."""
        items: list[Item] = []
        total = 0
        for item, size in self.pending:
            if items and (total + size > RECORD_BYTES or len(items) >= RECORD_ITEMS):
                break
            items.append(item)
            total += size
        return items, total

    async def _cover(self, spool: Spool) -> bool:
        """Put what is in flight into the spool, for the next process: this one has it in hand. Say whether all of it
        fitted."""
        for flight in list(self._flights):
            while flight.covered < flight.count and flight.outcome is None:
                part = flight.messages[flight.covered : flight.covered + RECORD_ITEMS]
                data = pack_items(part)
                if not spool.fits(len(data)):
                    return False
                self._mark(spool, flight.first + flight.covered - spool.end)
                spool.append(data, len(part), read=True)
                self._read_to = flight.spool_end = spool.end
                flight.covered += len(part)
                await trio.lowlevel.checkpoint()
        self._covered = True
        self._moved.set()
        return True

    def _mark(self, spool: Spool, base: int) -> None:
        """What is appended next has this difference between number and position."""
        if base != self._base:
            self._base, self._base_from = base, spool.end

    async def _drain(self, spool: Spool) -> None:
        """Submit what is in the spool, in order, while the store is there; then let messages go straight to it."""
        while True:
            ready = self.spooling and self._covered and self._drained < DRAIN_BYTES
            if not ready or self.store.trouble() is not None or (self._stopping and not self.pending):
                await self._movement()
            elif spool.unread < spool.end:
                for record in await spool.read():
                    self._take_off(record)
                    await trio.lowlevel.checkpoint()
            else:
                self._pass_lost(spool.unread)
                self.spooling = False
                self.taken.set()

    def _take_off(self, record: SpoolRecord) -> None:
        self._pass_lost(record.position)
        self._read_to = record.end
        try:
            messages = read_items(record.data)
        except RemoteProtocolError as exc:
            text = "archive group %s: %d messages in its spool cannot be used: %s"
            logger.error(text, self.name, record.messages, exc)  # noqa: TRY400 (the text says it all)
            self._give_up(record.messages, dict.fromkeys(range(record.messages), exc), spool_end=record.end)
            return
        self._drained += record.size
        self._fly(messages, spool_end=record.end, spool_size=record.size)

    def _pass_lost(self, position: int) -> None:
        """The spool could not give back what lies between what was read last and `position`."""
        if position > self._read_to:
            count, self._read_to = position - self._read_to, position
            self.lost += count
            self._give_up(count, {}, spool_end=position)

    # --- straight to the store ---

    def _ship_batch(self) -> None:
        """Submit up to BATCH messages from the window's end, or a run that is longer."""
        messages: list[Message] = []
        size = 0
        while self.pending and len(messages) < BATCH:
            item, item_size = self.pending[0]
            if isinstance(item, Message):
                messages.append(item)
            else:
                found = self._read_run(item)
                if found is None:
                    break
                messages += found
            size += item_size
            self.pending.popleft()
        if messages:
            self._fly(messages, window_size=size)
        else:
            item, item_size = self.pending.popleft()
            count = count_of(item)
            self._give_up(
                count, dict.fromkeys(range(count), StoreError("the run is unreadable")), window_size=item_size
            )

    def _read_run(self, run: FrameRun) -> list[Message] | None:
        try:
            return self._reader.read(run)
        except RemoteProtocolError:
            # The fast lane looked at every frame, so this is a bug; it must cost its run, not the archive.
            logger.exception("archive group %s: a run of %d frames is unreadable", self.name, run.count)
            return None

    def _fly(
        self, messages: list[Message], *, window_size: int = 0, spool_end: int | None = None, spool_size: int = 0
    ) -> None:
        """Submit the next messages; what belongs to all of them is given back with the last."""
        for start in range(0, len(messages), BATCH):
            part = messages[start : start + BATCH]
            flight = Flight(self._next_flight, len(part), part)
            if spool_end is None:
                flight.window_count = len(part)
            else:
                flight.covered = len(part)
            if start + BATCH >= len(messages):
                flight.window_size, flight.spool_end, flight.spool_size = window_size, spool_end, spool_size
            self._next_flight += len(part)
            self._flights.append(flight)
            self.store.submit(part, partial(self._land, flight))

    def _give_up(self, count: int, outcome: Outcome, *, window_size: int = 0, spool_end: int | None = None) -> None:
        """The next messages are over without the store."""
        flight = Flight(self._next_flight, count, [], window_size, spool_end=spool_end, covered=count)
        flight.window_count = count if spool_end is None else 0
        self._next_flight += count
        self._flights.append(flight)
        self._land(flight, outcome)

    def _land(self, flight: Flight, outcome: Outcome) -> None:
        """The outcome of a flight is known: settle what is known from the oldest one on."""
        flight.outcome = outcome
        flights = self._flights
        while flights and flights[0].outcome is not None:
            self._settle(flights.popleft())
        if not self._covered:
            self.taken.set()
        self._moved.set()
        self.changed()

    def _settle(self, flight: Flight) -> None:
        outcome = flight.outcome or {}
        self.settled = flight.first + flight.count
        self.left_messages += flight.window_count
        self.left_bytes += flight.window_size
        self.failed += len(outcome)
        if flight.messages:
            self.stored += flight.count - len(outcome)
        if outcome:
            self.failures += outcome.values()
            self.refused.update(flight.first + index for index in outcome)
        if flight.spool_end is not None and self.spool is not None:
            self.spool.acknowledge(flight.spool_end)
        self._drained -= flight.spool_size
