"""Records with messages at QoS 1 and 2 on their way to Kafka: what of them is where, in memory, on disk, at Kafka.

Where `Ack = "store"` and the node has a session store, each record is noted there first, in the commit of everything
else that its messages led to, and leaves behind that. So a kill at any instant leaves the record and the Packet
Identifiers of its messages, or neither; the next process sends what it finds under the old sequences, and whoever has
it knows it for a double. While Kafka is away records go over the spool instead of waiting in memory: those that are on
their way are written there as well, in front of what comes. Behind the outage it is read and sent in order, and new
records queue behind it until it is empty.

An acknowledgement that waits for its record (`Ack = "store"`) goes when Kafka has it, or, while Kafka is away, when
the disk has it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

import trio

from gateways.kafka.bus_outgoing import NOTES, Outgoing
from gateways.kafka.bus_records import RUN_OVERHEAD, Item
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.bus_window import HARD, BusWindow
from gateways.kafka.records import Record, was_closed
from mqtt_trio.gateway import Answer, GatewayHost, Hold, LocalClient, ReasonCode, Refused, Spool, SpoolRecord

log = logging.getLogger("gateways.kafka.bus")

DRAIN_BYTES: Final = 4 * 1024 * 1024
"""Bytes that were read from the spool and are not confirmed; beyond them the rest stays on disk."""
FAILED: Final = ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR


class BusOutbox:
    """One node's records at QoS 1 and 2. Trio thread only.

    Attributes:
      gated: acknowledgements wait for their record.
      notes: records are noted in the session store before they leave.
      turns_away: Kafka is away, and messages at QoS 1 and 2 are not taken.
      away: Kafka is away.
      spooling: records go over the spool at present.
    """

    def __init__(
        self,
        settings: BusSettings,
        host: GatewayHost,
        local: LocalClient,
        offer: Callable[[Record], None],
        window: BusWindow,
    ) -> None:
        self.gated = settings.ack == "store"
        self.notes = self.gated and host.marks is not None
        self.turns_away = self.away = self.spooling = False
        self.partitions = settings.partitions
        self.pack_all: Callable[[], list[Outgoing]]
        """Makes records of what waits in the slots."""
        self.pack_handed: Callable[[dict[int, list[Item]]], list[Outgoing]]
        """Makes records of what is passed on, by partition."""
        self.slot_holds: Callable[[], Iterable[Hold]] = tuple
        """What their publishers wait for."""
        self.trouble: Callable[[], str | None] = lambda: None
        """Says why Kafka takes nothing at present."""
        self.rejected = self.turned_away = self.spooled = self.resumed = self.lost = 0
        self.timed_out = 0
        self.sent_records = self.sent_messages = self.failed_messages = 0
        self.unconfirmed = 0
        """Of the failed ones, those that Kafka had not confirmed when the producer was closed."""
        self.spool: Spool | None = None
        if settings.on_outage == "spool":
            self.spool = host.make_spool(f"bus-{settings.topic}", settings.spool_bytes)
        self._settings = settings
        self._host = host
        self._local = local
        self._offer = offer
        self.window = window
        self._open = self._running = False
        self._handed: dict[int, list[Item]] = {}
        self._early: deque[Outgoing] = deque()  # taken before anything may leave
        self._flights: dict[Outgoing, None] = {}  # offered and not over, in their order
        self._queue: deque[Outgoing] = deque()  # on their way into the spool
        self._written: deque[Outgoing] = deque()  # handed to the spool, which does not have them on disk yet
        self._tail: deque[Outgoing] = deque()  # in the spool and in hand, in the order of their positions
        self._waits: deque[Outgoing] = deque()  # acknowledgements wait for them, oldest first
        self._any_waits = trio.Event()
        self._drained = 0
        self._aside_messages = self._aside_size = 0
        self._in_hand = False  # something was read from the spool and not sent
        self._uncommitted = 0
        self._last_note = 0
        self._notes_gone: dict[str, bytes | None] = {}
        self._old = self._read_notes()
        self._moved = trio.Event()

    # --- what comes

    def turn_away(self) -> Answer:
        """Say no to a message at QoS 1 or 2, or drop it: Kafka is away."""
        if self._settings.on_outage == "reject":
            self.rejected += 1
            return Refused(ReasonCode.QUOTA_EXCEEDED)
        self.turned_away += 1
        return None

    def hand_over(self, partition: int, item: bytes) -> None:
        """Take a message at QoS 1 or 2 that is passed on: where the node has a store it is noted in the batch that is
        being filled, whatever `Ack` says, because there it is taken out of a queue or behind a position."""
        self.window.add(1, RUN_OVERHEAD + len(item))
        self._handed.setdefault(partition, []).append(item)

    def ship_handed(self) -> None:
        """Send what is passed on."""
        if not self._handed:
            return
        if self._host.marks is not None:
            self._host.commit()  # which asks for it: it leaves behind that
        elif self._open or self.spooling:
            for outgoing in self._pack_handed():
                self.dispatch(outgoing)

    def _pack_handed(self) -> list[Outgoing]:
        handed, self._handed = self._handed, {}
        return self.pack_handed(handed) if handed else []

    def dispatch(self, outgoing: Outgoing) -> None:
        """Send a record, behind all before it."""
        if outgoing.holds:
            self._await(outgoing)
        if self.spooling:
            self._queue.append(outgoing)
            if outgoing.number:
                self._release(outgoing)
            self._fill()
        elif self._open:
            self._send(outgoing)
        else:
            self._early.append(outgoing)

    def marks(self) -> dict[str, bytes | None]:
        """Return what is new, for the store (`GatewayHost.note`): records of what waits, and which are over."""
        changed, self._notes_gone = self._notes_gone, {}
        packed = self._pack_handed()
        if self.notes:
            packed += self.pack_all()
        if packed:
            for outgoing in packed:
                self._last_note += 1
                outgoing.number = self._last_note
                changed[outgoing.name] = outgoing.packed()
            self._uncommitted += len(packed)
            self._local.when_kept(partial(self._committed, packed))
        return changed

    def _committed(self, packed: list[Outgoing]) -> None:
        self._uncommitted -= len(packed)
        for outgoing in packed:
            self.dispatch(outgoing)
        self._has_moved()
        self._host.flush()

    # --- to Kafka

    def open(self, partitions: int) -> None:
        """Records may leave: Kafka has told that its topic has so many partitions."""
        self.partitions = partitions
        self._open = True
        if not self.spooling:
            while self._early:
                self._send(self._early.popleft())
        self.look()

    def _send(self, outgoing: Outgoing, done: Callable[[Outgoing, Exception | None], None] | None = None) -> None:
        self._flights[outgoing] = None
        record = Record(
            self._settings.topic,
            outgoing.partition % self.partitions,
            None,
            outgoing.value,
            done=partial(done or self._done, outgoing),
            messages=outgoing.messages,
        )
        record.patient = True
        self._offer(record)

    def _done(self, outgoing: Outgoing, failure: Exception | None) -> None:
        if was_closed(failure) and (outgoing.number or outgoing.spool_end):
            return  # the producer was closed, nobody knows: the next process sends what the disk has
        del self._flights[outgoing]
        outgoing.over = True
        if failure is None:
            self.sent_records += 1
            self.sent_messages += outgoing.messages
        else:
            self.failed_messages += outgoing.messages
            if was_closed(failure):  # told once, by the bus
                self.unconfirmed += outgoing.messages
            else:
                log.error("%d messages did not reach the other nodes: %s", outgoing.messages, failure)
        self._release(outgoing, None if failure is None else FAILED)
        self._leave(outgoing)
        if outgoing.spool_end is not None:
            self._acknowledge()
        self._has_moved()

    def _release(self, outgoing: Outgoing, refused: ReasonCode | None = None) -> None:
        holds, outgoing.holds = outgoing.holds, []
        for hold in holds:
            hold.release(refused)
        while self._waits and not self._waits[0].holds:
            self._waits.popleft()

    def _leave(self, outgoing: Outgoing) -> None:
        """It needs neither room in the window nor its note any more."""
        if outgoing.number:
            self._notes_gone[outgoing.name] = None
            outgoing.number = 0
        if outgoing.counted:
            outgoing.counted = False
            self.window.settle(outgoing.messages, outgoing.size)
        if outgoing.aside:
            outgoing.aside = False
            self._aside_messages -= outgoing.messages
            self._aside_size -= outgoing.size

    # --- those who wait

    def _await(self, outgoing: Outgoing) -> None:
        if self.turns_away:
            self._answer_in_outage(outgoing)
            return
        outgoing.answer_by = trio.current_time() + self._settings.ack_timeout
        self._waits.append(outgoing)
        self._any_waits.set()

    def _let_nobody_wait(self) -> None:
        """Kafka is away, and what comes is turned away: an answer that waited would hold up the refusals behind it,
        since answers keep the order of their messages. What was taken is sent when Kafka is back."""
        while self._waits:
            self._answer_in_outage(self._waits[0])
        if not self.notes:  # else they leave the slots with the next commit, and are answered behind it
            refused = ReasonCode.QUOTA_EXCEEDED if self._settings.on_outage == "reject" else None
            for hold in self.slot_holds():
                self.rejected += refused is not None and not hold.released
                hold.release(refused)
        self.window.release_all()

    def _answer_in_outage(self, outgoing: Outgoing) -> None:
        """What is on disk is acknowledged: the next process knows of it. The rest may be at Kafka, or not."""
        if outgoing.number or self._settings.on_outage == "drop":
            self._release(outgoing)
        else:
            self.rejected += sum(not hold.released for hold in outgoing.holds)
            self._release(outgoing, ReasonCode.QUOTA_EXCEEDED)

    async def _watch_deadlines(self) -> None:
        """See to acknowledgements that have waited for AckTimeout [K22]."""
        waits = self._waits
        while True:
            while not waits:
                self._any_waits = trio.Event()
                await self._any_waits.wait()
            await trio.sleep_until(waits[0].answer_by)
            while waits and waits[0].answer_by <= trio.current_time():
                self._time_out(waits[0])
            self._host.flush()

    def _time_out(self, outgoing: Outgoing) -> None:
        """Answer what has waited for too long; where there is a spool that takes it, let it go there first."""
        spool = self.spool
        if spool is not None and not self.spooling and spool.failing is None:
            self._begin_spooling(spool)  # slow is as good as away
            answer_by = trio.current_time() + self._settings.ack_timeout
            for each in self._waits:  # the disk gets its time, for all of them
                each.answer_by = answer_by
        elif outgoing.number:
            self._release(outgoing)
        else:
            self.timed_out += len(outgoing.holds)
            self._release(outgoing, FAILED)

    # --- over the spool

    def look(self) -> None:
        """Kafka went away or came back, or somebody thinks so."""
        if not self._running:
            return
        away = self.away = self.trouble() is not None
        turned_away, self.turns_away = self.turns_away, away and self._settings.on_outage in ("reject", "drop")
        if self.turns_away and not turned_away:
            self._let_nobody_wait()
        if self.spool is not None:
            if away:
                self._begin_spooling(self.spool)
            else:
                self._end_spooling(self.spool)
        self._has_moved()
        self._host.flush()

    def _begin_spooling(self, spool: Spool) -> None:
        """What is on its way is written as well, and everything else goes the long way. What has a note, too: the next
        process sends what is in the spool before what is noted, and must find it in front of what comes."""
        if self.spooling:
            return
        self.spooling = True
        for outgoing in list(self._flights):
            if outgoing.number:
                self._release(outgoing)
            if outgoing.spool_end is None:
                self._queue.append(outgoing)
        self._queue += self._early
        self._early.clear()
        self._fill()

    def _fill(self) -> None:
        """Put into the spool what waits for it, as far as it fits."""
        spool, queue = self.spool, self._queue
        assert spool is not None
        while queue:
            outgoing = queue[0]
            if outgoing.over:
                queue.popleft()
                continue
            data = outgoing.packed()
            if not spool.fits(len(data)):
                return
            queue.popleft()
            spool.append(data, max(outgoing.messages, 1), read=outgoing in self._flights)
            outgoing.spool_end = spool.end
            self._written.append(outgoing)
            if outgoing in self._flights:
                self._tail.append(outgoing)
            else:
                self.spooled += outgoing.messages

    def _spool_changed(self) -> None:
        spool = self.spool
        assert spool is not None
        while self._written and (self._written[0].spool_end or 0) <= spool.durable:
            outgoing = self._written.popleft()
            self._release(outgoing)
            if outgoing in self._flights:
                self._put_aside(outgoing)
            else:
                self._leave(outgoing)
        self._fill()
        self._has_moved()
        self._host.flush()

    def _put_aside(self, outgoing: Outgoing) -> None:
        """Give back the room of what was on its way when the outage was noticed, since that may be the whole window,
        and would hold up what comes until Kafka is back. Memory holds it still: at most HARD windows are put aside."""
        messages, size = self._aside_messages + outgoing.messages, self._aside_size + outgoing.size
        window = self.window
        if outgoing.counted and messages <= HARD * window.max_messages and size <= HARD * window.max_size:
            outgoing.counted, outgoing.aside = False, True
            self._aside_messages, self._aside_size = messages, size
            window.settle(outgoing.messages, outgoing.size)

    def _end_spooling(self, spool: Spool) -> None:
        if self._open and not self._queue and not self._in_hand and spool.unread == spool.end:
            self.spooling = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the spool, if there is one, until cancelled; `started()` once what the last process left is known."""
        async with trio.open_nursery() as nursery:
            if self.spool is not None:
                await nursery.start(self.spool.run)
                self.spool.changed = self._spool_changed
                self.resumed += self.spool.messages
                self.spooling = self.spool.unread < self.spool.end
                nursery.start_soon(self._drain, self.spool)
            if self.gated:
                nursery.start_soon(self._watch_deadlines)
            old, self._old = self._old, []
            for outgoing in old:
                self.window.add(outgoing.messages, outgoing.size)
                self.resumed += outgoing.messages
                self.dispatch(outgoing)
            self._host.note(self.marks)
            self._running = True
            self.look()
            task_status.started()
            await trio.sleep_forever()

    async def _drain(self, spool: Spool) -> None:
        """Send what the spool holds, in order, while Kafka takes it."""
        while True:
            found = await spool.read()
            self._in_hand = True
            for record in found:
                while not self._may_drain():
                    await self._movement()
                self._send_again(record)
            self._in_hand = False
            self.look()

    def _may_drain(self) -> bool:
        return self._open and self.trouble() is None and self._drained < DRAIN_BYTES

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
        self._send(outgoing, self._drained_one)

    def _drained_one(self, outgoing: Outgoing, failure: Exception | None) -> None:
        self._drained -= len(outgoing.value)
        self._done(outgoing, failure)

    def _acknowledge(self) -> None:
        """The spool may forget what is over, from its front on."""
        assert self.spool is not None
        end = None
        while self._tail and self._tail[0].over:
            end = self._tail.popleft().spool_end
        if end is not None:
            self.spool.acknowledge(end)

    # --- life

    def _read_notes(self) -> list[Outgoing]:
        """What the last process had noted and Kafka may not have."""
        found: list[Outgoing] = []
        marks = self._host.marks or {}
        for name in sorted(name for name in marks if name.startswith(NOTES)):
            try:
                outgoing = Outgoing.of(marks[name])
                outgoing.number = int(name.removeprefix(NOTES))
            except ValueError as exc:
                self.lost += 1
                self._notes_gone[name] = None
                log.error("a record of the bus in the session store is lost: %s", exc)  # noqa: TRY400
                continue
            self._last_note = outgoing.number
            found.append(outgoing)
        return found

    async def _movement(self) -> None:
        if self._moved.is_set():
            self._moved = trio.Event()
        await self._moved.wait()

    def _has_moved(self) -> None:
        self._moved.set()

    async def finish(self, waits: Callable[[], bool]) -> None:
        """Wait until Kafka has everything, or, while it is away, the disk; where nothing is kept on disk, at once.
        `waits`: something is still in the slots. Bounded by the caller's cancel scope."""
        if self.spool is not None:
            self.spool.take_all()
        while (self.notes or self.spool is not None) and (waits() or not self.is_safe):
            await self._movement()

    @property
    def is_safe(self) -> bool:
        """The process may end: Kafka has everything that was taken, or, while it is away, the disk."""
        if self._uncommitted or self._queue or self._written or self._early or self._handed:
            return False
        kept = all(outgoing.number or outgoing.spool_end is not None for outgoing in self._flights)
        return not self._flights or (self.trouble() is not None and kept)

    def give_up(self) -> int:
        """Forget what neither Kafka nor a disk has, such as what a full spool had no room for, since the process ends;
        return how many messages that is."""
        left = sum(each.messages for each in (*self._queue, *self._early) if not (each.number or each.over))
        self._queue.clear()
        self._early.clear()
        return left

    async def stop(self) -> None:
        """Close the spool. Bounded by the caller's cancel scope."""
        if self.spool is not None:
            await self.spool.stop()

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        spool = self.spool.counters() if self.spool is not None else {}
        return {
            "bus_messages_rejected": self.rejected,
            "bus_messages_turned_away": self.turned_away,
            "bus_messages_timed_out": self.timed_out,
            "bus_messages_spooled": self.spooled,
            "bus_messages_resumed": self.resumed,
            **{f"bus_{name}": value for name, value in spool.items()},
        }
